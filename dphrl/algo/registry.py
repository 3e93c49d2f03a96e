"""Methods by name: divergences, advantages and policy losses, those of this package and those of users.

A method is registered as a factory, whose keyword parameters are the method's parameters in the configuration:

    @register_advantage("above_quantile")
    def above_quantile(q: Annotated[float, Field(gt=0, lt=1)] = 0.5) -> AdvantageFn:
        '''The first line says in the list of methods what this one does.'''

The annotations decide which values are accepted. Nothing here needs torch: the module that registers this package's
own methods of a kind is imported only when a method of that kind is first asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from dphrl.algo.wording import describe, without_null

T = TypeVar("T")

# The short form in the configuration, {name: alpha, alpha: 0.5}, uses these keys, so no parameter may have their names.
RESERVED_PARAMETERS = ("name", "params")

_ANY = "any value"
_FACTORY = "register a factory, which takes the parameters and returns the method"


@dataclass(frozen=True)
class Parameter:
    """A method's parameter. wants: in words, which values it takes. default: has no meaning when `required`."""

    name: str
    adapter: TypeAdapter[Any]
    wants: str
    required: bool
    default: Any = None

    @property
    def about(self) -> str:
        """The description in its annotation, if it has one: what helps somebody who gave a wrong value."""
        text = self.adapter.json_schema().get("description", "") if self.wants != _ANY else ""
        return " ".join(text.split())

    def read(self, value: Any) -> Any:
        """A configuration's value as the factory receives it: text as a path, a list as a tuple, by the annotation.

        Raises ValidationError for a value that is not accepted.
        """
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):  # what only Python code can give
            return self.adapter.validate_python(value, strict=True)
        return self.adapter.validate_json(text, strict=True)

    def takes(self, value: Any) -> bool:
        """Whether the factory may have `value` as it is."""
        try:
            self.adapter.validate_python(value, strict=True)
        except ValidationError:
            return False
        return True

    def __str__(self) -> str:
        if self.required:
            return f"{self.name}: {self.wants}"
        default = self.adapter.dump_python(self.default, mode="json", fallback=repr)
        return f"{self.name}: {self.wants} (default {show(default)})"


@dataclass(frozen=True)
class Method(Generic[T]):
    """A registered factory, its parameters, and the first line of its docstring."""

    name: str
    factory: Callable[..., T]
    parameters: Mapping[str, Parameter]
    summary: str

    @property
    def takes(self) -> str:
        return ", ".join(map(str, self.parameters.values())) or "no parameters"


class Registry(Generic[T]):
    """The methods of one kind. kind: its name in messages. home: the module that registers this package's own methods.

    more: modules that register more of them. reserved: names that stand for no method, and what they mean in a
    configuration.
    """

    def __init__(
        self, kind: str, home: str, *, more: Sequence[str] = (), reserved: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.homes, self.reserved = kind, (home, *more), reserved or {}
        self._methods: dict[str, Method[T]] = {}
        # The home module's check of what a factory made, which needs torch: (label, method) to the method to be used.
        self.accept: Callable[[str, T], T] = lambda label, made: made

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that makes `factory(**params)` available to configurations under `name`.

        Raises ValueError when the name is taken, or the factory's parameters cannot be written in a configuration.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{self.kind}: a method is registered under a name; write the decorator as (...)('my_method')"
            )

        def register(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._methods or name in self.reserved:
                raise ValueError(f"{self.kind} {name!r} is already registered; choose another name")
            lines = (inspect.getdoc(factory) or "").splitlines()
            parameters = _parameters(factory, f"{self.kind} {name!r}")
            self._methods[name] = Method(name, factory, parameters, lines[0] if lines else "")
            return factory

        return register

    def methods(self) -> dict[str, Method[T]]:
        """Every method that is registered by now, sorted by name."""
        for home in self.homes:
            importlib.import_module(home)
        return dict(sorted(self._methods.items()))

    def restore(self, methods: Mapping[str, Method[T]]) -> list[Method[T]]:
        """Forget all but `methods`. Returns those that are forgotten."""
        forgotten = [method for name, method in self._methods.items() if name not in methods]
        self._methods = dict(methods)
        return forgotten

    def get(self, name: str) -> Method[T]:
        """The method `name`. Raises ValueError, which lists the known names, when it is not registered."""
        methods = self.methods()
        if name in methods:
            return methods[name]
        known = [*self.reserved, *methods]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(known)}{hint}")

    def check(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` as a configuration stores them, without defaults: values that a YAML file can hold.

        Raises ValueError for an unknown method, an unknown or missing parameter, or a value that is not accepted.
        """
        values = self._read(name, params)
        return {key: value if _is_plain(value) else params[key] for key, value in values.items()}

    def _read(self, name: str, params: Mapping[str, Any]) -> dict[str, Any]:
        method, label = self.get(name), f"{self.kind} {name!r}"
        for key in params:
            if key not in method.parameters:
                close = difflib.get_close_matches(key, method.parameters, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{label} has no parameter {key!r}; it takes {method.takes}{hint}")
        checked = {}
        for key, parameter in method.parameters.items():
            if key in params:
                try:
                    checked[key] = parameter.read(params[key])
                except ValidationError:
                    hint = f"; {parameter.about}" if parameter.about else ""
                    got = show(params[key])
                    raise ValueError(f"{label} takes {key}: {parameter.wants} (got {got}){hint}") from None
            elif parameter.required:
                hint = f"; if {key} is no setting, {_FACTORY}" if parameter.wants == _ANY else ""
                raise ValueError(f"{label} needs {key}: {parameter.wants}; write {{name: {name}, {key}: ...}}{hint}")
        return checked

    def build(self, name: str, params: Mapping[str, Any]) -> T:
        """The method itself. Raises ValueError as `check` does, and when the factory refuses or returns no function."""
        checked, label = self._read(name, params), f"{self.kind} {name!r}"
        try:
            made = self.get(name).factory(**checked)
        except ValueError as error:
            raise ValueError(f"{label}: {' '.join(str(error).split())}") from error
        # A factory is a user's code: whatever else it raises, the message is to say which one it was.
        except (Exception, SystemExit) as error:
            raise ValueError(f"{label}: its factory failed ({one_line(error)}); correct it, and {_FACTORY}") from error
        if not callable(made):
            remedy = "add the return" if made is None else _FACTORY
            raise ValueError(f"{label}: its factory returned {made!r}, not a function; {remedy}")
        return self.accept(label, made)


def one_line(error: BaseException) -> str:
    """The error's type and message: some messages have line breaks, and some are empty."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def show(value: Any) -> str:
    """`value` as a configuration would write it."""
    return json.dumps(value, ensure_ascii=False, default=repr)


def _is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _words(schema: Mapping[str, Any]) -> str:
    def resolve(node: Mapping[str, Any]) -> Mapping[str, Any]:
        node = without_null(node)
        reference = node.get("$ref")
        return resolve(schema["$defs"][reference.rpartition("/")[2]]) if reference else node

    return describe(schema, resolve)


def _parameters(factory: Callable[..., Any], label: str) -> dict[str, Parameter]:
    signature = inspect.signature(factory)
    given = {p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty}
    # Only the annotations of parameters are evaluated: the return type may be imported under TYPE_CHECKING alone.
    holder = type("holder", (), {"__annotations__": given})
    namespace = getattr(factory, "__globals__", None) or vars(sys.modules[factory.__module__])
    hints = get_type_hints(holder, globalns=namespace, include_extras=True)
    found = {}
    for parameter in signature.parameters.values():
        name, empty = parameter.name, inspect.Parameter.empty
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{label}: {parameter} cannot be given by name; list the parameters one by one")
        if name in RESERVED_PARAMETERS:
            raise ValueError(f"{label}: a parameter cannot be called {name!r}; choose another name")
        typed = parameter.annotation is not empty
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(
                hints[name] if typed else Any, config=ConfigDict(allow_inf_nan=False)
            )
            wants = _words(adapter.json_schema()) if typed else _ANY
        except PydanticUserError:
            raise ValueError(f"{label}: a configuration has no values for {parameter}; use plain types") from None
        required = parameter.default is empty
        found[name] = Parameter(name, adapter, wants, required, None if required else parameter.default)
        if not required and not found[name].takes(parameter.default):
            default = show(parameter.default)
            raise ValueError(f"{label}: the default of {name} is not {wants} (it is {default}); correct one of them")
    return found


_NO_DIVERGENCE = "No divergence and no reference stage: plain RL with verifiable rewards."

# The registries by their key below `algorithm` in the configuration. Each home module gives its methods their type.
METHODS: dict[str, Registry[Any]] = {
    "divergence": Registry(
        "divergence", "dphrl.algo.divergences", more=["dphrl.algo.methods.sft"], reserved={"none": _NO_DIVERGENCE}
    ),
    "advantage": Registry(
        "advantage",
        "dphrl.algo.advantages",
        more=[
            "dphrl.algo.methods.maxrl",
            "dphrl.algo.methods.pkpo",
            "dphrl.algo.methods.uniqueness",
            "dphrl.algo.methods.unlikeliness",
            "dphrl.algo.methods.w_reinforce",
        ],
    ),
    "policy_loss": Registry(
        "policy loss",
        "dphrl.algo.policy_losses",
        more=["dphrl.algo.methods.clip_cov", "dphrl.algo.methods.kl_cov"],
    ),
}


@contextmanager
def undone_on_failure() -> Iterator[None]:
    """What is registered inside is forgotten when an error leaves the block.

    Python forgets a module whose import failed, so that a second import runs it again and meets its own names.
    """
    before = {key: registry.methods() for key, registry in METHODS.items()}
    loaded = set(sys.modules)
    try:
        yield
    except BaseException:
        for key, registry in METHODS.items():
            for method in registry.restore(before[key]):
                # It may have come from a part of the plugin that was imported whole: a later import is to register it.
                if method.factory.__module__ not in loaded:
                    sys.modules.pop(method.factory.__module__, None)
        raise
