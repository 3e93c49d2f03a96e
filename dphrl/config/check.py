"""Whether a value fits one setting, without the rest of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, create_model

from dphrl.algo.registry import Parameter
from dphrl.config.algorithm import AlgorithmConfig
from dphrl.config.errors import ConfigSchema, Loc, explain_error, show_value, truth_for_number
from dphrl.config.loading import ConfigError, parse_override
from dphrl.config.places import dotted, find_field, find_parameter, find_place
from dphrl.config.section import Section


def check_setting(text: str) -> str:
    """A line that says that the value of `key=value` fits. Raises ConfigError if not, a line for each reason.

    How settings go together is another matter, and depends on the configuration.
    """
    schema = ConfigSchema()
    key, _, raw = text.partition("=")
    place = find_place(key.strip(), schema) if key.strip() else ()
    text = f"{dotted(place)}={raw}"
    loc, value = parse_override(text, schema)
    lines: list[str] = []
    if parameters := [parameter for _, parameter in find_parameter(loc)]:
        if not any(_accepts(parameter, value) for parameter in parameters):
            wants = " or ".join(dict.fromkeys(parameter.wants for parameter in parameters))
            lines.append(f"{dotted(loc)}: expected {wants} (got {show_value(value)})")
    else:
        lines.extend(_refusals(loc, value, schema))
    if lines:
        raise ConfigError(*lines)
    return f"{text} fits this setting; `dphrl plan CONFIG '{text}'` checks it together with the others"


def _accepts(parameter: Parameter, value: Any) -> bool:
    try:
        parameter.read(value)
    except ValidationError:
        return False
    return True


def _refusals(loc: Loc, value: Any, schema: ConfigSchema) -> list[str]:
    """What the field at `loc`, or the one that it lies in, has against `value`."""
    section, place, info = find_field(loc)
    # An item of a list stands for all of them, whichever was named.
    alone: Loc = tuple(0 if isinstance(part, int) else part for part in loc)
    for part in reversed(alone[len(place) :]):
        value = [value] if part == 0 else {part: value}
    name = str(place[-1])
    fields: dict[str, Any] = {name: (info.annotation, info)}
    if section is AlgorithmConfig and name != "plugins":
        # Methods are looked up when it is known that the user's modules have registered theirs.
        fields = {"plugins": (tuple[str, ...], ()), **fields}
    probe = create_model("Probe", __base__=Section, **fields)
    above = alone[: len(place) - 1]
    lines = list(truth_for_number(value, schema, (*above, name)))
    try:
        probe.model_validate({name: value})
    except ValidationError as error:
        lines.extend(explain_error({**item, "loc": (*above, *item["loc"])}, schema) for item in error.errors())
    return [line.replace(dotted(alone), dotted(loc), 1) for line in lines]
