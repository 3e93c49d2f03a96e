"""Where settings are: a key as people write it, found in the configuration's sections."""

from __future__ import annotations

from typing import get_args

from pydantic.fields import FieldInfo

from dphrl.algo.registry import METHODS, Parameter
from dphrl.config.algorithm import MethodConfig
from dphrl.config.errors import ConfigSchema, Loc, unknown_key
from dphrl.config.loading import METHOD_PLACES, ConfigError
from dphrl.config.schema import Config
from dphrl.config.section import Section


def dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


def find_place(key: str, schema: ConfigSchema) -> Loc:
    """Where `key` is. Of a list of sections the index may be left out, and the keys of some mappings are free.

    Raises ConfigError, one line with what may have been meant, for a key that is nowhere.
    """
    parts = key.split(".")
    loc: Loc = ()
    for i, part in enumerate(parts):
        inner = schema.resolve(schema.at(loc) or {})
        if not part.isdigit() and "items" in inner:
            loc = (*loc, 0)
        if inner.get("additionalProperties") is True or (loc in METHOD_PLACES and part not in inner["properties"]):
            return (*loc, *parts[i:])
        loc = (*loc, int(part) if part.isdigit() else part)
        if schema.at(loc) is None:
            raise ConfigError(f"{key}: {_not_there(loc, parts[i + 1 :], schema)}")
    return loc


def _not_there(loc: Loc, rest: list[str], schema: ConfigSchema) -> str:
    places = set(schema.places())
    # The rest tells what is meant as well as the wrong part does.
    whole = [place for like in schema.places_like(loc) if (place := ".".join([like, *rest])) in places]
    if rest and (whole := whole or schema.places_of(rest[-1])):
        return f"unknown key; did you mean {' or '.join(whole)}?"
    inner = schema.resolve(schema.at(loc[:-1]) or {})
    if "properties" not in inner:
        return f"unknown key; {dotted(loc[:-1])} is {schema.describe(inner)}, not a section"
    return unknown_key(loc, schema)


def find_field(loc: Loc) -> tuple[type[Section], Loc, FieldInfo]:
    """The innermost section's field that `loc` is or lies in: its section, its place, and what it takes."""
    section: type[Section] = Config
    for i, part in enumerate(loc):
        if isinstance(part, int):
            continue
        place, info = loc[: i + 1], section.model_fields[part]
        kinds = [info.annotation, *get_args(info.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None or inner is MethodConfig or all(isinstance(part, int) for part in loc[i + 1 :]):
            break
        section = inner
    return section, place, info


def find_parameter(loc: Loc) -> list[tuple[str, Parameter]]:
    """The methods that take the parameter that `loc` names, and what each takes; none where `loc` names no parameter.

    Raises ConfigError for a parameter that no method takes.
    """
    place, names = loc[:2], [part for part in loc[2:] if part != "params"]
    if place not in METHOD_PLACES or names in ([], ["name"]):
        return []
    methods = METHODS[str(place[1])].methods().values()
    found = [
        (method.name, parameter)
        for method in methods
        for name, parameter in method.parameters.items()
        if names == [name]
    ]
    if not found:
        known = sorted({name for method in methods for name in method.parameters})
        hint = f"known here: {', '.join(known)}" if known else "they have none"
        raise ConfigError(f"{dotted(loc)}: no method that comes with dphrl has this parameter; {hint}")
    return found
