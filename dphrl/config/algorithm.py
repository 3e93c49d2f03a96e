"""The algorithm's part of the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationInfo, model_validator

from dphrl.algo.registry import METHODS, RESERVED_PARAMETERS, one_line, show, undone_on_failure
from dphrl.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from dphrl.own_code import name_taken

# Of the tokens, as in arXiv 2506.01939, which found that the gradient of the fifth of highest entropy is enough.
DEFAULT_REHEARSAL_SHARE = 0.2


class MethodConfig(Section):
    """A registered method, written as its name or as `{name: NAME, PARAMETER: VALUE, ...}`."""

    name: str
    """Name under which the method is registered; `dphrl presets --algorithms` lists all of them."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the method by name. Those that are left out have the defaults that the list shows."""
    _min_size: int = PrivateAttr(default=1)

    @property
    def min_size(self) -> int:
        """The fewest completions of a prompt that an advantage compares; 1 where the method does not say."""
        return self._min_size


def import_plugins(plugins: Sequence[str]) -> None:
    """Import a user's modules by name. Raises ValueError that says which one cannot be, and why."""
    for name in plugins:
        try:
            with undone_on_failure():
                importlib.import_module(name)
        except (Exception, SystemExit) as error:
            remedy = (isinstance(error, Exception) and name_taken(error)) or _remedy(name, error)
            raise ValueError(f"plugin {name!r} cannot be imported ({one_line(error)}); {remedy}") from error


def _remedy(plugin: str, error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return "correct the module"
    if f"{plugin}.".startswith(f"{error.name}."):
        return "install it or put its folder on PYTHONPATH"
    return f"install {error.name!r}, or correct the module"


def _imported(plugins: tuple[str, ...]) -> tuple[str, ...]:
    import_plugins(plugins)
    return plugins


def one_form(value: dict[str, Any]) -> dict[str, Any]:
    """`{name: alpha, alpha: 0.5}` as `{name: alpha, params: {alpha: 0.5}}`, which a later layer can change.

    What cannot be brought to one form is returned as it is, and is refused when the method is read.
    """
    flat = {key: inner for key, inner in value.items() if key not in RESERVED_PARAMETERS}
    given = value.get("params", {})
    if not flat or not isinstance(given, dict) or flat.keys() & given.keys():
        return value
    return {**{key: inner for key, inner in value.items() if key == "name"}, "params": {**given, **flat}}


def _parse_method(value: Any) -> Any:
    """`forward_kl`, or `{name: alpha, alpha: 0.5}`: the short form users write."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        formed = one_form(value)
        given = formed.get("params", {})
        if isinstance(given, dict) and (
            twice := [key for key in formed if key in given and key not in RESERVED_PARAMETERS]
        ):
            raise ValueError(f"{', '.join(twice)} stands here twice, once in params and once beside it; remove one")
        return {"name": formed.get("name"), "params": given}
    if isinstance(value, MethodConfig):
        return value
    raise ValueError(f"expected a method's name, or {{name: NAME, PARAMETER: VALUE}} (got {show(value)})")


def _parse_divergence(value: Any) -> Any:
    return _parse_method("none" if value is None else value)


def _registered(method: MethodConfig, info: ValidationInfo) -> MethodConfig:
    """The method, its parameters as the registered factory receives them."""
    registry = METHODS[str(info.field_name)]
    # Without the user's modules nobody knows which names there are: their error is the one to tell.
    if "plugins" not in info.data:
        return method
    if method.name in registry.reserved:
        if method.params:
            raise ValueError(f"{registry.kind} {method.name!r} has no parameters; remove {', '.join(method.params)}")
        return method
    # Built here and thrown away: factories may refuse what their signatures cannot.
    made = registry.build(method.name, method.params)
    checked = method.model_copy(update={"params": registry.check(method.name, method.params)})
    checked._min_size = getattr(made, "min_size", 1)
    return checked


Method = Annotated[MethodConfig, BeforeValidator(_parse_method), AfterValidator(_registered)]
DivergenceMethod = Annotated[MethodConfig, BeforeValidator(_parse_divergence), AfterValidator(_registered)]


class AlgorithmConfig(Section):
    plugins: Annotated[tuple[str, ...], AfterValidator(_imported)] = ()
    """Names of your own Python modules, which may register divergences, advantages and policy losses. They are
    imported before any method is looked up, in this process and in every actor, so every node must be able to import
    them: install them, or put their folder on PYTHONPATH."""
    divergence: DivergenceMethod = MethodConfig(name="forward_kl")
    """The divergence from the initial policy that the loss adds to the policy loss: a name such as forward_kl, or a
    name with parameters such as {name: alpha, alpha: 0.5}. none is plain RL with verifiable rewards, without a
    reference stage. sft is no divergence but a control for one, cross-entropy on the same stored answers. The default,
    forward KL, holds on to everything that the initial policy could already do."""
    eta: NonNegativeFloat = 0.05
    """Weight of the divergence in the loss, without unit. Larger keeps the policy closer to the initial one and more
    diverse, smaller lets it follow the reward; 0 switches the divergence off. At 8B parameters the DPH-RL paper
    recommends 0.01 to 0.05 for forward KL and alpha, and 0.05 to 0.2 for Jensen-Shannon. Its released code normalises
    stored samples and rollouts together, which leaves the divergence 0.10 to 0.14 of the eta it is told; here it has
    all of it. To repeat a run of that code, divide its eta by about 7."""
    estimator: Literal["reference", "rollout", "definition"] = "reference"
    """Where the divergence is estimated. reference: on stored samples of the initial policy, which needs no second
    model in memory (DPH-RL, the default). rollout: on the policy's own samples. definition: Jensen-Shannon as the sum
    of its two KL halves, one on each kind of sample. rollout and definition keep a frozen copy of the initial policy
    in every learner rank."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_as_loss"] | None = None
    """How reverse KL is estimated on rollouts; null is f(u) / u as for every other divergence. k1, k2 and k3 differ in
    variance and all have the gradient of reverse KL. k3_as_loss has the gradient of forward KL, as the penalty of GRPO
    and of most trainers does; use it to repeat their figures."""
    rehearsal_tokens: Literal["all", "entropy"] = "all"
    """Which tokens of the stored answers the divergence counts. all (the default): every one. entropy: those at which
    the initial policy was most undecided, by the entropy of its next-token distribution, where answers part ways. The
    reference stage then stores entropies, which another run's buffer may lack; it is scored again, and nothing is
    sampled again."""
    rehearsal_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of a mini-batch's rehearsal tokens that count with rehearsal_tokens: entropy; null is 0.2 then. Smaller
    holds on to fewer choices. The divergence is the mean over the tokens that count, so eta keeps its meaning."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Weight of the mean token entropy (nats), which the loss then maximises. Larger makes the policy more random; the
    default 0 leaves diversity to the divergence."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """Length penalty of DAPO, in tokens: over the last so many tokens before rollout.max_tokens the score of a
    completion falls along a line by up to 1. Larger begins earlier and is gentler; the default 0 is off."""
    dynamic_sampling_rounds: PositiveInt = 1
    """How many times rollout.num_prompts a step may sample (dynamic sampling of DAPO). A group whose scores are all
    equal teaches nothing, and another prompt is asked for in its place as soon as it is graded. Larger fills the batch
    better and samples longer; the default 1 replaces nothing."""
    advantage: Method = MethodConfig(name="group_normalized")
    """How the scores of a group of completions of one prompt become advantages: group_normalized (GRPO, the default),
    mean_only (Dr.GRPO), leave_one_out (RLOO), one of the methods that keep diversity by advantages (maxrl, pkpo,
    w_reinforce, unlikeliness, uniqueness), or one that a plugin registers."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """What counts the same in the loss. token_mean: every completion token (DAPO, the default), so that long
    completions weigh more. sequence_mean: every completion (GRPO). fixed_length: every token as one of
    rollout.max_tokens (Dr.GRPO), so that a completion's length does not change the weight of its tokens."""
    policy_loss: Method = MethodConfig(name="clipped")
    """The loss on the completions of the step: clipped (the clipped surrogate of PPO, GRPO and DAPO, the default),
    gspo (the same with one ratio for each completion), clip_cov and kl_cov (which hold back the tokens that cost most
    entropy), or one that a plugin registers. Each of them is given ratio, clip_low, clip_high, dual_clip and
    importance_cap."""
    ratio: Literal["token", "sequence"] = "token"
    """What the trust region looks at: the probability ratio of each token (the default), or one ratio for the whole
    completion, the geometric mean of those of its tokens. sequence is GSPO and wants clip bounds of about 3e-4;
    `policy_loss: gspo` implies it."""
    clip_low: PositiveFloat = 0.2
    """How far below 1 the ratio of policy to old policy may fall before the gradient of a bad completion is cut.
    Without unit. Larger allows longer steps. The default is that of PPO and DAPO."""
    clip_high: PositiveFloat = 0.28
    """How far above 1 the ratio of policy to old policy may rise before the gradient of a good completion is cut.
    Without unit. Larger allows longer steps and lets rare tokens grow. The default is that of DAPO, which found that a
    bound above clip_low slows the loss of entropy."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Largest ratio at which a bad completion is still pushed down: above it the loss of a token with a negative
    advantage is constant. Without unit. Smaller bounds rare large gradients more tightly; the default is that of the
    paper on dual-clip PPO."""
    proximal_policy: Literal["auto", "learner", "behavior"] = "auto"
    """The policy around which the trust region lies. learner is the one at the start of the step, and an importance
    weight leads to it from the policy that sampled (decoupled PPO). behavior is the one that sampled each token, as in
    PPO: what has moved far since then is moved no further, and a loss without a ratio has no correction at all. auto is
    behavior where rollout.max_staleness is above 0, the loss is clipped, its ratio is of each token, and importance and
    importance_cap are the defaults; else learner."""
    importance: Literal["truncate", "mask", "sequence_truncate", "sequence_mask"] = "truncate"
    """How the importance weight between the engine that sampled and the learner is bounded, where the trust region lies
    around the learner. truncate cuts that of each token at importance_cap; mask leaves out tokens whose weight is
    beyond importance_cap or below its inverse (IcePop). sequence_truncate and sequence_mask do so with one weight for
    the whole completion, the product over its tokens: without bias, but long completions reach the bound soon."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Upper bound of the importance weight between the engine that sampled and the learner, which corrects their
    numeric differences and staleness. Without unit. Larger has less bias and more variance; 1 never raises the
    weight of a token."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps that a step's rollouts are divided into; it must divide rollout.num_prompts. Larger learns more
    from each batch, further off-policy; above the default 1 a forward pass more is needed for the log-probs of a
    proximal policy that is the learner."""

    @model_validator(mode="after")
    def _importance_is_used(self) -> Self:
        if self.proximal_policy == "behavior" and self.importance != "truncate":
            raise ValueError(
                f"proximal_policy=behavior has no importance weight, so importance={self.importance} would do nothing; "
                "set algorithm.proximal_policy: learner, or leave importance out"
            )
        return self

    @model_validator(mode="after")
    def _rehearsal_tokens_are_there(self) -> Self:
        if self.rehearsal_tokens == "all":
            if self.rehearsal_share is not None:
                raise ValueError(
                    f"rehearsal_share={self.rehearsal_share:g} is for rehearsal_tokens: entropy; set that, or "
                    "rehearsal_share: null"
                )
            return self
        if self.divergence.name == "none" or not self.eta or self.estimator == "rollout":
            raise ValueError(
                "rehearsal_tokens=entropy has no stored answers to choose from without a divergence on reference "
                "samples; set algorithm.divergence and algorithm.estimator: reference, or rehearsal_tokens: all"
            )
        if self.rehearsal_share is None:
            # Frozen for everybody else: what is written to the run's config.yaml should say which share it was.
            object.__setattr__(self, "rehearsal_share", DEFAULT_REHEARSAL_SHARE)
        return self

    @model_validator(mode="after")
    def _estimator_fits_the_divergence(self) -> Self:
        name = self.divergence.name
        if self.estimator == "definition" and name != "js":
            raise ValueError(f"estimator=definition is Jensen-Shannon's; set algorithm.divergence: js, not {name}")
        if self.estimator != "reference" and name == "sft":
            raise ValueError("divergence=sft is cross-entropy on stored answers; set algorithm.estimator: reference")
        if self.kl_estimator and (self.estimator, name) != ("rollout", "reverse_kl"):
            raise ValueError(
                f"kl_estimator={self.kl_estimator} is for reverse_kl on rollouts; set "
                "algorithm.divergence: reverse_kl and algorithm.estimator: rollout, or kl_estimator: null"
            )
        return self
