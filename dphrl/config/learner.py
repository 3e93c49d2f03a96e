"""The learner's part of the configuration: the optimizer, and how its work is spread."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dphrl.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProcessCount,
    Section,
)


class LearnerConfig(Section):
    num_steps: PositiveInt = 100
    """Steps of the run. Each samples rollout.num_prompts groups, takes algorithm.num_minibatches optimizer steps, and
    sends the new weights to the engines."""
    lr: PositiveFloat = 1e-6
    """The learning rate of AdamW, at its highest. Larger learns faster and drifts further from the initial policy."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """The learning rate after the warm-up. constant keeps lr; linear falls to lr_final_fraction of it at the last
    step."""
    lr_final_fraction: Fraction = 0.1
    """The share of lr that lr_schedule: linear ends with. 0 ends without learning."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises to lr in a line. 0 starts with lr: AdamW's first steps are of full
    size whatever the gradient."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay. 0 is none; a larger value pulls the weights towards zero faster."""
    grad_clip: PositiveFloat = 1.0
    """The largest norm of the gradient; a larger gradient is scaled down to it."""
    max_skipped_steps: PositiveInt = 3
    """Steps in a row with a loss or gradient norm that is not finite after which the run stops. Such an optimizer step
    changes nothing: it is skipped, counted as learner/skipped_steps and told in events.jsonl."""
    micro_batch_tokens: PositiveInt = 16384
    """Token positions of one micro-batch, padding counted; rows are gathered up to this, and on a CPU only those of
    like length. It must hold one sequence of data.max_prompt_tokens + rollout.max_tokens. More are faster and take more
    memory for activations; the gradient is the same."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """How rows share a micro-batch. packed puts them end to end in one sequence, without padding, which is faster with
    model.attention: flash_attention_2 or flex_attention and slower with others; padded puts rows of like length side by
    side. auto is packed with these two, else padded. A model in which packed rows would see each other is refused when
    the learner starts."""
    share_prefix: Literal["auto", "always", "never"] = "auto"
    """Whether the completions of a prompt share it in the learner: one sequence of the prompt and all of them, in which
    no completion sees another, computes the prompt once. auto does so where it costs less by arithmetic, in models and
    with kernels that can; always as far as learner.micro_batch_tokens allows, and is refused where it cannot be. It
    needs model.attention: sdpa or flex_attention, layers of full attention, and learner.sequence_parallel: 1. The
    gradient is the same up to rounding."""
    gradient_checkpointing: bool = False
    """Whether activations are computed a second time in the backward pass instead of being kept. It saves most of
    their memory and costs about one more forward pass."""
    num_ranks: ProcessCount = 1
    """Learner processes, each on a GPU of its own where there are GPUs. They share the rows of a step."""
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    """What DeepSpeed's ZeRO shards over the ranks: 1 the optimizer's state, 2 the gradients too, 3 the weights too. A
    higher stage takes less memory on each rank and more communication. On one rank there is nothing to shard."""
    offload: Literal["none", "optimizer"] = "none"
    """What a GPU's rank keeps in host memory. optimizer is AdamW's state and, where there are any, the float32 master
    weights, which are then updated there: that frees 12 bytes a parameter on the GPUs and takes longer. On a CPU it
    changes nothing, because they are there already. A checkpoint can be resumed with either."""
    sequence_parallel: PositiveInt = 1
    """Ranks next to each other that share each row, for rows whose activations one GPU cannot hold (DeepSpeed's
    Ulysses). It divides num_ranks and the model's attention heads, needs model.attention: sdpa (one row at a time) or
    flash_attention_2 (rows packed), and adds four exchanges in every layer: try gradient_checkpointing first."""
    accelerator: str | None = None
    """The type of GPU, in Ray's words (such as H100), that the learner must have on a cluster of several types; null
    takes any. A cluster that has too few of it is refused."""
    cpus_per_rank: PositiveFloat = 0.75
    """Ray's CPU share for a learner rank. Ray packs by this number and does not enforce it."""
    threads_per_rank: PositiveInt = 2
    """Computing threads of a learner rank on a CPU. More than the machine's free cores make it slower."""
    max_restarts: NonNegativeInt = 3
    """How often a learner that died or hangs is started again, from the newest checkpoint, before another checkpoint
    is made. After that the run stops; 0 stops at once."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds that the actors have to start, in which kernels are compiled on first use. Collective operations of the
    ranks have the same deadline, and with sync.backend nccl or ipc also the time in which rank 0 asks the engines. Of
    an update it is the longest time without a micro-batch."""
