"""What is wrong with a configuration: pydantic's errors as one line each, by what the schema wants there."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dphrl.algo.wording import MAX_TOLD, describe
from dphrl.config.schema import Config

Loc = tuple[str | int, ...]


class ConfigSchema:
    """Config's JSON schema, asked what belongs at a place."""

    def __init__(self) -> None:
        self.root = Config.model_json_schema()

    def resolve(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """Follow $ref, and X of an optional X."""
        options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
        if "anyOf" in node:
            return self.resolve(options[0])
        if "$ref" in node:
            return self.resolve(self.root["$defs"][node["$ref"].rsplit("/", 1)[1]])
        return dict(node)

    def at(self, loc: Loc) -> dict[str, Any] | None:
        """The unresolved schema at `loc`; None where the configuration has no such place."""
        node: dict[str, Any] = self.root
        for key in loc:
            inner = self.resolve(node)
            if isinstance(key, int):
                found = inner.get("items")
            else:
                found = inner.get("properties", {}).get(key) or inner.get("additionalProperties")
            if not isinstance(found, dict):
                return None
            node = found
        return node

    def is_text(self, node: Mapping[str, Any]) -> bool:
        return self.resolve(node).get("type") == "string"

    def keys(self, loc: Loc) -> list[str]:
        node = self.at(loc)
        return list(self.resolve(node).get("properties", {})) if node else []

    def places(self, node: Mapping[str, Any] | None = None, prefix: str = "") -> Iterator[str]:
        """The dotted path of every setting and section, lists left out."""
        for name, inner in self.resolve(node or self.root).get("properties", {}).items():
            yield prefix + name
            yield from self.places(inner, f"{prefix}{name}.")

    def places_of(self, key: str) -> list[str]:
        """Dotted paths whose last part is `key`."""
        return [place for place in self.places() if place.rpartition(".")[2] == key]

    def places_like(self, loc: Loc) -> list[str]:
        """Dotted paths that somebody may have meant by `loc`, which is none; the likeliest first."""
        *parent, key = loc
        if close := difflib.get_close_matches(str(key), self.keys(tuple(parent)), n=1):
            return [".".join(map(str, [*parent, close[0]]))]
        if exact := self.places_of(str(key)):
            return exact
        # Elsewhere only what differs by a letter or two: few names are alike by chance.
        names = {place.rpartition(".")[2] for place in self.places()}
        return [
            place
            for name in difflib.get_close_matches(str(key), sorted(names), n=2, cutoff=0.8)
            for place in self.places_of(name)
        ]

    def describe(self, node: Mapping[str, Any]) -> str:
        """What a value must be, e.g. "an integer >= 1 or null"."""
        return describe(node, self.resolve)


def show_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(loc: Loc, schema: ConfigSchema) -> str:
    if candidates := schema.places_like(loc):
        return f"unknown key; did you mean {' or '.join(candidates)}?"
    return f"unknown key; known here: {', '.join(schema.keys(loc[:-1]))}"


def explain_error(error: Mapping[str, Any], schema: ConfigSchema) -> str:
    """`field: what is wrong (got value); remedy` of one pydantic error."""
    loc: Loc = error["loc"]
    field = ".".join(map(str, loc))
    if error["type"] == "value_error":
        # Validators of whole sections word their own messages; a leading field name joins the section's.
        message = str(error["ctx"]["error"])
        first = re.match(r"\w+(?=[:=])", message)
        if field and first and first[0] in schema.keys(loc):
            return f"{field}.{message}"
        return f"{field}: {message}" if field else message
    if error["type"] == "extra_forbidden":
        return f"{field}: {unknown_key(loc, schema)}"
    node = schema.at(loc)
    wanted = schema.describe(node) if node else str(error["msg"])
    if error["type"].startswith("less_than") and (bound := max(error["ctx"].values())) >= MAX_TOLD:
        wanted = f"{wanted} and <= {int(bound) - (error['type'] == 'less_than'):,}"
    if error["type"] == "missing":
        return f"{field}: missing; add it: {wanted}"
    got = error["input"]
    choices = schema.resolve(node).get("enum", []) if node else []
    close = difflib.get_close_matches(str(got), choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if node and schema.is_text(node) and isinstance(got, int | float):
        hint = "; put it in quotes"
    return f"{field}: expected {wanted} (got {show_value(got)}){hint}"


def truth_for_number(tree: Any, schema: ConfigSchema, loc: Loc = ()) -> Iterator[str]:
    """A line for each true or false in a number's place: pydantic would read 1 or 0."""
    if isinstance(tree, bool):
        node = schema.at(loc)
        if node and schema.resolve(node).get("type") in ("integer", "number"):
            yield f"{'.'.join(map(str, loc))}: expected {schema.describe(node)} (got {show_value(tree)})"
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from truth_for_number(value, schema, (*loc, key))
