"""Configurations as YAML: numbers as YAML 1.2 reads them, no repeated keys, and bounds for what a file may become."""

from __future__ import annotations

import re
from typing import Any

import yaml

# A configuration is a few KiB. Beyond these a file is another kind of file, or made to use up memory.
MAX_BYTES = 2**20
MAX_VALUES = 200_000
MAX_DEPTH = 50
_MAX_DIGITS = 100


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-6 is a number; yes, on, 12:30, 2026-01-01 are text. Repeated keys are errors.

    Merges (<<) cannot multiply either: from 6.0.4 on PyYAML takes each pair once.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            where = self.get_mark()
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", where)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            # Only the text of the key: it may be of a kind that cannot be hashed.
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise _error("a key must be text", key_node)
            if key_node.value in seen:
                raise _error(f"key {key_node.value!r} appears twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | str:
        # Longer ones stay text, which no setting takes for a number, so that the message is about the setting.
        return str(node.value) if len(node.value) > _MAX_DIGITS else self.construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_number)


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would not read back as text, on top of what other YAML readers would not."""


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _tag, _pattern, _first in (
    ("bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", re.compile("[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+"), "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("merge", re.compile("<<"), "<"),
):
    # PyYAML only matches at the start.
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))
    if _tag == "float":
        Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, list(_first))


def load(text: str) -> Any:
    """The tree of one document, in which an alias is a copy: an override of one place must not change the other.

    Raises yaml.YAMLError for what is no YAML, repeats a key, or is beyond the bounds of this module.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"more than {MAX_BYTES // 2**20} MiB, which no configuration has")
    return _Copy().of(yaml.load(text, Loader=Loader))


class _Copy:
    """Copies a tree and counts: ten lines of aliases of aliases would be a billion values."""

    def __init__(self) -> None:
        self._num_values = 0

    def of(self, tree: Any, depth: int = 0) -> Any:
        self._num_values += 1
        if depth > MAX_DEPTH:
            raise yaml.YAMLError("an alias holds itself")
        if self._num_values > MAX_VALUES:
            raise yaml.YAMLError(f"aliases make more than {MAX_VALUES:,} values of it")
        if isinstance(tree, dict):
            return {key: self.of(value, depth + 1) for key, value in tree.items()}
        return [self.of(value, depth + 1) for value in tree] if isinstance(tree, list) else tree


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
