"""What runs around the training: weight sync, checkpoints, evaluation, tracking, and the cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dphrl.config.section import NonNegativeInt, OptionalSampleCount, PositiveFloat, PositiveInt, Section

# Largest mean |engine - learner| log-prob over an engine's probes, by the learner's dtype, if the config gives none. In
# float32, rounding makes 1e-6 of it in the embedded model and 6e-6 in SmolLM2-135M; one old layer after one update at
# lr 1e-6 makes 2e-5 to 2e-4 and 3e-4, so that the other checks must find it. In bfloat16 rounding alone makes 3e-2 in
# SmolLM2-135M, and no bound sees an old layer.
DEFAULT_MAX_MEAN_GAP = {"float32": 5e-5, "bfloat16": 0.1}


class SyncConfig(Section):
    backend: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """How new weights reach the engines. nccl broadcasts them from the learner's first GPU to those of the engines; ipc
    hands them over within each GPU (cluster.colocate); object_store works anywhere: from the learner to Ray's object
    store, and from there to each engine. auto is object_store without GPUs, ipc with cluster.colocate, else nccl."""
    num_probes: PositiveInt = 8
    """Completions that each engine samples after a sync for the learner to score, which proves that both hold the
    same weights. They cover cache, decoding and output layer. More check more and take longer at every step."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds in which an engine must take one step of a sync, or it counts as failed: join the learner's group (nccl,
    once), start, take weights (with object_store: one chunk of them), finish, answer the probes."""
    max_mean_logprob_gap: PositiveFloat | None = None
    """The largest difference between an engine and the learner in the log-prob of a token, on average over the probes.
    Beyond it others are sampled once, and beyond it again the run stops. null is 5e-5 in float32 and 0.1 in bfloat16.
    Weights that an engine lacks are found by other means, whatever the bound."""

    def mean_gap_bound(self, dtype: str) -> float:
        """max_mean_logprob_gap in nats, or its default for the learner's dtype."""
        return DEFAULT_MAX_MEAN_GAP[dtype] if self.max_mean_logprob_gap is None else self.max_mean_logprob_gap

    @model_validator(mode="before")
    @classmethod
    def _engines_fail_at_any_time(cls, given: Any) -> Any:
        # rollout.on_failure took its place. Earlier versions wrote it to every config.yaml by themselves.
        if isinstance(given, dict) and given.get("on_failure") in ("stop", "replace"):
            return {name: value for name, value in given.items() if name != "on_failure"}
        return given

    @model_validator(mode="before")
    @classmethod
    def _bound_is_on_the_mean(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "max_logprob_gap" not in given:
            return given
        if given["max_logprob_gap"] is not None:
            raise ValueError(
                "sync.max_logprob_gap is no more: it was a bound on the largest difference, which a healthy model "
                "exceeds now and then; set sync.max_mean_logprob_gap, or leave it out for its default"
            )
        # What an earlier version wrote to config.yaml by itself.
        return {name: value for name, value in given.items() if name != "max_logprob_gap"}


class CheckpointConfig(Section):
    every_steps: NonNegativeInt = 0
    """Steps between checkpoints; 0 counts no steps. The last step always has one. A step waits until the state is
    copied to host memory (12 bytes for each trained parameter over all ranks, and the model on rank 0's node); it is
    written while the training goes on."""
    every_minutes: Annotated[float, Field(ge=0)] = 30.0
    """Minutes between checkpoints, beside every_steps: what a failure may cost at most. A step that ends later than
    that after the last checkpoint has one. 0 looks at no clock."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay. Older ones are removed once a newer one is complete."""
    keep_best: NonNegativeInt = 1
    """Checkpoints that stay besides because their evaluation was best: by Pass@k with the smallest of evaluation.k, on
    average over data.evaluation. Only steps that were evaluated (evaluation.every_steps) and have a checkpoint
    count."""
    restore: Literal["all", "weights"] = "all"
    """What --resume takes from a checkpoint. weights leaves the optimizer's moments there and begins with new ones, for
    a run whose moments are spoilt."""


class EvaluationConfig(Section):
    num_samples: OptionalSampleCount = 16
    """Samples per prompt from which Pass@k is estimated, besides one greedy answer. 0 switches evaluation off. More
    narrow the estimate and take longer."""
    k: tuple[PositiveInt, ...] = (1, 8)
    """Each k of Pass@k, the chance that one of k samples is right. None may exceed num_samples."""
    every_steps: NonNegativeInt = 0
    """Steps between evaluations during training. 0 evaluates the base and the final model only."""

    @model_validator(mode="after")
    def _k_within_samples(self) -> Self:
        if self.num_samples and max(self.k, default=1) > self.num_samples:
            raise ValueError(
                f"k={max(self.k)} needs at least as many samples; set evaluation.num_samples >= {max(self.k)}"
            )
        return self


class TrackingConfig(Section):
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard too, to tensorboard/ in the run's folder."""
    prometheus: bool = True
    """Whether metrics are offered to a Prometheus that scrapes the Ray cluster. Without effect inline.
    cluster/dashboards has the charts."""
    wandb: bool = False
    """Whether metrics go to Weights & Biases too. It needs dphrl[wandb]; where it reports to is the matter of its own
    environment (WANDB_MODE, ...)."""
    mlflow: bool = False
    """Whether metrics go to MLflow too. It needs dphrl[mlflow]; where it reports to is the matter of its own
    environment (MLFLOW_TRACKING_URI, ...)."""
    project: str = "dphrl"
    """The project in Weights & Biases, and the experiment in MLflow."""
    samples_per_step: NonNegativeInt = 8
    """Graded completions of each step that are written to samples/ in the run's folder, for reading. 0 writes
    none."""
    replay_steps: NonNegativeInt = 0
    """Steps, the newest, whose batches are kept in replay/ in the run's folder, so that `dphrl replay` can take them
    again from a checkpoint: at least the steps between two checkpoints, which are checkpoint.every_steps, or all that a
    run does in checkpoint.every_minutes where checkpoints come by the clock; and checkpoint.keep at least 2. Each takes
    16 bytes a token of the batch, and the time to hash weights and optimizer. 0 keeps none."""


class ClusterConfig(Section):
    address: str = "auto"
    """The Ray cluster to join, as host:port. auto joins the one named by RAY_ADDRESS, else starts one on this machine
    for the run."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a cluster that is started here, which the actors' shares must fit; without effect on a cluster
    that is joined. null is what this process may use: the processors it is bound to, or the quota of its container if
    that is less, without a fraction."""
    object_store_gib: PositiveFloat | None = None
    """Memory for Ray's object store, in GiB, of a cluster that is started here. A sync through it needs room for a few
    chunks of 32 MiB and the model's largest tensor, which is never split. null is Ray's own choice, 30 % of the
    memory."""
    colocate: bool = False
    """Whether engines run on the learner's GPUs instead of GPUs of their own. They take turns: engines sleep and give
    their memory back while the learner updates, and the learner puts gradients and optimizer into host memory while
    engines decode, but keeps its weights. rollout.gpu_memory_utilization must leave room for these: a value that cannot
    fit is refused with the arithmetic. It needs rollout.max_staleness: 0. Without effect where there is no GPU."""
    autoscaling: Literal["none", "cpu", "gpu"] = "none"
    """What happens to a plan that does not fit the present nodes. none refuses it; cpu and gpu ask Ray's autoscaler
    for nodes of that kind and wait, because a cluster scaled down to nothing does not show whether it has GPUs."""
    placement_timeout_s: PositiveFloat = 120.0
    """Seconds to wait for resources, and for nodes to come, before the run says which are missing and stops. While
    other runs hold them, queue_timeout_s counts instead."""
    queue_timeout_s: PositiveFloat = 86400.0
    """Seconds to wait at the start for what other runs on the cluster hold. The run says what it waits for."""
