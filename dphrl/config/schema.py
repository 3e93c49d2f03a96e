"""The configuration: one YAML file (or preset), dotted overrides on the command line, validated before anything starts.

Every model is frozen and refuses unknown keys; a bad value becomes one line that names the field, the value
and the remedy. What needs the model, the data or the user's reward to be checked is checked in `dphrl.prepare`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from dphrl.config.algorithm import AlgorithmConfig
from dphrl.config.data import DataConfig, RewardConfig
from dphrl.config.health import HealthConfig
from dphrl.config.learner import LearnerConfig
from dphrl.config.model import NO_PAIR_MASK, ModelConfig
from dphrl.config.reference import ReferenceConfig
from dphrl.config.rollout import RolloutConfig
from dphrl.config.runtime import CheckpointConfig, ClusterConfig, EvaluationConfig, SyncConfig, TrackingConfig
from dphrl.config.section import Section, Seed

# The driver holds a step's completions in memory, and nobody waits for the end of such a step.
MAX_COMPLETIONS_A_STEP = 10**7


class Config(Section):
    """A complete run. `dphrl plan CONFIG` prints one resolved."""

    run_name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "run"
    """The run's folder below run_dir, and its name in charts and in Ray. Letters, digits, and . _ - after the
    first."""
    run_dir: str = "runs"
    """The folder of runs. On a cluster every node must see and write it."""
    seed: Seed = 0
    """Decides the order of prompts and every random choice. Every completion has a seed of its own, made of this one,
    its purpose and its prompt: engines sample the same whatever their number, their width or what else they decode.
    Only rounding differs with these, and now and then decides between two tokens that are next to equal; see
    deterministic."""
    deterministic: bool = False
    """Whether learner and engines use kernels that give the same result each time: slower, but repeatable. On a GPU
    this fixes the workspace of cuBLAS and takes PyTorch's deterministic algorithms in the learner, and vLLM's
    batch-invariant kernels in the engines, which not every GPU and model has; vLLM then refuses to start. On a CPU
    kernels are repeatable without it, for the same number of threads. Engines are handed all of a step's prompts at
    once, because what is decoded side by side decides how sums are rounded."""
    model: ModelConfig = ModelConfig()
    """The model to train, and how it is loaded."""
    data: DataConfig
    """What is trained and evaluated on, and how a question becomes a prompt."""
    reward: RewardConfig = RewardConfig()
    """How completions are graded."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    """The loss: the divergence that keeps diversity, and the policy gradient."""
    rollout: RolloutConfig = RolloutConfig()
    """What each step samples, and the engines that sample it."""
    reference: ReferenceConfig = ReferenceConfig()
    """The reference stage, which samples the initial policy once, before training. Without a divergence on reference
    samples and without replay there is none."""
    learner: LearnerConfig = LearnerConfig()
    """The optimizer, and how its work is spread over processes."""
    sync: SyncConfig = SyncConfig()
    """How new weights reach the engines after each update, and how it is proved that they did."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run's state is stored, for --resume and for use."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Pass@k on data.evaluation, before, during and after training."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics and samples are written."""
    health: HealthConfig = HealthConfig()
    """What happens when a run's numbers go bad."""
    cluster: ClusterConfig = ClusterConfig()
    """The Ray cluster on which the run's processes are placed."""

    @property
    def folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.run_dir).expanduser() / self.run_name

    @property
    def uses_divergence(self) -> bool:
        return self.algorithm.divergence.name != "none" and self.algorithm.eta > 0

    @property
    def uses_reference_samples(self) -> bool:
        """Whether stored answers are rehearsed through the divergence."""
        return self.uses_divergence and self.algorithm.estimator != "rollout"

    @property
    def uses_reference_stage(self) -> bool:
        """Whether there is a reference stage: a split of the prompts, and a buffer of stored answers."""
        return self.uses_reference_samples or self.reference.replay_share > 0

    @property
    def num_replayed(self) -> int:
        """How many of a step's rollout.num_prompts are near-perfect prompts, where there are enough."""
        share = self.reference.replay_share
        return max(1, round(share * self.rollout.num_prompts)) if share else 0

    @property
    def uses_reference_model(self) -> bool:
        """Whether learner ranks hold a frozen copy of the initial policy. With model.lora they need none: the policy
        without its adapters is the initial one."""
        return self.uses_divergence and self.algorithm.estimator != "reference" and self.model.lora is None

    @property
    def share_prefix(self) -> str:
        """learner.share_prefix, but never where the rest of the configuration excludes it."""
        possible = self.model.attention not in NO_PAIR_MASK and self.learner.sequence_parallel == 1
        return self.learner.share_prefix if possible else "never"

    @property
    def proximal_policy(self) -> str:
        """algorithm.proximal_policy: learner or behavior."""
        algorithm = self.algorithm
        if algorithm.proximal_policy != "auto":
            return algorithm.proximal_policy
        # Bounds for whole completions are far narrower than what staleness makes of them. Nobody knows what a plugin's
        # loss does with old log-probs. And who chose how importance weights are bounded wants to have them.
        fits = algorithm.policy_loss.name in ("clipped", "clip_cov") and algorithm.ratio == "token"
        default = AlgorithmConfig()
        fits &= (algorithm.importance, algorithm.importance_cap) == (default.importance, default.importance_cap)
        return "behavior" if fits and self.rollout.max_staleness else "learner"

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_tokens

    @model_validator(mode="after")
    def _reward_fits_the_data(self) -> Self:
        reward = self.reward.for_kind(self.data.train.kind)
        for dataset in self.data.evaluation:
            reward.for_kind(dataset.kind)
        # Frozen for everybody else: what is written to the run's config.yaml should say which reward it was.
        object.__setattr__(self, "reward", reward)
        return self

    @model_validator(mode="after")
    def _length_penalty_fits_the_completion(self) -> Self:
        if self.algorithm.overlong_buffer_tokens > self.rollout.max_tokens:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens={self.algorithm.overlong_buffer_tokens} exceeds "
                f"rollout.max_tokens={self.rollout.max_tokens}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _group_is_large_enough_for_the_advantage(self) -> Self:
        method, size = self.algorithm.advantage, self.rollout.num_samples
        if size < (needed := method.min_size):
            raise ValueError(
                f"rollout.num_samples={size}: algorithm.advantage {method.name} compares at least {needed} completions "
                f"of a prompt with these parameters; set rollout.num_samples >= {needed}, or change the parameters"
            )
        return self

    @model_validator(mode="after")
    def _engines_fit_beside_the_learner(self) -> Self:
        needed = self.rollout.num_engines * self.rollout.tensor_parallel
        if self.cluster.colocate and needed > self.learner.num_ranks:
            raise ValueError(
                f"cluster.colocate: {self.rollout.num_engines} engines x {self.rollout.tensor_parallel} GPUs do not "
                f"fit on the learner's {self.learner.num_ranks}; lower rollout.num_engines, or raise learner.num_ranks"
            )
        return self

    @model_validator(mode="after")
    def _engines_and_learner_take_turns_on_shared_gpus(self) -> Self:
        if not self.cluster.colocate:
            return self
        if self.rollout.max_staleness:
            raise ValueError(
                f"cluster.colocate: engines sleep while the learner updates, so rollout.max_staleness="
                f"{self.rollout.max_staleness} cannot overlap the two; set it to 0, or cluster.colocate: false"
            )
        wanted, given = self.rollout.accelerator, self.learner.accelerator
        if wanted and given and wanted != given:
            raise ValueError(
                f"cluster.colocate: rollout.accelerator={wanted} and learner.accelerator={given} would be the same "
                "GPUs; give one type, or cluster.colocate: false"
            )
        return self

    @model_validator(mode="after")
    def _ranks_can_share_rows(self) -> Self:
        learner, sharing = self.learner, self.learner.sequence_parallel
        if sharing == 1:
            return self
        where = f"learner.sequence_parallel={sharing}"
        if learner.num_ranks % sharing:
            raise ValueError(f"{where} does not divide learner.num_ranks={learner.num_ranks}; make it a divisor")
        if self.model.attention not in ("sdpa", "flash_attention_2"):
            raise ValueError(f"{where} needs model.attention: sdpa or flash_attention_2, not {self.model.attention}")
        if self.model.attention == "sdpa" and learner.packing == "packed":
            raise ValueError(
                f"{where} with model.attention: sdpa cannot tell packed rows apart; set learner.packing: auto"
            )
        if self.uses_reference_model:
            raise ValueError(
                f"{where} goes without a resident reference model; set algorithm.estimator: reference, or 1"
            )
        return self

    @model_validator(mode="after")
    def _completions_can_share_prompts(self) -> Self:
        if self.learner.share_prefix != "always":
            return self
        if why := NO_PAIR_MASK.get(self.model.attention):
            raise ValueError(
                f"learner.share_prefix: always cannot be with model.attention: {self.model.attention} ({why}); set "
                "model.attention: sdpa or flex_attention, or learner.share_prefix: auto"
            )
        if self.learner.sequence_parallel > 1:
            raise ValueError(
                f"learner.share_prefix: always cannot be with learner.sequence_parallel="
                f"{self.learner.sequence_parallel}, whose exchange hands no mask to attention; set one of them to its "
                "default"
            )
        return self

    @model_validator(mode="after")
    def _penalty_has_an_old_policy(self) -> Self:
        """In the first update after on-policy rollouts the policy is the old one, and nothing holds it there."""
        behind = self.proximal_policy == "behavior" and self.rollout.max_staleness > 0
        if self.algorithm.policy_loss.name == "kl_cov" and self.algorithm.num_minibatches == 1 and not behind:
            raise ValueError(
                "algorithm.policy_loss: kl_cov holds tokens near the policy at the start of the step, and with "
                "algorithm.num_minibatches=1 there is no update after the first; set algorithm.num_minibatches >= 2, "
                "or rollout.max_staleness with algorithm.proximal_policy: behavior"
            )
        return self

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> Self:
        rollout, parts = self.rollout, self.algorithm.num_minibatches
        if rollout.num_samples < 2:
            raise ValueError("rollout.num_samples=1: a group of one has no advantage; set rollout.num_samples >= 2")
        if (count := rollout.num_prompts * rollout.num_samples) > MAX_COMPLETIONS_A_STEP:
            raise ValueError(
                f"rollout.num_prompts={rollout.num_prompts} x rollout.num_samples={rollout.num_samples} are {count:,} "
                f"completions a step, more than {MAX_COMPLETIONS_A_STEP:,}; lower one of them"
            )
        if rollout.num_prompts % parts:
            raise ValueError(
                f"rollout.num_prompts={rollout.num_prompts} does not divide into "
                f"algorithm.num_minibatches={parts}; make it a multiple of {parts}"
            )
        if self.uses_reference_samples and self.reference.rows_per_step % parts:
            raise ValueError(
                f"reference.rows_per_step={self.reference.rows_per_step} does not divide into "
                f"algorithm.num_minibatches={parts}; make it a multiple of {parts}"
            )
        if self.learner.micro_batch_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"learner.micro_batch_tokens={self.learner.micro_batch_tokens} cannot hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_tokens = {self.max_sequence_tokens}; "
                f"set it to at least {self.max_sequence_tokens}"
            )
        return self
