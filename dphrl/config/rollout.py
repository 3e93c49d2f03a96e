"""The rollouts' part of the configuration: what each step samples, and the engines that sample it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dphrl.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProcessCount,
    SampleCount,
    Section,
)

# vLLM samples at this temperature whenever it is asked for a lower one other than 0, and log-probs would be of another.
MIN_TEMPERATURE = 0.01


class RolloutConfig(Section):
    num_prompts: PositiveInt = 32
    """Prompts of one step. It must be a multiple of algorithm.num_minibatches. More prompts steady the gradient and
    make a step longer."""
    num_samples: SampleCount = 8
    """Completions of each prompt: the group whose scores are compared, so at least 2. A step samples num_prompts x
    num_samples completions. Larger groups find rarer right answers and cost as much more time."""
    temperature: PositiveFloat = 1.0
    """The sampling temperature, in training and in evaluation, at least 0.01. Log-probs are of the distribution at this
    temperature. Above 1 the samples are more varied and more often wrong."""
    top_p: Fraction = 1.0
    """Must stay 1: a smaller nucleus would sample from another distribution than the one that is trained."""
    top_k: NonNegativeInt = 0
    """Must stay 0, which means no limit: fewer candidate tokens would sample from another distribution than the one
    that is trained."""
    max_tokens: PositiveInt = 256
    """The longest completion, in tokens; a longer one is cut there. Memory of the engines and of the learner, and the
    time of a step, grow with it."""
    truncated: Literal["keep", "mask"] = "keep"
    """What becomes of a completion that was cut at max_tokens. keep grades it as it is; mask leaves it out of the
    loss, but not out of its group's mean score."""
    max_staleness: NonNegativeInt = 0
    """Weight updates that may lie between a token and its use. 0 is strictly on-policy: engines and learner take
    turns. k has engines work on the next k steps as well, which is faster, and trains on tokens of slightly older
    weights; the first few bring nearly all of the speed."""
    on_update: Literal["recompute", "keep", "finish"] = "recompute"
    """What engines do with the completions they are at when new weights come (max_staleness above 0). recompute goes on
    with the new weights and reads the tokens so far anew, so that each token's log-prob is of one policy version. keep
    goes on with the keys and values of the old weights: faster with long contexts, but its log-probs are of no version.
    finish waits until all that engines have been handed is complete; a long completion makes everybody wait."""
    num_engines: ProcessCount = 1
    """vLLM engines that sample side by side. Each holds the whole model and a cache of its own, on tensor_parallel
    GPUs. `dphrl scale` changes their number while a training runs."""
    max_engines: ProcessCount | None = None
    """Up to how many engines a training has when nodes join its cluster: it starts more on them by itself. null starts
    none. Engines of a node that leaves start elsewhere if there is room, and else are given up."""
    tensor_parallel: ProcessCount = 1
    """GPUs over which one engine splits the model, on one node; without a GPU, worker processes. Above 1 is for models
    that one GPU cannot hold or serve fast enough. The model's heads and vocabulary must divide by it."""
    accelerator: str | None = None
    """The type of GPU, in Ray's words (such as L4), that engines must have on a cluster of several types; null takes
    any. A cluster that has too few of it is refused."""
    cpus_per_engine: PositiveFloat = 0.75
    """Ray's CPU share for an engine. Ray packs by this number and does not enforce it. Engine and learner take turns
    when on-policy, so that together they may fit two CPUs."""
    threads_per_engine: PositiveInt = 2
    """Computing threads of an engine on a CPU, which its tensor_parallel workers share, at least one each. More than
    the machine's free cores make it slower."""
    kv_cache_gib: PositiveInt = 1
    """Memory for the attention cache of an engine on a CPU, in GiB, all its workers together. More lets more
    completions decode at once. On a GPU gpu_memory_utilization decides instead."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """The share of a GPU's memory that an engine takes for weights and cache. Lower it where the learner is on the
    same GPU (cluster.colocate); `dphrl plan --simulate` says how far. Without effect on a CPU."""
    max_concurrent_sequences: PositiveInt = 256
    """Completions that an engine decodes at a time at most. More are faster together as long as the cache holds them
    all."""
    enforce_eager: bool | None = None
    """Whether engines do without CUDA graphs and compilation, which cost minutes to build and pay on a GPU only. null
    builds them on a GPU and not on a CPU."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds without a completion from any engine, and without a repair, after which the run stops with an error,
    instead of hanging."""
    completion_timeout_s: PositiveFloat | None = None
    """Seconds that an engine has for a completion which it can be at. One that is late is asked for again; an engine
    that returns nothing at all while several are late counts as failed. It must be well above the time of the longest
    completion, since one that is only slow is sampled twice. null is half of timeout_s."""
    on_failure: Literal["replace", "stop"] = "replace"
    """What becomes of an engine that dies, raises or hangs, at its work or in a sync. replace has others sample what it
    was at, starts another in its place, which joins at the next sync, and goes on as long as one engine is left. stop
    ends the run and names it. Engines that share GPUs with the learner (cluster.colocate) cannot be replaced; then the
    run stops in any case."""
    max_replacements: PositiveInt = 3
    """Times that an engine is started again in a run. One that fails once more is given up, and the run goes on with
    the others."""

    @model_validator(mode="after")
    def _engines_keep_the_temperature(self) -> Self:
        if self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature:g}: engines would sample at {MIN_TEMPERATURE:g} instead; set it to "
                f"{MIN_TEMPERATURE:g} or more (evaluations have a greedy answer of each prompt besides)"
            )
        return self

    @model_validator(mode="after")
    def _sampled_policy_is_trained_policy(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p={self.top_p:g}, top_k={self.top_k}: samples would come from another distribution than the "
                "log-probs trained on; set top_p: 1.0 and top_k: 0 (temperature is accounted for)"
            )
        return self
