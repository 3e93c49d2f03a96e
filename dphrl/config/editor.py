"""The JSON schema of a configuration file: what editors complete, explain and check while it is written."""

from __future__ import annotations

from typing import Any

from dphrl.config.errors import ConfigSchema, is_method
from dphrl.config.explain import explanation
from dphrl.config.loading import list_presets

JsonSchema = dict[str, Any]


def editor_schema() -> JsonSchema:
    """A JSON schema, draft 2020-12, of a file as it is written: with `base` and the short forms of methods.

    It knows what each setting may be; how settings go together is checked when the file is loaded.
    """
    schema = ConfigSchema()
    root = schema.root
    complete = _completeness(root, schema)
    sections = [root, *root["$defs"].values()]
    for section in sections:
        _require_in_lists_only(section, schema)
    for section in sections:
        section.pop("required", None)
    _tidy(root)
    for section in sections:
        if is_method(section):
            _allow_short_forms(section)
    base = {
        "anyOf": [{"enum": list(list_presets())}, {"type": "string"}],
        "description": "A preset's name, or the path of a YAML file, relative to this one. Its settings hold where "
        "this file sets no others.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A dphrl configuration",
        **root,
        "properties": {"base": base, **root["properties"]},
        # What this file leaves out may stand in its base.
        "if": {"not": {"required": ["base"]}},
        "then": complete,
    }


def _completeness(section: JsonSchema, schema: ConfigSchema) -> JsonSchema:
    """What must be given in `section` and the sections in it, as a schema of its own."""
    inner = {}
    for name, node in section.get("properties", {}).items():
        if needs := _completeness(schema.resolve(node), schema):
            inner[name] = needs
    required = {"required": section["required"]} if "required" in section else {}
    return {**required, "properties": inner} if inner else required


def _require_in_lists_only(section: JsonSchema, schema: ConfigSchema) -> None:
    """A list replaces the base's as a whole, so that its items must be complete; a section may be a part."""
    for node in section.get("properties", {}).values():
        required = schema.resolve(node.get("items", {})).get("required")
        if required:
            node["items"] = {**node["items"], "required": required}


def _tidy(node: Any) -> None:
    """Explanations as one line, and no titles, which only repeat the key."""
    if isinstance(node, list):
        for inner in node:
            _tidy(inner)
    if not isinstance(node, dict):
        return
    if not isinstance(node.get("title", ""), dict):
        node.pop("title", None)
    if isinstance(node.get("description"), str):
        node["description"] = explanation(node)
    for key, inner in node.items():
        if key in ("properties", "$defs"):
            for field in inner.values():
                _tidy(field)
        elif key in ("items", "additionalProperties", "anyOf", "prefixItems"):
            _tidy(inner)


def _allow_short_forms(section: JsonSchema) -> None:
    """`forward_kl`, null, and `{name: alpha, alpha: 0.5}` beside `{name: alpha, params: {alpha: 0.5}}`."""
    parameter = section["properties"]["params"].get("additionalProperties", True)
    long = {**section, "additionalProperties": parameter}
    section.clear()
    section["anyOf"] = [{"type": "string"}, {"type": "null"}, long]
