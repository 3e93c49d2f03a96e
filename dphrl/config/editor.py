"""The JSON schema of a configuration file: what editors complete, explain and check while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dphrl.algo.registry import METHODS, Method, Registry
from dphrl.config.algorithm import AlgorithmConfig, MethodConfig
from dphrl.config.errors import ConfigSchema
from dphrl.config.explain import explanation
from dphrl.config.loading import list_presets
from dphrl.config.schema import Config

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
    algorithm = root["$defs"][AlgorithmConfig.__name__]["properties"]
    for key, registry in METHODS.items():
        algorithm[key] = {**algorithm[key], **_method(registry)}
        del algorithm[key]["$ref"]
    del root["$defs"][MethodConfig.__name__]
    for name, info in Config.model_fields.items():
        # pydantic leaves out what a factory makes.
        if info.default_factory is not None:
            root["properties"][name]["default"] = info.get_default(call_default_factory=True).model_dump(mode="json")
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


def _method(registry: Registry[Any]) -> JsonSchema:
    """`forward_kl`, `{name: alpha, alpha: 0.5}`, and the same with `params`; another name may be a plugin's."""
    methods = registry.methods()
    names = [*registry.reserved, *methods]
    bare = [name for name in names if name not in methods or not any(_required(methods[name]))]
    other: JsonSchema = {"type": "string", "not": {"enum": names}}
    options: list[JsonSchema] = [{"enum": bare}, other]
    if "none" in registry.reserved:
        options += [{"type": "null"}, _mapping("none", registry.reserved["none"], {})]
    for method in methods.values():
        parameters = {name: found.adapter.json_schema() for name, found in method.parameters.items()}
        form = _mapping(method.name, method.summary, parameters)
        if required := list(_required(method)):
            form["anyOf"] = [
                {"required": required},
                {"properties": {"params": {"required": required}}, "required": ["params"]},
            ]
        options.append(form)
    # A part of what the base says, or a plugin's.
    part = {"type": "object", "properties": {"name": other, "params": {"type": "object"}}}
    return {"anyOf": [*options, part]}


def _mapping(name: str, summary: str, parameters: JsonSchema) -> JsonSchema:
    inside = {"type": "object", "properties": parameters, "additionalProperties": False}
    return {
        "type": "object",
        "description": summary,
        "properties": {"name": {"const": name}, **parameters, "params": inside},
        "required": ["name"],
        "additionalProperties": False,
    }


def _required(method: Method[Any]) -> Iterator[str]:
    return (name for name, parameter in method.parameters.items() if parameter.required)
