"""What the dashboard asks: each panel is a question about a run, the numbers that answer it, and what to do about a
bad answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.dashboards import bounds


@dataclass(frozen=True)
class Panel:
    """title: the question. families: shown in one chart, which has the unit of the first one. when_bad: what to do
    when the answer is bad. quantiles: shown of a histogram. above, below: a line that the answer is bad beyond."""

    title: str
    families: Sequence[str]
    when_bad: str
    width: int = 8
    log_scale: bool = False
    quantiles: Sequence[float] = (0.5, 0.95)
    above: float | None = None
    below: float | None = None


def _row(title: str, *panels: Panel) -> tuple[str, tuple[Panel, ...]]:
    return title, panels


ROWS = (
    _row(
        "At a glance",
        Panel(
            "Is anything lost or restarted?",
            ["dphrl_events_total"],
            "Events in $window; each has a line that says what to do in events.jsonl and run.log of the run folder.",
        ),
        Panel(
            "Is diversity falling?",
            ["dphrl_pass_at_k"],
            "Current below base at the largest k: raise algorithm.eta, or go back to an earlier checkpoint.",
        ),
        Panel(
            "Is the gap rising?",
            ["dphrl_mean_logprob_gap", "dphrl_logprob_gap", "dphrl_rollout_logprob_gap"],
            "Lower learner.lr; beyond sync.max_mean_logprob_gap the run stops. Check model.dtype and model.attention.",
            log_scale=True,
        ),
        Panel(
            "Is an engine idle?",
            ["dphrl_engine_busy_fraction"],
            "One alone: look into its log on its node. All of them: rollout.max_staleness=1, or more learner ranks.",
            below=bounds.BUSY,
        ),
        Panel(
            "Does the learner wait?",
            ["dphrl_waiting_share", "dphrl_rollout_busy_fraction"],
            "High with busy engines: more engines (dphrl scale). High with idle ones: rollout.max_staleness=1.",
            above=bounds.WAITING,
        ),
        Panel(
            "Is the disk nearly full?",
            ["dphrl_disk_free_share"],
            "Make room, or lower checkpoint.keep and --resume: a checkpoint that does not fit stops the run.",
            below=bounds.DISK_FREE,
        ),
    ),
    _row(
        "Does it learn?",
        Panel(
            "Does it go on?",
            ["dphrl_step", "dphrl_policy_version"],
            "A flat line: the last lines of run.log say what the run waits for, and how long it will.",
        ),
        Panel(
            "Does the reward rise?",
            ["dphrl_reward_mean", "dphrl_reward_signal_mean"],
            "Read samples/ of the run folder: answers that the reward does not find, or problems that are too hard.",
        ),
        Panel(
            "Do prompts teach anything?",
            ["dphrl_zero_variance_fraction", "dphrl_clip_fraction"],
            "Many flat groups: other prompts, or algorithm.dynamic_sampling_rounds. Much clipping: lower learner.lr.",
        ),
        Panel(
            "Is the policy loss steady?",
            ["dphrl_policy_loss"],
            "It is near 0 by nature; a jump: look at samples/ of that step, and lower learner.lr.",
        ),
        Panel(
            "Does the gradient explode?",
            ["dphrl_grad_norm"],
            "Lower learner.lr or learner.grad_clip; dphrl replay takes the step again if tracking.replay_steps is set.",
            log_scale=True,
        ),
        Panel(
            "Is the learning rate what was meant?",
            ["dphrl_learner_lr"],
            "Set learner.lr, learner.lr_schedule and learner.warmup_steps; a resumed run needs --insist for that.",
        ),
    ),
    _row(
        "Does it stay diverse?",
        Panel(
            "Does it still solve what the base solves?",
            ["dphrl_retention"],
            "Raise algorithm.eta; more near-perfect prompts (lower reference.threshold) rehearse more of it.",
            width=12,
        ),
        Panel(
            "Are there fewer kinds of solutions?",
            ["dphrl_distinct_correct"],
            "Raise algorithm.eta, and compare the forward_kl and js divergences.",
            width=12,
        ),
        Panel(
            "Is greedy decoding right more often?",
            ["dphrl_greedy"],
            "Falling while Pass@k stays: nothing is lost, but learning is slow; raise learner.lr.",
        ),
        Panel(
            "Does the entropy collapse?",
            ["dphrl_entropy"],
            "Raise algorithm.eta or algorithm.clip_high, or lower learner.lr.",
        ),
        Panel(
            "Does the policy leave the initial one?",
            ["dphrl_divergence_loss"],
            "Growing without end: lower learner.lr or raise algorithm.eta, and resume from before it grew.",
        ),
        Panel(
            "Are rehearsed answers forgotten?",
            ["dphrl_divergence_log_u_mean"],
            "Far below 0 the policy gives up what the base knew: raise algorithm.eta.",
        ),
        Panel(
            "Is the divergence in its exact range?",
            ["dphrl_divergence_continued_fraction"],
            "Above 0 some tokens are e^10 times less likely than before: lower learner.lr.",
        ),
        Panel(
            "Is there enough to rehearse?",
            ["dphrl_divergence_rows"],
            "0: no prompt is near-perfect; lower reference.threshold.",
        ),
    ),
    _row(
        "Where does the time go?",
        Panel(
            "How fast does it sample?",
            ["dphrl_tokens_per_s"],
            "Falling: longer completions, an engine fewer, or a busy neighbour on the node.",
        ),
        Panel(
            "Is one engine slower?",
            ["dphrl_engine_tokens_per_s"],
            "Look at its node: other work on the GPU, or a hot one.",
        ),
        Panel(
            "How much was sampled?",
            ["dphrl_rollout_tokens_total"],
            "Tokens in $window; 0: the run waits, see run.log.",
        ),
        Panel(
            "Do steps take longer?",
            ["dphrl_step_seconds"],
            "Median and 95th percentile over $window; the next chart shows the part that grows.",
        ),
        Panel(
            "Which part of a step is long?",
            ["dphrl_rollout_seconds", "dphrl_reward_seconds", "dphrl_learn_seconds", "dphrl_sync_seconds"],
            "Rollout: more engines. Reward: reward.num_workers. Learn: more ranks. Sync: a faster sync.backend.",
        ),
        Panel(
            "Is the learner slow?",
            ["dphrl_learner_tokens_per_s"],
            "Raise learner.micro_batch_tokens, or add ranks (learner.num_ranks).",
        ),
        Panel(
            "Are the GPUs of the learner used well?",
            ["dphrl_learner_mfu"],
            "Raise learner.micro_batch_tokens; turn learner.offload and gradient_checkpointing off if memory allows.",
        ),
        Panel(
            "Do weights travel fast enough?",
            ["dphrl_sync_gb_per_s"],
            "Take sync.backend=nccl or ipc where the GPUs allow it; object_store goes through the memory of the nodes.",
        ),
        Panel(
            "Do completions grow?",
            ["dphrl_completion_tokens_mean"],
            "Toward rollout.max_tokens: raise it, or shape the reward (algorithm.overlong_buffer_tokens).",
            width=4,
        ),
        Panel(
            "Is sampling repeated?",
            ["dphrl_rollout_rounds"],
            "At algorithm.dynamic_sampling_rounds: prompts are too easy or too hard.",
            width=4,
        ),
        Panel(
            "Does an engine hang?",
            ["dphrl_engine_completions_pending"],
            "A flat line above 0: rollout.completion_timeout_s gives its work to another engine.",
        ),
        Panel(
            "Is a queue full?",
            ["dphrl_prompts_waiting", "dphrl_completions_waiting"],
            "Prompts: more engines. Completions that never reach 0: raise reward.num_workers (dphrl scale --reward).",
        ),
        Panel(
            "Do the graders keep up?",
            ["dphrl_reward_workers_busy"],
            "All of them always at work: raise reward.num_workers (dphrl scale --reward).",
        ),
    ),
    _row(
        "Is it well?",
        Panel(
            "Were optimizer steps skipped?",
            ["dphrl_skipped_steps_total"],
            "Counts in $window: a loss or gradient was not finite; learner.max_skipped_steps in a row stop the run.",
        ),
        Panel(
            "Are ratios out of bounds?",
            ["dphrl_ratio_bounded_fraction"],
            "Above 0 log-probs are broken: check model.dtype, and the gap above.",
        ),
        Panel(
            "Does the engine sample from the learner's policy?",
            ["dphrl_importance_mean"],
            "Away from 1: check model.dtype and model.attention, or lower rollout.max_staleness.",
        ),
        Panel(
            "Does the reward give verdicts?",
            ["dphrl_reward_status_total"],
            "Counts in $window. infrastructure_error: run.log has the first failures. Many timeouts: reward.timeout_s.",
            width=12,
        ),
        Panel(
            "Does grading take long?",
            ["dphrl_reward_latency_mean_seconds", "dphrl_reward_latency_max_seconds"],
            "Raise reward.num_workers; a single long one ends at reward.timeout_s.",
            width=12,
            log_scale=True,
        ),
        Panel(
            "Are samples stale?",
            ["dphrl_staleness"],
            "Never above rollout.max_staleness; lower that if learning is unsteady.",
        ),
        Panel(
            "Are answers cut off?",
            ["dphrl_truncated_fraction"],
            "Raise rollout.max_tokens, or set rollout.truncated: mask.",
        ),
        Panel(
            "Are all engines there?",
            ["dphrl_rollout_engines"],
            "Fewer than rollout.num_engines: run.log says why one was given up; dphrl scale brings another.",
        ),
        Panel(
            "Are engines replaced, completions asked for again?",
            ["dphrl_rollout_engines_replaced_total", "dphrl_rollout_resubmitted_total"],
            "Counts in $window; again and again: look into the engines' logs, and at the prompt that run.log names.",
        ),
        Panel(
            "Do graders fail?",
            ["dphrl_reward_retried_total", "dphrl_reward_restarts_total"],
            "Counts in $window: the reward dies or gives no verdict; run.log has its first three failures.",
        ),
        Panel(
            "Did the learner start again?",
            ["dphrl_learner_restarts"],
            "run.log names the rank, its node and the reason; learner.max_restarts of them stop the run.",
        ),
    ),
)
