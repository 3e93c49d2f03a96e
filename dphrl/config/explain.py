"""What settings mean, for people: one of them, a section, or a whole configuration with comments."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError, create_model

from dphrl.config.errors import ConfigSchema, Loc, explain_error, show_value, truth_for_number, unknown_key
from dphrl.config.loading import ConfigError, config_to_yaml, parse_override
from dphrl.config.schema import Config
from dphrl.config.section import Section

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
    loc = _place(key, schema)
    node = schema.at(loc)
    assert node is not None
    inner = schema.resolve(node)
    items = schema.resolve(inner["items"]) if "items" in inner else {}
    settings = inner if "properties" in inner else items
    if "properties" in inner:
        kind = "a section"
    elif "properties" in items:
        kind = "a list of sections"
    else:
        kind = schema.describe(node)
    name = ".".join(map(str, loc))
    default = _default(loc, schema)
    parts = [f"{name}: {kind}{f'; {default}' if default and kind != 'a section' else ''}"]
    if text := explanation(node):
        parts.append(_wrapped(text))
    if "properties" in settings:
        parts.append(_list_settings(schema, settings))
    return "\n\n".join(parts)


def check_setting(text: str) -> str:
    """A line that says that `key=value` can be set. Raises ConfigError, one line, where it cannot.

    The section alone is looked at, with every other setting at its default: nothing is loaded for it.
    """
    schema = ConfigSchema()
    given, value = parse_override(text, schema)
    # An item of a list stands for all of them.
    loc = schema.spelled_out(tuple(0 if isinstance(part, int) else part for part in given))
    section, tree = str(loc[0]), value
    for part in reversed(loc[1:]):
        tree = [tree] if part == 0 else {part: tree}
    info = Config.model_fields[section]
    alone = create_model("Alone", __base__=Section, **{section: (info.annotation, info)})  # type: ignore[call-overload]
    lines = list(truth_for_number({section: tree}, schema))
    try:
        alone.model_validate({section: tree})
    except ValidationError as error:
        # What else the section needs is not the matter of this one setting.
        lines.extend(explain_error(item, schema) for item in error.errors() if item["type"] != "missing")
    name = ".".join(map(str, loc))
    lines = [line.replace(name, ".".join(map(str, given)), 1) for line in lines]
    if lines:
        raise ConfigError(*lines)
    return f"{text} can be set; `dphrl plan CONFIG '{text}'` checks it together with the rest"


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


def _place(key: str, schema: ConfigSchema) -> Loc:
    """Where `key` is. Of a list of sections the index may be left out."""
    parts = key.split(".")
    loc: Loc = ()
    for i, part in enumerate(parts):
        if not part.isdigit() and "items" in schema.resolve(schema.at(loc) or {}):
            loc = (*loc, 0)
        loc = (*loc, int(part) if part.isdigit() else part)
        if schema.at(loc) is None:
            # The rest tells what is meant as well as the wrong part does.
            raise ConfigError(f"{key}: {_not_there(loc, parts[i + 1 :], schema)}")
    return loc


def _not_there(loc: Loc, rest: list[str], schema: ConfigSchema) -> str:
    close = [".".join([place, *rest]) for place in schema.places_like(loc)]
    whole = [place for place in close if place in set(schema.places())] if rest else []
    whole = whole or (schema.places_of(rest[-1]) if rest else [])
    if whole:
        return f"unknown key; did you mean {' or '.join(whole)}?"
    inner = schema.resolve(schema.at(loc[:-1]) or {})
    if "properties" not in inner:
        return f"unknown key; {'.'.join(map(str, loc[:-1]))} is {schema.describe(inner)}, not a section"
    return unknown_key(loc, schema)


def _default(loc: Loc, schema: ConfigSchema) -> str:
    """`default X`, or that there is none; nothing for an item of a list or a mapping."""
    parent = schema.resolve(schema.at(loc[:-1]) or {})
    node = parent.get("properties", {}).get(loc[-1])
    if node is None:
        return ""
    if loc[-1] in parent.get("required", ()):
        return "must be given"
    # Of a mapping that a factory makes, pydantic does not tell.
    return f"default {_shown(node.get('default', {}))}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) else show_value(value)


def _list_settings(schema: ConfigSchema, section: Mapping[str, Any]) -> str:
    rows = []
    for name, node in section["properties"].items():
        inner = schema.resolve(node)
        required = name in section.get("required", ())
        value = "section" if "properties" in inner else "required" if required else _shown(node.get("default", {}))
        first = re.match(r".*?[.!?](?=\s|$)", explanation(node))
        rows.append((name, value, first[0] if first else ""))
    names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {name:<{names}}  {value:<{values}}  {text}".rstrip() for name, value, text in rows)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        *(text, WIDTH), initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
