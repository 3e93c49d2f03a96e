"""From a YAML file or preset and `key=value` overrides to a validated Config.

Layers are merged from the bottom up: the `base:` chain, the file itself, the overrides. Every problem becomes
one line that names where it was written, the field, the value and the remedy.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dphrl.algo.registry import METHODS, RESERVED_PARAMETERS
from dphrl.config import yaml_text
from dphrl.config.algorithm import one_form
from dphrl.config.errors import ConfigSchema, Loc, explain_error, show_value, truth_for_number
from dphrl.config.schema import Config
from dphrl.config.secrets import secret_settings
from dphrl.durable import write_whole

YAML_SUFFIXES = (".yaml", ".yml")
COMMAND_LINE = "command line"
METHOD_PLACES = [("algorithm", key) for key in METHODS]


class InputError(ValueError):
    """Something the user gave is wrong. The command line reports it line by line and exits with status 2."""

    def __init__(self, *lines: str) -> None:
        # args are the lines themselves, so that the exception survives pickling between processes.
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ConfigError(InputError):
    """One or more problems with a configuration, one line each in `lines`."""


# ------------------------------------------------------------ reading YAML


def parse_yaml(text: str, label: str) -> Any:
    """Raises ConfigError as `label:line: what`."""
    try:
        return yaml_text.load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        reason = error.problem or error.context or "cannot be parsed"
        raise ConfigError(f"{where}: not valid YAML: {reason}; correct this line or the one above") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        merged_into_itself = isinstance(error, RecursionError)
        reason = "an alias holds itself" if merged_into_itself else " ".join(str(error).split())[:120]
        raise ConfigError(f"{label}: not valid YAML: {reason}; correct the file") from None


# ------------------------------------------------------------ presets and files


def list_presets() -> dict[str, str]:
    """Every preset's name and YAML text, sorted; a name holds a slash where presets lie in a folder."""

    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                yield prefix + entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")

    return dict(sorted(walk(resources.files("dphrl").joinpath("presets"), "")))


@dataclass(frozen=True)
class _Layer:
    """One place settings come from: `label` names it in messages, `key` tells a cycle of bases."""

    label: str
    key: str
    tree: dict[str, Any]
    folder: Path | None


def _read_source(source: str, relative_to: Path | None = None) -> _Layer:
    presets = list_presets()
    path = (relative_to or Path()) / Path(os.path.expandvars(source)).expanduser()
    if source in presets:
        label, text, key, folder = source, presets[source], f"preset {source}", None
    elif path.is_file():
        label, key, folder = str(path), str(path.resolve()), path.parent
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(yaml_text.MAX_BYTES + 1)  # enough to see that it is too much
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{label}: cannot be read as UTF-8 text: {error}; name a YAML file") from None
    else:
        raise ConfigError(_no_such_source(source, path, presets))
    tree = parse_yaml(text, label)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{label}: expected keys and values at the top level (got {show_value(tree)}); see a preset")
    return _Layer(label, key, tree, folder)


def _no_such_source(source: str, path: Path, presets: Mapping[str, str]) -> str:
    if path.is_dir():
        return f"{source}: is a folder; name a YAML file or a preset (`dphrl presets` lists them)"
    is_file_name = path.suffix in YAML_SUFFIXES
    what = "no such file" if is_file_name else "no such preset or file"
    close = difflib.get_close_matches(source.removesuffix(path.suffix) if is_file_name else source, presets, n=1)
    hint = f"did you mean the preset {close[0]}? " if close else ""
    # Those of the paper are many, and whoever looks for one knows its name.
    short = [name for name in presets if "/" not in name]
    return f"{source}: {what}; {hint}presets: {', '.join(short)}, and more (`dphrl presets` lists them)"


def _read_layers(source: str) -> list[_Layer]:
    """The `base:` chain of `source`, the deepest base first."""
    layers = [_read_source(source)]
    while (base := layers[0].tree.pop("base", None)) is not None:
        child = layers[0]
        if not isinstance(base, str):
            raise ConfigError(f"{child.label}: base: expected a preset's name or a YAML path (got {show_value(base)})")
        try:
            layer = _read_source(base, child.folder)
        except ConfigError as error:
            raise ConfigError(*(f"{child.label}: base: {line}" for line in error.lines)) from None
        chain = [layer, *layers]
        if any(layer.key == known.key for known in layers):
            names = " -> ".join(entry.label for entry in reversed(chain))
            raise ConfigError(f"{source}: base: the files inherit in a circle ({names}); remove one base")
        layers = chain
    return layers


def _merged(below: Any, above: Any, loc: Loc = ()) -> Any:
    """Mappings merge key by key, anything else replaces; so does a named method, with its parameters."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if loc in METHOD_PLACES and "name" in above:
        return above
    both = {key: _merged(below[key], value, (*loc, key)) if key in below else value for key, value in above.items()}
    return {**below, **both}


def _methods_in_one_form(tree: Any, loc: Loc = ()) -> Any:
    """A copy of the tree of a layer, which begins at `loc` of the configuration."""
    if not isinstance(tree, dict):
        return tree
    if loc in METHOD_PLACES:
        return one_form(tree)
    above = [place[: len(loc)] for place in METHOD_PLACES]
    return {key: _methods_in_one_form(value, (*loc, key)) for key, value in tree.items()} if loc in above else tree


# ------------------------------------------------------------ overrides


def parse_override(text: str, schema: ConfigSchema) -> tuple[Loc, Any]:
    """`a.b.c=value` as (path, value), the value read as YAML. Raises ConfigError."""
    dotted, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"{COMMAND_LINE}: {show_value(text)} has no '='; write an override as section.key=value")
    keys = [key.strip() for key in dotted.split(".")]
    if not all(keys):
        raise ConfigError(f"{COMMAND_LINE}: {show_value(text)} has an empty key; write section.key=value")
    loc = tuple(int(key) if key.isdigit() else key for key in keys)
    node = schema.at(loc)
    # For a text field the words on the command line are the value: run_name=2026, data.system_prompt=
    # (empty). What YAML reads as text, quotes included, stays as YAML reads it.
    try:
        value = parse_yaml(raw, f"{COMMAND_LINE}: {dotted}")
    except ConfigError:
        if not (node and schema.is_text(node)):
            reason = f"the value is not valid YAML (got {show_value(raw)}); quote it: '{dotted}=\"...\"'"
            raise ConfigError(f"{COMMAND_LINE}: {dotted}: {reason}") from None
        value = raw
    if node and schema.is_text(node) and not isinstance(value, str) and (value is not None or not raw.strip()):
        value = raw.strip()
    return loc, value


def _apply_override(tree: dict[str, Any], loc: Loc, value: Any) -> None:
    value, here = _methods_in_one_form(value, loc), tree
    parameter = loc[:2] in METHOD_PLACES and len(loc) > 2 and loc[2] not in RESERVED_PARAMETERS
    # A method that is a bare name has no parameters; the message about that is to show the key as it was written.
    if parameter and not (_holds(tree, loc[:2]) and isinstance(tree[str(loc[0])][str(loc[1])], str)):
        loc = (*loc[:2], "params", *loc[2:])
    for i, part in enumerate(loc):
        key: Any = part if isinstance(here, list) else str(part)
        where = ".".join(map(str, loc[:i]))
        if isinstance(here, list) and not (isinstance(key, int) and key < len(here)):
            wanted = f"write {where}.0 to {where}.{len(here) - 1}" if here else f"set {where}=[...] as a whole"
            raise ConfigError(f"{COMMAND_LINE}: {where}: a list of {len(here)} has no item {key}; {wanted}")
        if not isinstance(here, dict | list):
            raise ConfigError(
                f"{COMMAND_LINE}: {'.'.join(map(str, loc))}: {where} is a value, not a section "
                f"(got {show_value(here)}); set it as a whole: {where}={{...}}"
            )
        if i == len(loc) - 1:
            here[key] = value
            return
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]


def _holds(tree: Any, loc: Loc) -> bool:
    for key in loc:
        in_list = isinstance(tree, list) and isinstance(key, int) and key < len(tree)
        if not in_list and not (isinstance(tree, dict) and key in tree):
            return False
        tree = tree[key]
    return True


def _origin(line: str, layers: Sequence[_Layer], overridden: Sequence[Loc]) -> str:
    """Where the field that `line` starts with was written; if nowhere, what was asked to be loaded."""
    match = re.match(r"[\w.]+", line)
    loc = tuple(int(key) if key.isdigit() else key for key in match[0].split(".")) if match else ()
    if any(loc[: len(path)] == path for path in overridden):
        return COMMAND_LINE
    for layer in reversed(layers):
        if _holds(layer.tree, loc):
            return layer.label
    within = any(path[: len(loc)] == loc for path in overridden)
    return COMMAND_LINE if within else layers[-1].label


# ------------------------------------------------------------ entry points


def load_config(source: str, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """The configuration of `source` (a YAML path or a preset's name) with `a.b.c=value` overrides applied.

    stored: `source` is what a run wrote, in which it is too late to look for secrets.
    Raises ConfigError, whose `lines` name every problem found: file:line or source, field, value, remedy.
    """
    layers = _read_layers(source)
    schema = ConfigSchema()
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merged(tree, _methods_in_one_form(layer.tree))
    # A private copy, so that an override into a list or section does not reach into a layer.
    tree = copy.deepcopy(tree)
    lines: list[str] = []
    overridden: list[Loc] = []
    for text in overrides:
        try:
            loc, value = parse_override(text, schema)
            _apply_override(tree, loc, value)
            overridden.append(loc)
        except ConfigError as error:
            lines.extend(error.lines)

    found = [*truth_for_number(tree, schema), *(() if stored else secret_settings(tree))]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found.extend(explain_error(item, schema) for item in error.errors())
    lines.extend(f"{_origin(line, layers, overridden)}: {line}" for line in found)
    if lines:
        raise ConfigError(*lines)
    return config


def config_to_yaml(config: Config) -> str:
    """Every resolved setting as YAML that load_config reads back to an equal Config."""
    settings = config.model_dump(mode="json")
    return yaml.dump(settings, Dumper=yaml_text.Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_config(config: Config, path: Path) -> None:
    """Write `config_to_yaml` to `path`, whole or not at all."""
    head = f"# Every setting of run {show_value(config.run_name)}, defaults included.\n"
    write_whole(path, head + config_to_yaml(config))
