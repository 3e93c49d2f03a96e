"""The configuration: one YAML file (or preset), dotted overrides on the command line, validated before anything starts.

Every model is frozen and refuses unknown keys; a bad value becomes one line that names the field, the value
and the remedy. What needs the model, the data or the user's reward to be checked is checked in `dphrl.prepare`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dphrl.config.algorithm import AlgorithmConfig
from dphrl.config.data import DataConfig, RewardConfig
from dphrl.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ModelConfig(Section):
    # An embedded model's name (tiny-factor, smollm2-135m-instruct), a Hugging Face directory, or a hub name.
    path: str = "tiny-factor"
    # auto: bfloat16 on a GPU, float32 on a CPU (where bfloat16 is emulated and several times slower).
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # The learner's attention kernel. Part of the reference fingerprint: another kernel rounds differently.
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    # Remote code runs with your rights; off unless you vouch for the model.
    trust_remote_code: bool = False


class RolloutConfig(Section):
    num_prompts: PositiveInt = 32
    num_samples: PositiveInt = 8
    temperature: PositiveFloat = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0
    max_tokens: PositiveInt = 256
    # A completion cut at max_tokens: keep grades it as it is; mask leaves it out of the loss, not of the group's mean.
    truncated: Literal["keep", "mask"] = "keep"
    # Weight updates that may lie between a completion and its use. 0 is strictly on-policy; 1 overlaps
    # generation with the update.
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    num_engines: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    # Ray's share for an engine; engine and learner take turns when on-policy, so together they may fit two CPUs.
    cpus_per_engine: PositiveFloat = 0.75
    threads_per_engine: PositiveInt = 2
    # CPU engines: bounds the KV cache. GPU engines take gpu_memory_utilization instead.
    kv_cache_gib: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    max_concurrent_sequences: PositiveInt = 256
    # CUDA graphs and compilation cost minutes to build; worth it on a GPU only.
    enforce_eager: bool | None = None
    # No completion from any engine for this long is an error that says so, not a hang.
    timeout_s: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _sampled_policy_is_trained_policy(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p={self.top_p:g}, top_k={self.top_k}: samples would come from another distribution than the "
                "log-probs trained on; set top_p: 1.0 and top_k: 0 (temperature is accounted for)"
            )
        return self


class ReferenceConfig(Section):
    # K responses of the initial policy per training prompt, once.
    num_samples: PositiveInt = 8
    # At least this many of K correct makes a prompt near-perfect (D_pef). Changing this, or the next, samples nothing
    # anew.
    threshold: PositiveInt = 7
    # m correct responses stored per near-perfect prompt.
    stored_per_prompt: PositiveInt = 1
    # D_pef rows in each step's divergence term.
    rows_per_step: NonNegativeInt = 64
    # Prompts with 0 of K correct: keep them in D_exp, or drop them as hopeless.
    all_wrong: Literal["keep", "drop"] = "keep"
    # Prompts sampled and graded before the next are handed out. A killed stage loses at most one such chunk;
    # small ones leave the engines idle at each chunk's end.
    prompts_per_chunk: PositiveInt = 512
    # The largest buffer, as arrays: 4 bytes per prompt token id, completion token id and log-prob. Every process
    # that reads a whole buffer holds it as Python objects, which take several times as much.
    max_bytes: PositiveInt = 4 * 2**30

    @model_validator(mode="after")
    def _threshold_reachable(self) -> Self:
        if self.threshold > self.num_samples:
            raise ValueError(
                f"threshold={self.threshold} can never be reached with num_samples={self.num_samples}; "
                f"set reference.threshold <= {self.num_samples}"
            )
        return self


class LearnerConfig(Section):
    num_steps: PositiveInt = 100
    lr: PositiveFloat = 1e-6
    lr_schedule: Literal["constant", "linear"] = "constant"
    # linear: the last step's share of lr.
    lr_final_fraction: Fraction = 0.1
    warmup_steps: NonNegativeInt = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    grad_clip: PositiveFloat = 1.0
    # Rows are gathered into micro-batches up to this many token positions (padding counted).
    micro_batch_tokens: PositiveInt = 16384
    # packed: rows end to end in one sequence, no padding (needs a varlen kernel to be fast);
    # padded: rows of like length side by side. auto: packed with flash attention, else padded.
    packing: Literal["auto", "packed", "padded"] = "auto"
    # Trades a second forward pass for activation memory.
    gradient_checkpointing: bool = False
    num_ranks: PositiveInt = 1
    # 1 shards optimizer state, 2 gradients too, 3 weights too. (On one rank 1 is plain data parallelism.)
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    cpus_per_rank: PositiveFloat = 0.75
    threads_per_rank: PositiveInt = 2
    # Start-up compiles kernels on first use; collectives have the same deadline.
    timeout_s: PositiveFloat = 1800.0


class SyncConfig(Section):
    # How weights reach the engines. object_store works anywhere: learner -> Ray object store -> each engine.
    backend: Literal["object_store"] = "object_store"
    # Completions each engine samples after a sync for the learner to score; covers cache, decode and head.
    num_probes: PositiveInt = 8
    # Engines take new weights and answer probes within this, or the run stops. Under overlap (max_staleness 1) an
    # engine first finishes the rollouts it is at, and this must cover them too.
    timeout_s: PositiveFloat = 1800.0
    # The largest |engine - learner| log-prob of a probe token; null: 1e-3 in float32, 0.5 in bfloat16.
    max_logprob_gap: PositiveFloat | None = None


class CheckpointConfig(Section):
    # 0 writes only the last one.
    every_steps: NonNegativeInt = 0
    # Older ones are removed once a newer one is complete.
    keep: PositiveInt = 2


class EvaluationConfig(Section):
    # Samples per prompt for Pass@k; 0 switches evaluation off.
    num_samples: NonNegativeInt = 16
    k: tuple[PositiveInt, ...] = (1, 8)
    # 0 evaluates the base and the final model only.
    every_steps: NonNegativeInt = 0

    @model_validator(mode="after")
    def _k_within_samples(self) -> Self:
        if self.num_samples and max(self.k, default=1) > self.num_samples:
            raise ValueError(
                f"k={max(self.k)} needs at least as many samples; set evaluation.num_samples >= {max(self.k)}"
            )
        return self


class TrackingConfig(Section):
    tensorboard: bool = True
    # Metrics for a Prometheus that scrapes the Ray cluster; without effect inline. cluster/dashboards has the charts.
    prometheus: bool = True
    # Need the extra of the same name. Where they report to is their own environment's matter (WANDB_MODE,
    # MLFLOW_TRACKING_URI, ...).
    wandb: bool = False
    mlflow: bool = False
    # The project of W&B, the experiment of MLflow.
    project: str = "dphrl"
    # Graded completions written to samples/ per step, for reading.
    samples_per_step: NonNegativeInt = 8


class ClusterConfig(Section):
    # auto joins the cluster named by RAY_ADDRESS, else starts one on this machine; or give host:port.
    address: str = "auto"
    # Only for a cluster started here. Logical CPUs: actors' shares must fit.
    num_cpus: PositiveInt | None = None
    # Must hold the model once, to sync it. null: Ray's own choice, 30 % of the memory.
    object_store_gib: PositiveFloat | None = None
    # Engines run on the learner's GPUs instead of their own; lower rollout.gpu_memory_utilization to what training
    # leaves. Without effect where there is no GPU.
    colocate: bool = False
    # A plan that does not fit the present nodes: none refuses it; cpu and gpu ask Ray's autoscaler for nodes and wait
    # (a cluster scaled down to nothing does not show whether it has GPUs).
    autoscaling: Literal["none", "cpu", "gpu"] = "none"
    # How long to wait for resources, and for nodes to come, before saying which are missing.
    placement_timeout_s: PositiveFloat = 120.0


class Config(Section):
    """A complete run. `dphrl plan CONFIG` prints one resolved."""

    # The run's folder below run_dir.
    run_name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "run"
    run_dir: str = "runs"
    seed: NonNegativeInt = 0
    # Per-request seeds in the engines and deterministic kernels in the learner: slower, repeatable.
    deterministic: bool = False
    model: ModelConfig = ModelConfig()
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = RolloutConfig()
    reference: ReferenceConfig = ReferenceConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def folder(self) -> Path:
        """Where the run keeps everything."""
        return Path(self.run_dir).expanduser() / self.run_name

    @property
    def uses_divergence(self) -> bool:
        return self.algorithm.divergence.name != "none" and self.algorithm.eta > 0

    @property
    def uses_reference_samples(self) -> bool:
        """Whether there is a reference stage: a split, a buffer, rehearsal rows."""
        return self.uses_divergence and self.algorithm.estimator != "rollout"

    @property
    def uses_reference_model(self) -> bool:
        """Whether learner ranks hold a frozen copy of the initial policy."""
        return self.uses_divergence and self.algorithm.estimator != "reference"

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
    def _engines_fit_beside_the_learner(self) -> Self:
        needed = self.rollout.num_engines * self.rollout.tensor_parallel
        if self.cluster.colocate and needed > self.learner.num_ranks:
            raise ValueError(
                f"cluster.colocate: {self.rollout.num_engines} engines x {self.rollout.tensor_parallel} GPUs do not "
                f"fit on the learner's {self.learner.num_ranks}; lower rollout.num_engines, or raise learner.num_ranks"
            )
        return self

    @model_validator(mode="after")
    def _batch_arithmetic(self) -> Self:
        rollout, parts = self.rollout, self.algorithm.num_minibatches
        if rollout.num_samples < 2:
            raise ValueError("rollout.num_samples=1: a group of one has no advantage; set rollout.num_samples >= 2")
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
