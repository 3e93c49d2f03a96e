"""What settings mean, for people: one of them, a section, or a whole configuration with comments."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dphrl.config.algorithm import MethodConfig
from dphrl.config.errors import ConfigSchema, Loc, show_value
from dphrl.config.loading import config_to_yaml
from dphrl.config.places import dotted, find_parameter, find_place
from dphrl.config.schema import Config

WIDTH = 100
_PROLOGUE = "Settings, as section.key; `dphrl config NAME` explains one, or lists those of a section."


def explain_setting(key: str) -> str:
    """What the setting or section `key` means, what it may be, and its default; of "" all sections.

    Raises ConfigError, one line with what may have been meant, for an unknown key.
    """
    schema = ConfigSchema()
    key = key.strip(" .")
    if not key:
        return f"{_PROLOGUE}\n\n{_list_settings(schema, schema.root)}"
    loc = find_place(key, schema)
    if parameters := find_parameter(loc):
        return "\n".join([f"{dotted(loc)}: a parameter\n", *(f"{name} takes {takes}" for name, takes in parameters)])
    # In a mapping with free keys there is nothing to explain but the mapping.
    while schema.at(loc) is None:
        loc = loc[:-1]
    node = schema.at(loc) or {}
    inner = schema.resolve(node)
    items = schema.resolve(inner.get("items", {}))
    default = _default(loc, schema)
    settings = {} if _is_method(node) else inner if "properties" in inner else items
    if _is_method(node):
        kind = "NAME, or {name: NAME, PARAMETER: VALUE}; `dphrl presets --algorithms` lists them"
    elif "properties" in inner:
        kind, default = "a section", ""
    else:
        kind = "a list of sections" if "properties" in items else schema.describe(node)
    parts = [f"{dotted(loc)}: {kind}{f'; {default}' if default else ''}"]
    if text := explanation(node):
        parts.append(_wrapped(text))
    if "properties" in settings:
        parts.append(_list_settings(schema, settings))
    return "\n\n".join(parts)


def explained_yaml(config: Config) -> str:
    """As `config_to_yaml`, and above each setting what it means, as comments.

    Each section is explained once: the items of a list are like the section of their kind.
    """
    text = config_to_yaml(config)
    schema = ConfigSchema()
    comments: dict[int, list[str]] = {}
    for line, column, node in _keys(yaml.compose(text, Loader=yaml.SafeLoader), schema.root, schema):
        indent = " " * column
        comments[line] = [""] if line and not column else []
        if words := explanation(node):
            comments[line] += _wrapped(words, f"{indent}# ").splitlines()
        if "enum" in (inner := schema.resolve(node)):
            comments[line] += _wrapped(f"One of {', '.join(map(str, inner['enum']))}.", f"{indent}# ").splitlines()
    lines = [line for n, setting in enumerate(text.splitlines()) for line in (*comments.get(n, ()), setting)]
    return "\n".join(lines) + "\n"


def explanation(node: Mapping[str, Any]) -> str:
    """A field's documentation as one paragraph; empty where the source of the package is not installed."""
    return " ".join(str(node.get("description", "")).split())


def _keys(
    tree: yaml.Node | None, node: Mapping[str, Any], schema: ConfigSchema
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line, column, schema) of every setting, from 0."""
    if not isinstance(tree, yaml.MappingNode):
        return
    fields = schema.resolve(node).get("properties", {})
    for key, value in tree.value:
        if found := fields.get(key.value):
            yield key.start_mark.line, key.start_mark.column, found
            yield from _keys(value, found, schema)


def _default(loc: Loc, schema: ConfigSchema) -> str:
    """`default X`, or that there is none; nothing for an item of a list or a mapping."""
    parent = schema.resolve(schema.at(loc[:-1]) or {})
    node = parent.get("properties", {}).get(loc[-1])
    if node is None:
        return ""
    if loc[-1] in parent.get("required", ()):
        return "must be given"
    return f"default {_shown(node)}"


def _is_method(node: Mapping[str, Any]) -> bool:
    return str(node.get("$ref")).endswith(f"/{MethodConfig.__name__}")


def _shown(node: Mapping[str, Any]) -> str:
    """The default; of a mapping that a factory makes pydantic does not tell, and it is empty."""
    value = node.get("default", {})
    if _is_method(node):
        value = value["name"]
    return value if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else show_value(value)


def _list_settings(schema: ConfigSchema, section: Mapping[str, Any]) -> str:
    rows = []
    for name, node in section["properties"].items():
        if "properties" in schema.resolve(node) and not _is_method(node):
            value = "section"
        else:
            value = "required" if name in section.get("required", ()) else _shown(node)
        first = re.match(r".*?[.!?](?=\s|$)", explanation(node))
        rows.append((name, value, first[0] if first else ""))
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {name:<{names}}  {value:<{values}}  {text}".rstrip() for name, value, text in rows)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        *(text, WIDTH), initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
