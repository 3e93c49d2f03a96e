"""Methods by name: what can be registered, what a configuration accepts, what an update makes of them."""

from __future__ import annotations

import datetime
import json
import math
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.algo.advantages import get_advantage, group_advantages, overlong_penalty, register_advantage
from dphrl.algo.divergences import Divergence, get_divergence, register_divergence
from dphrl.algo.losses import DivergenceTerm, hybrid_loss
from dphrl.algo.policy_losses import (
    PolicyLossSettings,
    PolicyTokens,
    get_policy_loss,
    importance,
    register_policy_loss,
    sequence_log_ratio,
)
from dphrl.algo.reduce import row_weights
from dphrl.algo.registry import METHODS, Registry
from dphrl.batch import make_batch
from dphrl.config.algorithm import import_plugins
from dphrl.config.check import check_setting
from dphrl.config.loading import ConfigError, config_to_yaml, load_config
from dphrl.learner.update import UpdateSettings, run_update
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, RolloutGroup

SETTINGS = PolicyLossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0, importance_cap=2.0)


BUILTIN = {key: registry.methods() for key, registry in METHODS.items()}


def forget_user_methods() -> None:
    """As in a process that has not met the user's module."""
    sys.modules.pop("user_methods", None)
    for key, registry in METHODS.items():
        registry._methods = dict(BUILTIN[key])


@pytest.fixture(autouse=True)
def only_builtin_methods() -> Iterator[None]:
    """Whatever other tests have registered in this process."""
    forget_user_methods()
    yield
    forget_user_methods()


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that registers one method of each kind."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "user_methods"


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(ratios: list[float], advantages: list[float], **given: torch.Tensor) -> PolicyTokens:
    """One token a completion, of weight 1, sampled by the learner itself, unless given otherwise."""
    old = double(*[-2.0] * len(ratios))
    inputs = {
        "logprobs_N": (old + double(*map(math.log, ratios))).requires_grad_(),
        "old_logprobs_N": old,
        "rollout_logprobs_N": old,
        "advantages_N": double(*advantages),
        "weights_N": torch.ones_like(old),
        "row_index_N": torch.arange(len(ratios)),
    }
    return PolicyTokens(**inputs | given)


# ------------------------------------------------------------ registering


def refused(registry: Registry[Any], name: Any, factory: Any) -> str:
    with pytest.raises(ValueError, match=r"method") as caught:
        registry.register(name)(factory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("register", "taken"),
    [(register_divergence, "js"), (register_advantage, "mean_only"), (register_policy_loss, "clipped")],
)
def test_a_taken_name_is_refused(register: Any, taken: str) -> None:
    with pytest.raises(ValueError, match=rf"{taken}' is already registered; choose another name"):
        register(taken)(lambda: print)


def test_a_factory_that_no_configuration_can_call_is_refused() -> None:
    registry: Registry[Any] = Registry("method", "math", reserved={"none": "nothing"})
    assert "'none' is already registered" in refused(registry, "none", lambda: print)
    assert "'m': *rest cannot be given by name" in refused(registry, "m", lambda *rest: print)
    assert "'m': **rest cannot be given by name" in refused(registry, "m", lambda **rest: print)
    assert "cannot be called 'name'" in refused(registry, "m", lambda name: print)
    assert "cannot be called 'params'" in refused(registry, "m", lambda params: print)

    def odd(x: torch.Tensor) -> Any: ...

    assert "a configuration has no values for x: 'torch.Tensor'" in refused(registry, "m", odd)
    assert "write the decorator as (...)('my_method')" in refused(registry, odd, odd)
    assert registry.methods() == {}


def test_a_default_that_its_own_annotation_refuses_is_told_when_the_method_is_registered() -> None:
    registry: Registry[Any] = Registry("method", "math")

    def far(q: Annotated[float, Field(gt=0, lt=1)] = 1.5) -> Any: ...
    def nothing(q: float = None) -> Any: ...  # type: ignore[assignment]  # noqa: RUF013
    def truth(times: int = True) -> Any: ...
    def good(a: float = 1, b: int | None = None, c: Annotated[float, Field(gt=0)] = 2.0, d=object) -> Any: ...

    assert refused(registry, "m", far) == (
        "method 'm': the default of q is not a number > 0 and < 1 (it is 1.5); correct one of them"
    )
    assert "'m': the default of q is not a number (it is null)" in refused(registry, "m", nothing)
    assert "'m': the default of times is not an integer (it is true)" in refused(registry, "m", truth)
    assert registry.methods() == {}
    registry.register("m")(good)


def test_a_factory_may_be_a_class_and_leave_types_out() -> None:
    registry: Registry[Any] = Registry("method", "math")

    @registry.register("m")
    class Added:
        """Adds."""

        def __init__(self, to, more: int = 2) -> None:
            self.to, self.more = to, more

        def __call__(self, value: float) -> float:
            return value + self.to + self.more

    assert registry.build("m", {"to": 1})(10.0) == 13.0
    assert registry.get("m").takes == "to: any value, more: an integer (default 2)"
    assert registry.get("m").summary == "Adds."


def test_a_factory_that_forgets_its_return_is_named() -> None:
    registry: Registry[Any] = Registry("method", "math")
    registry.register("m")(lambda: None)
    with pytest.raises(ValueError, match=r"method 'm': its factory returned None, not a function; add the return"):
        registry.build("m", {})


def test_whatever_a_factory_raises_is_one_line_that_names_it() -> None:
    def failing(error: BaseException) -> Any:
        def factory() -> None:
            raise error

        return factory

    for i, (error, words) in enumerate(
        {
            ValueError("two\nlines"): "two lines",
            TypeError("'int' object\nis not iterable"): r".*failed \(TypeError: 'int' object is not iterable\); .*",
            KeyError("x"): r".*failed \(KeyError: 'x'\); .*",
            ZeroDivisionError(): r".*failed \(ZeroDivisionError\); correct it, and register a factory, which .*",
            SystemExit(0): r".*failed \(SystemExit: 0\); .*",
        }.items()
    ):
        register_advantage(f"bad{i}")(failing(error))
        with pytest.raises(ConfigError) as caught:
            load_config("demo-math", [f"algorithm.advantage=bad{i}"])
        (line,) = caught.value.lines
        assert re.fullmatch(rf"command line: algorithm.advantage: advantage 'bad{i}': {words}", line)


def test_a_method_in_place_of_its_factory_gets_a_hint() -> None:
    hint = "register a factory, which takes the parameters and returns the method$"
    register_advantage("bare")(lambda scores: [0.0 for _ in scores])
    with pytest.raises(ValueError, match=rf"'bare' needs scores: any value; .*; if scores is no setting, {hint}"):
        get_advantage("bare")
    with pytest.raises(ValueError, match=rf"TypeError: 'int' object is not iterable\); .*{hint}"):
        get_advantage("bare", scores=3)
    with pytest.raises(ValueError, match=rf"its factory returned \[0.0\], not a function; {hint}"):
        get_advantage("bare", scores=[3])


@pytest.mark.parametrize("get", [get_divergence, get_advantage, get_policy_loss])
def test_an_unknown_name_lists_the_known_ones(get: Any) -> None:
    with pytest.raises(ValueError, match=r"^unknown (divergence|advantage|policy loss) 'zzz'; known: \w+, \w+[^;]*$"):
        get("zzz")


# ------------------------------------------------------------ in the configuration

CL = "command line: algorithm."
MISTAKES = {
    "divergence=scaled-kl": "divergence: unknown divergence 'scaled-kl'; known: none, alpha, chi_square, forward_kl, "
    "js, reverse_kl, scaled_kl, sft, squared_hellinger, total_variation; did you mean scaled_kl?",
    "divergence={name: scaled_kl, scael: 2}": "divergence: divergence 'scaled_kl' has no parameter 'scael'; it takes "
    "scale: a number > 0 and <= 8 (default 1.0); did you mean scale?",
    "divergence={name: scaled_kl, scale: 9}": "divergence: divergence 'scaled_kl' takes scale: a number > 0 and <= 8 "
    "(got 9)",
    "divergence={name: scaled_kl, scale: true}": "divergence: divergence 'scaled_kl' takes scale: a number > 0 and "
    "<= 8 (got true)",
    "divergence={name: scaled_kl, scale: .nan}": "divergence: divergence 'scaled_kl' takes scale: a number > 0 and "
    "<= 8 (got NaN)",
    "divergence={name: alpha, alpha: 2}": "divergence: divergence 'alpha' takes alpha: a number > 0 and < 1 (got 2); "
    "its limits are forward_kl (alpha -> 1) and reverse_kl (alpha -> 0)",
    "divergence={name: js, alpha: 1}": "divergence: divergence 'js' has no parameter 'alpha'; it takes no parameters",
    "divergence={name: none, alpha: 1}": "divergence: divergence 'none' has no parameters; remove alpha",
    "advantage=mean-only": "advantage: unknown advantage 'mean-only'; known: above, group_normalized, leave_one_out, "
    "maxrl, mean_only, pkpo, uniqueness, unlikeliness, w_reinforce; did you mean mean_only?",
    "advantage=none": "advantage: unknown advantage 'none'; known: above, group_normalized, leave_one_out, maxrl, "
    "mean_only, pkpo, uniqueness, unlikeliness, w_reinforce",
    "advantage=above": "advantage: advantage 'above' needs threshold: a number; write {name: above, threshold: ...}",
    "advantage={name: above, threshold: high}": "advantage: advantage 'above' takes threshold: a number (got \"high\")",
    "advantage={name: above, threshold: .inf}": "advantage: advantage 'above' takes threshold: a number (got Infinity)",
    "advantage={name: above, threshold: 1, times: 1.5}": "advantage: advantage 'above' takes times: an integer >= 1 "
    "(got 1.5)",
    "advantage={name: above, threshold: 1, shape: round}": "advantage: advantage 'above' takes shape: one of step, "
    'linear (got "round")',
    "advantage={name: above, threshold: 13}": "advantage: advantage 'above': threshold=13 brings bad luck; take 12",
    "advantage=3": "advantage: expected a method's name, or {name: NAME, PARAMETER: VALUE} (got 3)",
    "advantage=null": "advantage: expected a method's name, or {name: NAME, PARAMETER: VALUE} (got null)",
    "policy_loss=cliped": "policy_loss: unknown policy loss 'cliped'; known: clip_cov, clipped, gspo, "
    "kl_cov, reinforce; did you mean clipped?",
    "policy_loss={name: gspo, params: 3}": "policy_loss.params: expected a mapping of names to values (got 3)",
    "policy_loss={scale: 3}": "policy_loss.name: expected text (got null)",
    "advantage={name: above, params: {threshold: 1}, threshold: 2}": "advantage: threshold stands here twice, once in "
    "params and once beside it; remove one",
    "plugins=[no_such_module]": "plugins: plugin 'no_such_module' cannot be imported (ModuleNotFoundError: No module "
    "named 'no_such_module'); install it or put its folder on PYTHONPATH",
}


@pytest.mark.parametrize(("override", "line"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(user_module: str, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo-math", [f"algorithm.plugins=[{user_module}]", f"algorithm.{override}"])
    assert caught.value.lines == (CL + line,)


def test_every_mistaken_method_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo-math", [f"algorithm.{key}=zzz" for key in METHODS])
    assert [line.split(";")[0] for line in caught.value.lines] == [
        f"{CL}divergence: unknown divergence 'zzz'",
        f"{CL}advantage: unknown advantage 'zzz'",
        f"{CL}policy_loss: unknown policy loss 'zzz'",
    ]


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "raise KeyError('x')", "raise ValueError('two\\nlines')"])
def test_whatever_a_plugin_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "raising.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    kind, words = code.split()[1].split("(")[0], {"S": "3", "K": "'x'", "V": "two lines"}[code[6]]
    result = CliRunner().invoke(app, ["plan", "demo-math", "algorithm.plugins=[raising]"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith(
        f"algorithm.plugins: plugin 'raising' cannot be imported ({kind}: {words}); correct the module"
    )


@pytest.mark.parametrize(
    ("plugin", "code", "remedy"),
    [
        ("no_such_module", "", "install it or put its folder on PYTHONPATH"),
        ("no_such_package.part", "", "install it or put its folder on PYTHONPATH"),
        ("importing", "import no_such_library.part", "install 'no_such_library', or correct the module"),
        ("importing", "from math import no_such_name", "correct the module"),
        ("importing.part", "", "install it or put its folder on PYTHONPATH"),
    ],
)
def test_the_remedy_suits_what_a_plugin_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: str, code: str, remedy: str
) -> None:
    (tmp_path / "importing.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "importing", raising=False)
    with pytest.raises(ValueError, match=rf"^plugin '{plugin}' cannot be imported \(.*\); {remedy}$"):
        import_plugins([plugin])
    sys.modules.pop("importing", None)


def test_a_plugin_that_failed_can_be_imported_once_it_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = "from dphrl.algo.advantages import register_advantage\n"
    package = tmp_path / "halves"
    package.mkdir()
    (package / "first.py").write_text(f"{register}register_advantage('first')(lambda: list)\n")
    second = f"import halves.first\n{register}register_advantage('second')(lambda: list)\n"
    (package / "__init__.py").write_text(f"{second}raise RuntimeError('half-way')\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^plugin 'halves' cannot be imported \(RuntimeError: half-way\); correct"
        ):
            import_plugins(["halves"])
        assert not {"first", "second"} & METHODS["advantage"].methods().keys()
    assert METHODS["advantage"].methods().keys() >= {"mean_only"}
    (package / "__init__.py").write_text(second)
    import_plugins(["halves"])
    assert {"first", "second", "mean_only"} <= METHODS["advantage"].methods().keys()
    sys.modules.pop("halves.first")
    sys.modules.pop("halves")


def test_a_plugin_that_cannot_be_imported_is_the_only_error_its_names_give() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo-math", ["algorithm.plugins=[no_such_module]", "algorithm.advantage=mine"])
    assert len(caught.value.lines) == 1


def test_a_method_merges_and_reads_back_like_any_other(user_module: str, tmp_path: Path) -> None:
    def load(name: str, text: str, *overrides: str) -> Any:
        (tmp_path / name).write_text(text)
        return load_config(str(tmp_path / name), overrides).algorithm

    plugins = f"  plugins: [{user_module}]\n"
    below = "  advantage: {name: above, threshold: 1, times: 2}\n  policy_loss: {name: reinforce, scale: 3}\n"
    load("a.yaml", f"base: demo-math\nalgorithm:\n{plugins}{below}")
    same = load("b.yaml", "base: a.yaml\nalgorithm: {advantage: {threshold: 0.5}}")
    assert (same.advantage.name, same.advantage.params) == ("above", {"threshold": 0.5, "times": 2})
    other = load("c.yaml", "base: a.yaml\nalgorithm: {advantage: {name: mean_only}, policy_loss: clipped}")
    assert (other.advantage.params, other.policy_loss.name, other.policy_loss.params) == ({}, "clipped", {})
    changed = load("d.yaml", "base: a.yaml", "algorithm.policy_loss.scale=4")
    assert changed.policy_loss.params == {"scale": 4.0}

    config = load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    stored = load_config(str(tmp_path / "config.yaml"), ["algorithm.policy_loss.scale=5"])
    assert stored.algorithm.policy_loss.params == {"scale": 5.0}
    # Names and numbers alone: any process can be sent them.
    assert pickle.loads(pickle.dumps(config)) == config


FORMS = ("{alpha: VALUE}", "{params: {alpha: VALUE}}")


@pytest.mark.parametrize("below", FORMS)
@pytest.mark.parametrize("above", [*FORMS, "algorithm.divergence.alpha=", "algorithm.divergence.params.alpha="])
def test_of_two_layers_the_later_one_sets_a_parameter_in_whichever_form(tmp_path: Path, below: str, above: str) -> None:
    def write(name: str, base: str, form: str, value: str) -> str:
        text = f"base: {base}\nalgorithm: {{divergence: {form.replace('VALUE', value)}}}\n"
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    named = below.replace("{", "{name: alpha, ", 1)
    lower = write("lower.yaml", "demo-math", named, "0.3")
    if above in FORMS:
        config = load_config(write("upper.yaml", "lower.yaml", above, "0.8"))
    else:
        config = load_config(lower, [f"{above}0.6", f"{above}0.8"])
    assert config.algorithm.divergence.params == {"alpha": 0.8}
    assert load_config(lower).algorithm.divergence.params == {"alpha": 0.3}


def test_a_method_or_the_whole_algorithm_may_be_one_override() -> None:
    for override in (
        "algorithm.divergence={name: alpha, alpha: 0.3}",
        "algorithm={divergence: {name: alpha, alpha: 0.3}}",
    ):
        for change in ("algorithm.divergence.params.alpha=0.8", "algorithm.divergence.alpha=0.8"):
            assert load_config("demo-math", [override, change]).algorithm.divergence.params == {"alpha": 0.8}
    with pytest.raises(
        ConfigError, match=r"algorithm.divergence.alpha: algorithm.divergence is a value, not a section"
    ):
        load_config("demo-math", ["algorithm.divergence=js", "algorithm.divergence.alpha=0.8"])


def test_the_config_of_an_earlier_run_loads(tmp_path: Path) -> None:
    tree = "base: demo-math\nalgorithm:\n  divergence: {name: alpha, params: {alpha: 0.5}}\n"
    tree += "  advantage: leave_one_out\n  ratio: sequence\n  clip_low: 0.0003\n  clip_high: 0.0004\n  dual_clip: 3.0\n"
    (tmp_path / "config.yaml").write_text(tree + "  importance_cap: 2.0\n")
    algorithm = load_config(str(tmp_path / "config.yaml")).algorithm
    assert (algorithm.advantage.name, algorithm.policy_loss.name, algorithm.ratio) == (
        "leave_one_out",
        "clipped",
        "sequence",
    )
    assert algorithm.divergence.params == {"alpha": 0.5}


class Shape(Enum):
    STEP = "step"
    LINE = "line"


TYPES: list[tuple[Any, str, Any, str]] = [
    (tuple[float, ...], "[1, 0.5]", (1.0, 0.5), "a list, each item a number"),
    (set[int], "[3, 1, 3]", {1, 3}, "a list, each item an integer"),
    (Path, "a/b", Path("a/b"), "text"),
    (Shape, "step", Shape.STEP, "one of step, line"),
    (Shape | None, "line", Shape.LINE, "one of step, line or null"),
    (list[Shape], "[line]", [Shape.LINE], "a list, each item one of step, line"),
    (datetime.date, "2026-01-31", datetime.date(2026, 1, 31), "text"),
    (Decimal, "0.1", Decimal("0.1"), "a number"),
    (dict[str, tuple[int, int]], "{a: [1, 2]}", {"a": (1, 2)}, "a mapping of names to values"),
    (list[float], "[1]", [1.0], "a list, each item a number"),
]


@pytest.mark.parametrize(("kind", "text", "expected", "wants"), TYPES, ids=[str(kind) for kind, *_ in TYPES])
def test_a_parameter_may_have_any_type_that_yaml_can_write(
    tmp_path: Path, kind: Any, text: str, expected: Any, wants: str
) -> None:
    given = []

    def typed(x) -> Any:
        given.append(x)
        return list

    typed.__annotations__["x"] = kind
    register_advantage("typed")(typed)
    assert METHODS["advantage"].get("typed").takes == f"x: {wants}"
    config = load_config("demo-math", [f"algorithm.advantage={{name: typed, x: {text}}}"])
    assert given == [expected]
    # The stored configuration holds what YAML and JSON can, and reads back equal.
    assert json.loads(json.dumps(config.algorithm.advantage.params)) == config.algorithm.advantage.params
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    get_advantage("typed", **config.algorithm.advantage.params)
    get_advantage("typed", x=expected)
    assert given == [expected] * 4
    assert check_setting(f"algorithm.advantage.x={text}").endswith("checks it together with the others")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((float, '"0.5"'), (float, "true"), (float, ".inf"), (float, ".nan"), (tuple[float, ...], "[1, .nan]")),
        *((int, "2.0"), (int, "true"), (Path, "3"), (Shape, "round"), (datetime.date, "2026-02-30"), (str, "1")),
    ],
)
def test_what_does_not_suit_the_type_of_a_parameter_is_refused(kind: Any, value: str) -> None:
    def typed(x) -> Any:
        return list

    typed.__annotations__["x"] = kind
    register_advantage("typed")(typed)
    with pytest.raises(ConfigError, match=r"advantage 'typed' takes x: "):
        load_config("demo-math", [f"algorithm.advantage={{name: typed, x: {value}}}"])
    with pytest.raises(ConfigError, match=r"algorithm.advantage.x: expected "):
        check_setting(f"algorithm.advantage.x={value}")


def test_the_default_of_a_typed_parameter_is_listed_as_yaml_writes_it() -> None:
    def typed(shape: Shape = Shape.LINE, at: tuple[float, ...] = (0.5, 1.0), path: Path = Path("a")) -> Any: ...

    register_advantage("typed")(typed)
    assert METHODS["advantage"].get("typed").takes == (
        'shape: one of step, line (default "line"), at: a list, each item a number (default [0.5, 1.0]), '
        'path: text (default "a")'
    )


# ------------------------------------------------------------ the list


def listed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["presets", "--algorithms", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_method_is_listed_with_its_parameters(user_module: str) -> None:
    lines = listed().splitlines()
    assert lines[:3] == [
        "algorithm.divergence: NAME, or {name: NAME, PARAMETER: VALUE}",
        "  none               No divergence and no reference stage: plain RL with verifiable rewards.",
        "  alpha              Alpha divergence, between reverse KL (alpha -> 0) and forward KL (alpha -> 1).",
    ]
    assert lines[3] == "                     takes alpha: a number > 0 and < 1"
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    builtin = "none alpha chi_square forward_kl js reverse_kl sft squared_hellinger total_variation "
    builtin += "group_normalized leave_one_out maxrl mean_only pkpo uniqueness unlikeliness w_reinforce "
    assert names == f"{builtin}clip_cov clipped gspo kl_cov".split()
    assert all(method.summary for registry in METHODS.values() for method in registry.methods().values())

    mine = listed("--plugin", user_module, "--json")
    assert json.loads(mine)["algorithm.advantage"][0] == {
        "name": "above",
        "parameters": 'threshold: a number, shape: one of step, linear (default "linear"), '
        "times: an integer >= 1 (default 1)",
        "summary": "How far a score lies above a threshold.",
    }
    assert "Forward KL times a number." in mine
    assert "More that no list shows" not in mine


def test_the_list_refuses_what_makes_no_sense() -> None:
    for arguments, line in [
        (["presets", "--plugin", "x"], "--plugin: lists a module's algorithms; add --algorithms"),
        (["presets", "--algorithms", "--plugin", "no_such_module"], "--plugin: plugin 'no_such_module' cannot be"),
    ]:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert line in result.stderr


# ------------------------------------------------------------ one update with a user's methods


class OneLogprob:
    """A policy whose every token has the same log-prob, its only weight; never stepped."""

    def __init__(self, logprob: float) -> None:
        self.device, self.weight = torch.device("cpu"), torch.tensor(logprob, requires_grad=True)

    def forward(self, batch: Any) -> Any:
        every = torch.zeros(len(batch.target_ids_N))
        return every + self.weight, every

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        return 0.0


def test_one_update_with_a_users_methods(user_module: str) -> None:
    settings = {
        "plugins": f"[{user_module}]",
        "divergence": "{name: scaled_kl, scale: 2}",
        "advantage": "{name: above, threshold: 0.25, times: 4}",
        "policy_loss": "{name: reinforce, scale: 3}",
        "eta": "0.5",
        "importance_cap": "1.5",
    }
    config = load_config("demo-math", [f"algorithm.{key}={value}" for key, value in settings.items()])
    statuses = [RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.INFRASTRUCTURE_ERROR]
    completions = tuple(
        Completion("p", i, (7,) * length, "text", (-2.0,) * length, "stop", 0) for i, length in enumerate((3, 1, 2))
    )
    group = RolloutGroup(Prompt("p", "p", (1, 2), "a", "data"), completions, tuple(map(RewardResult, statuses)))
    batch = make_batch(config, 0, 0, [group], [ReferenceSample("p", (1,), (5, 5), (-1.0, -1.5))])
    # 4 (1 - 1/4) and 4 (0 - 1/4); the completion without a grade is no row.
    assert [row.advantage for row in batch.minibatches[0]] == [3.0, -1.0, 0.0]

    forget_user_methods()  # the learner may be another process, which gets the configuration alone
    engine = OneLogprob(-1.0)
    metrics = run_update(batch, engine, UpdateSettings.from_config(config))
    # 4 tokens of weight 1/4, importance e^1 cut to 1.5: -3 x 1/4 x 1.5 x (3 x 3 - 1) x (-1) = 9, gradient -9.
    assert metrics["policy/loss"] == pytest.approx(9.0)
    assert metrics["policy/logprob_sum"] == pytest.approx(-1.0)
    assert metrics["policy/clip_fraction"] == 0.0
    # log u is 0 and 1/2 at the two rehearsal tokens: 2 x (e^(1/2) - 1 - 1/2) / 2, gradient 2 x (e^(1/2) - 1) / 2.
    assert metrics["divergence/loss"] == pytest.approx(math.exp(0.5) - 1.5)
    assert engine.weight.grad is not None
    assert engine.weight.grad.item() == pytest.approx(-9.0 + 0.5 * (math.exp(0.5) - 1))


def test_the_settings_of_the_configuration_reach_the_loss() -> None:
    trust_region = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 4.0, "importance_cap": 5.0, "ratio": "sequence"}
    others = {"entropy_bonus": 0.5, "eta": 0.125}
    overrides = [f"algorithm.{key}={value}" for key, value in (trust_region | others).items()]
    settings = UpdateSettings.from_config(load_config("demo-math", overrides))
    assert settings.policy == PolicyLossSettings(**trust_region)
    assert settings.term is not None
    assert (settings.term.eta, settings.term.divergence.name, settings.entropy_bonus) == (0.125, "forward_kl", 0.5)
    assert UpdateSettings.from_config(load_config("demo-math", ["algorithm.divergence=none"])).term is None


# ------------------------------------------------------------ a user's divergence

WRONG_DIVERGENCES: dict[str, tuple[Any, str]] = {
    "a function": (torch.expm1, r"its factory returned <.*expm1.*>; return a Divergence\(name, value, slope\)"),
    "a sum": (lambda x: (torch.expm1(x) - x).sum(), r"its value returns no number for each log u; compute it elementw"),
    "a number": (lambda x: 0.0, r"its value returns no number for each log u"),
    "more of them": (lambda x: torch.expm1(x)[None].square(), r"its value returns no number for each log u"),
    "not finite": (lambda x: x.sqrt(), r"its value is not finite where log u is -10, -1$"),
    "not zero": (torch.exp, r"its value at log u = 0 is 1; make it 0, as f\(1\) is"),
    "negative": (torch.expm1, r"its value is negative where log u is -10, -1; make f convex with f'\(1\) = 0"),
    "an error": (lambda x: x.frob(), r"its value fails at a tensor of log u \(AttributeError: .*frob'\)"),
}


@pytest.mark.parametrize("case", WRONG_DIVERGENCES)
def test_a_divergence_with_a_wrong_value_is_refused_before_a_run(case: str) -> None:
    value, words = WRONG_DIVERGENCES[case]
    made = value if case == "a function" else Divergence("wrong", value, torch.expm1)
    register_divergence("wrong")(lambda: made)
    with pytest.raises(ConfigError, match=rf"divergence 'wrong': {words}"):
        load_config("demo-math", ["algorithm.divergence=wrong"])


@pytest.mark.parametrize(
    ("slope", "words"),
    [
        (lambda x: x.log(), "its slope is not finite where log u is 0, -10, -1"),
        (lambda x: torch.expm1(x).mean(), "its slope returns no number for each log u"),
    ],
)
def test_a_divergence_with_a_wrong_slope_is_refused(slope: Any, words: str) -> None:
    register_divergence("wrong")(lambda: Divergence("wrong", lambda x: torch.expm1(x) - x, slope))
    with pytest.raises(ValueError, match=f"divergence 'wrong': {words}"):
        get_divergence("wrong")


# ------------------------------------------------------------ advantages, to the last digit


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Mean 1/2, squared deviations 1/4 + 0 + 1/16 + 1/16 = 3/8, / 3 = 1/8.
        ("group_normalized", [d / (math.sqrt(0.125) + 1e-6) for d in (0.5, -0.5 + 0.5, -0.25, -0.25)]),
        ("mean_only", [0.5, 0.0, -0.25, -0.25]),
        # The others' means: 1/3, 1/2, 7/12, 7/12.
        ("leave_one_out", [2 / 3, 0.0, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_of_a_group(name: str, expected: list[float]) -> None:
    assert group_advantages([1.0, 0.5, 0.25, 0.25], name) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_ungraded_completions_and_lone_ones_reach_no_method(user_module: str) -> None:
    import_plugins([user_module])
    assert group_advantages([None, 3.0, None], "above", threshold=1) == [None, 0.0, None]
    assert group_advantages([None], "above", threshold=1) == [None]
    assert group_advantages([2.0, None, 3.0], "above", threshold=1) == [1.0, None, 2.0]
    # Equal scores are the method's own business: a fixed threshold has an opinion on them.
    assert group_advantages([2.0, 2.0], "above", threshold=1) == [1.0, 1.0]
    assert group_advantages([2.0, 2.0], "group_normalized") == [0.0, 0.0]


BROKEN = [
    [1.0],
    [1.0, 2.0, 3.0],
    [1.0, math.nan],
    [math.inf, 0.0],
    ["1", "2"],
    [None, 1.0],
    None,
    3.0,
    "12",
    [[1], [2]],
]


@pytest.mark.parametrize("made", [*BROKEN, [10**400, 0]], ids=repr)
def test_an_advantage_that_breaks_its_contract_is_named(made: Any) -> None:
    register_advantage("broken")(lambda: lambda scores: made)
    words = f"advantage 'broken' made {made} of the scores [1.0, 0.0]; return one finite number for each"
    if isinstance(made, str):
        words = words.replace("made 12", "made '12'")
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        group_advantages([1.0, 0.0], "broken")


@pytest.mark.parametrize(
    ("advantages", "words"),
    [
        (lambda scores, more: [0.0, 0.0], r"\(TypeError: .*missing 1 required positional argument: 'more'\)"),
        (lambda scores: scores.sort(), r"\(AttributeError: 'tuple' object has no attribute 'sort'\)"),
        (lambda scores: [1 / score for score in scores], r"\(ZeroDivisionError: .*division by zero\)"),
    ],
)
def test_an_advantage_that_fails_is_named(advantages: Any, words: str) -> None:
    register_advantage("failing")(lambda: advantages)
    with pytest.raises(ValueError, match=rf"^advantage 'failing' failed at the scores \[1\.0, 0\.0\] {words}$"):
        group_advantages([1.0, 0.0], "failing")


@pytest.mark.parametrize("make", [tuple, torch.tensor, iter])
def test_an_advantage_may_return_whatever_holds_numbers(make: Any) -> None:
    register_advantage("kind")(lambda: lambda scores: make([2 * score for score in scores]))
    made = group_advantages([1.0, None, 0.25], "kind")
    assert made == [2.0, None, 0.5]
    assert [type(value) for value in made] == [float, type(None), float]


def test_the_length_penalty_falls_along_a_line() -> None:
    # A buffer of 4 before 10: free up to 6, then a quarter a token.
    assert [overlong_penalty(n, 10, 4) for n in (0, 6, 7, 9, 10, 12)] == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]
    assert overlong_penalty(10, 10, 0) == 0.0


# ------------------------------------------------------------ policy losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.2799, 2.0, -2.5598, False),  # A > 0: the upper bound is 1.28
        (1.2801, 2.0, -2.56, True),
        (0.7999, 2.0, -1.5998, False),  # and there is no lower one
        (0.8001, -2.0, 1.6002, False),  # A < 0: the lower bound is 0.8
        (0.7999, -2.0, 1.6, True),
        (1.2801, -2.0, 2.5602, False),  # and no upper one,
        (2.9999, -2.0, 5.9998, False),  # up to the dual clip at 3
        (3.0001, -2.0, 6.0, False),
        (3.0001, 2.0, -2.56, True),  # which A > 0 never meets
    ],
)
def test_the_bounds_on_both_signs(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    batch = tokens([ratio], [advantage])
    value, metrics = get_policy_loss("clipped")(batch, SETTINGS)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert metrics["policy/clip_fraction"].item() == float(clipped)
    flat = clipped or (advantage < 0 and ratio > 3)
    assert batch.logprobs_N.grad is not None
    assert batch.logprobs_N.grad.item() == pytest.approx(0.0 if flat else -advantage * ratio, abs=1e-12)


def test_metrics_are_weighted_by_the_tokens_share() -> None:
    # Two of three are clipped, of weights 1/2 and 1/8; importance e^-1, e^0, e^5 -> 2.
    weights, rollout = double(0.5, 0.375, 0.125), double(-1.0, -2.0, -7.0)
    batch = tokens([2.0, 1.0, 0.5], [1.0, 1.0, -1.0], weights_N=weights, rollout_logprobs_N=rollout)
    loss, metrics = get_policy_loss("clipped")(batch, SETTINGS)
    assert metrics["policy/clip_fraction"].item() == 0.625
    assert metrics["policy/importance_mean"].item() == pytest.approx(0.5 * math.exp(-1) + 0.375 + 0.25)
    assert loss.item() == pytest.approx(0.5 * math.exp(-1) * -1.28 + 0.375 * -1.0 + 0.25 * 0.8)


@pytest.mark.parametrize(("gap", "weight"), [(0.0, 1.0), (-2.0, math.exp(-2)), (0.69, math.exp(0.69)), (0.7, 2.0)])
def test_importance_is_cut_above_and_never_below(gap: float, weight: float) -> None:
    batch = tokens([1.0], [1.0], rollout_logprobs_N=double(-2.0 - gap))
    assert importance(batch, SETTINGS).item() == pytest.approx(weight)


@pytest.mark.parametrize(
    ("how", "weights", "affected"),
    [
        # rho of the tokens 3, 1.5 | 0.4, 1 | 1, 1; of the completions 4.5, 0.4 and 1; bounds 2 and 1/2.
        ("truncate", [2.0, 1.5, 0.4, 1.0, 1.0, 1.0], [0]),
        ("mask", [0.0, 1.5, 0.0, 1.0, 1.0, 1.0], [0, 2]),
        ("sequence_truncate", [2.0, 2.0, 0.4, 0.4, 1.0, 1.0], [0, 1]),
        ("sequence_mask", [0.0, 0.0, 0.4, 0.4, 1.0, 1.0], [0, 1]),
    ],
)
def test_importance_is_bounded_as_it_is_named(how: str, weights: list[float], affected: list[int]) -> None:
    rho = double(3.0, 1.5, 0.4, 1.0, 1.0, 1.0)
    share = double(0.1, 0.2, 0.3, 0.15, 0.05, 0.2)
    batch = replace(
        tokens([1.0] * 6, [1.0] * 6, weights_N=share, rollout_logprobs_N=-2.0 - rho.log()),
        row_index_N=torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    batch = replace(batch, old_logprobs_N=double(*[-2.0] * 6))
    settings = replace(SETTINGS, importance=how)
    assert importance(batch, settings).tolist() == pytest.approx(weights)
    _, metrics = get_policy_loss("clipped")(batch, settings)
    assert metrics["policy/importance_affected"].item() == pytest.approx(share[affected].sum().item())
    far = replace(batch, rollout_logprobs_N=double(*[-900.0] * 6))
    assert torch.isfinite(importance(far, settings)).all()


def test_a_sequence_s_ratio_is_the_mean_of_its_own_tokens() -> None:
    # Rows 2 and 0 lie among each other, row 1 has no token: means 0.1 + 0.5 over 2, and 0.4 - 0.1 + 0.3 over 3.
    log_ratio = double(0.1, 0.4, -0.1, 0.5, 0.3)
    rows = torch.tensor([2, 0, 0, 2, 0])
    assert sequence_log_ratio(log_ratio, rows).tolist() == pytest.approx([0.3, 0.2, 0.2, 0.3, 0.2])


def test_gspo_is_the_clipped_surrogate_of_sequence_ratios() -> None:
    log_ratios = double(0.5, -0.1, -0.9)  # the mean of the first two is 0.2, e^0.2 = 1.22 < 1.28
    old = double(-1.0, -2.0, -3.0)
    batch = PolicyTokens(old + log_ratios, old, old, double(1, 1, 1), double(0.25, 0.25, 0.5), torch.tensor([0, 0, 1]))
    gspo, _ = get_policy_loss("gspo")(batch, SETTINGS)
    sequence, _ = get_policy_loss("clipped")(batch, replace(SETTINGS, ratio="sequence"))
    token, _ = get_policy_loss("clipped")(batch, SETTINGS)
    assert gspo.item() == sequence.item() == pytest.approx(-0.5 * math.exp(0.2) - 0.5 * math.exp(-0.9))
    assert token.item() == pytest.approx(-0.25 * 1.28 - 0.25 * math.exp(-0.1) - 0.5 * math.exp(-0.9))


@pytest.mark.parametrize("name", ["clipped", "gspo", "reinforce"])
def test_no_token_is_a_loss_of_zero_with_a_gradient(user_module: str, name: str) -> None:
    import_plugins([user_module])
    loss, _ = get_policy_loss(name)(tokens([], []), SETTINGS)
    loss.backward()
    assert loss.item() == 0.0


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "a number": (lambda loss: (0.5, {}), r"as its loss 0\.5; return a tensor of one number"),
    "no loss": (lambda loss: (None, {}), r"as its loss None; return a tensor of one number"),
    "a vector": (lambda loss: (loss + torch.zeros(2), {}), r"as its loss a tensor of .* the shape \[2\]; .*: sum the"),
    "an integer": (lambda loss: (loss.detach().long(), {}), r"as its loss a tensor of torch\.int64 with"),
    "no gradient": (lambda loss: (loss.detach(), {}), r"a loss without a gradient; compute it from tokens\.logprobs_N"),
    "the loss alone": (lambda loss: loss, r"a tensor of torch\.float64 with the shape \[\]; .*: \(loss, \{\}\)"),
    "nothing": (lambda loss: None, r"None; return its loss and its metrics"),
    "no metrics": (lambda loss: (loss, None), r"as its metrics None; return a dict, \{\} for none"),
    "a text": (lambda loss: (loss, {"policy/x": "much"}), r"the metric 'policy/x' as 'much'; return a number"),
    "true": (lambda loss: (loss, {"policy/x": True}), r"the metric 'policy/x' as True; return a number"),
    "many numbers": (
        lambda loss: (loss, {"policy/x": torch.zeros(3)}),
        r"'policy/x' as a tensor .* \[3\]; return a num",
    ),
    "the loss's metric": (lambda loss: (loss, {"policy/loss": 0.0}), r"'policy/loss', which every step has already"),
    "the entropy": (lambda loss: (loss, {"policy/entropy": 0.0}), r"'policy/entropy', which every step has already"),
    "another's metric": (
        lambda loss: (loss, {"learner/grad_norm": 0.0}),
        r"'learner/grad_norm'; begin its name with pol",
    ),
    "the step": (lambda loss: (loss, {"step": 0}), r"a metric named 'step'; begin its name with policy/"),
    "a number's metric": (lambda loss: (loss, {3: 0.0}), r"a metric named 3; begin its name with policy/"),
}


def mine(make: Any) -> Any:
    """The loss of a user who makes what he returns from the sum of the log-probs."""
    register_policy_loss("mine")(lambda: lambda tokens, settings: make(tokens.logprobs_N.sum()))
    return get_policy_loss("mine")


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_a_policy_loss_that_breaks_its_contract_is_named(case: str) -> None:
    make, words = BAD_LOSSES[case]
    with pytest.raises(ValueError, match=rf"^policy loss 'mine' returned .*{words}"):
        mine(make)(tokens([1.0, 2.0], [1.0, 1.0]), SETTINGS)


def test_a_policy_loss_may_return_numbers_and_what_has_a_gradient_as_metrics() -> None:
    batch = tokens([1.0, math.e], [1.0, 1.0])
    loss, metrics = mine(lambda loss: (2 * loss, {"policy/a": loss, "policy/b": 3, "policy/clip_fraction": 0.5}))(
        batch, SETTINGS
    )
    assert loss.item() == -6.0
    assert {name: value.item() for name, value in metrics.items()} == {
        "policy/a": -3.0,
        "policy/b": 3.0,
        "policy/clip_fraction": 0.5,
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_without_any_token_a_constant_is_a_loss_too() -> None:
    batch = tokens([], [])
    loss, _ = mine(lambda loss: (torch.zeros(()), {}))(batch, SETTINGS)
    loss.backward()
    assert loss.item() == 0.0


# ------------------------------------------------------------ both terms


def hybrid(term: DivergenceTerm, **given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Three rehearsal tokens of log u 12, -11 and 1 with weights 1/2, 3/8, 1/8, and one exploration token."""
    logprobs = double(-1.0, -1.0, -1.0, -1.0)
    stored = double(-13.0, 10.0, -2.0, -1.0)
    weights, kinds = double(0.5, 0.375, 0.125, 1.0), torch.tensor([False, False, False, True])
    advantages = double(0.0, 0.0, 0.0, 2.0)
    rows = torch.arange(4)
    return hybrid_loss(
        logprobs, logprobs, stored, advantages, weights, kinds, rows, policy=SETTINGS, term=term, **given
    )


def test_eta_weighs_the_divergence_and_metrics_do_not_know_it() -> None:
    linear = Divergence("linear", lambda x: x, torch.ones_like)
    for eta in (0.0, 0.25, 2.0):
        loss, metrics = hybrid(DivergenceTerm(linear, eta))
        divergence = 0.5 * 12 - 0.375 * 11 + 0.125
        assert metrics["divergence/loss"].item() == pytest.approx(divergence)
        assert metrics["policy/loss"].item() == -2.0
        assert loss.item() == pytest.approx(-2.0 + eta * divergence)
        assert metrics["divergence/log_u_mean"].item() == pytest.approx(divergence)
        # Beyond 10 on either side: the tokens of weight 1/2 and 3/8.
        assert metrics["divergence/continued_fraction"].item() == 0.875


def test_rollout_tokens_are_weighed_by_how_far_the_policy_has_moved_on() -> None:
    linear = Divergence("linear", lambda x: x, torch.ones_like)
    logprobs = double(-1.0, -1.0)
    stored, reference = double(-1.5, -3.0), double(-2.0, -1.25)
    weights, every = double(0.25, 0.75), torch.tensor([True, True])
    _, metrics = hybrid_loss(
        *(logprobs, logprobs, stored, double(0, 0), weights, every, torch.arange(2)),
        policy=SETTINGS,
        term=DivergenceTerm(linear, 1.0, estimator="rollout"),
        reference_logprobs_N=reference,
    )
    # f(u) / u is log u / u, log u = 1 and 1/4; importance e^0.5 and e^2 -> 2.
    expected = 0.25 * math.exp(0.5) * math.exp(-1) + 0.75 * 2.0 * 0.25 * math.exp(-0.25)
    assert metrics["divergence/loss"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 8, 0.0, 1 / 8]),  # 2 + 6 tokens
        ("sequence_mean", [1 / 4, 0.0, 1 / 12]),  # two rows have tokens: 1 / (2 x 2), 1 / (2 x 6)
        ("fixed_length", [1 / 20, 0.0, 1 / 20]),  # 1 / (2 x 10)
    ],
)
def test_what_each_aggregation_weighs_a_token(aggregation: str, expected: list[float]) -> None:
    assert row_weights([2, 0, 6], aggregation, 10) == pytest.approx(expected, rel=1e-15)
    assert row_weights([], aggregation, 10) == []
