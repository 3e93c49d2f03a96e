"""What a JSON schema accepts, in plain words: "an integer >= 1 or null"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

JsonSchema = Mapping[str, Any]

_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
# A larger upper bound only keeps out slips of the keyboard; it is told to whoever exceeds it.
MAX_TOLD = 1_000
_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))


def without_null(node: JsonSchema) -> JsonSchema:
    """The schema X when `node` is an optional X, else `node` itself."""
    return next((option for option in node.get("anyOf", ()) if option.get("type") != "null"), node)


def describe(node: JsonSchema, resolve: Callable[[JsonSchema], JsonSchema] = without_null) -> str:
    """What a value must be, in words. `resolve` follows references and replaces an optional X by X."""
    optional = any(option.get("type") == "null" for option in node.get("anyOf", ()))
    inner = resolve(node)
    kind = inner.get("type")
    if "enum" in inner or "const" in inner:
        choices = inner.get("enum") or [inner["const"]]
        text = f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    elif kind == "array":
        text = f"a list, each item {describe(inner['items'], resolve)}" if inner.get("items") else "a list"
    elif kind == "object":
        keys = ", ".join(inner.get("properties", {}))
        text = f"a section with the keys {keys}" if keys else "a mapping of names to values"
    else:
        told = [(sign, inner[name]) for name, sign in _BOUNDS if inner.get(name, MAX_TOLD) < MAX_TOLD]
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in told)
        pattern = f"matching {inner['pattern']}" if "pattern" in inner else ""
        text = " ".join(filter(None, [_KINDS.get(str(kind), "another value"), bounds, pattern]))
    return f"{text} or null" if optional else text
