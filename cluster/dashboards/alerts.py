"""Alert rules for Prometheus: what a person should be told of a run, and what to do then.

`python -m cluster.dashboards.alerts` writes `alerts.yaml` beside this file; a test keeps the two equal. Name that file
under `rule_files` of a Prometheus that scrapes the Ray cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cluster.dashboards import bounds
from cluster.dashboards.queries import counted, mean, newest, series

ALERTS = Path(__file__).with_name("alerts.yaml")
RUN = "Run {{ $labels.run }}"
# Events of a process or an engine that ended, and of one that came in its place.
LOSSES = (
    "engine_lost",
    "engine_given_up",
    "engine_replaced",
    "learner_restarted",
    "reward_worker_restarted",
    "reward_worker_replaced",
    "resumed",
)
# The checks on a run's own curves (dphrl.health); rising_gap has a rule of its own.
FINDINGS = ("exploding_divergence", "entropy_collapse", "one_reward", "no_signal", "clipping", "exploding_gradient")
DAMAGES = ("buffer_damaged", "chunk_damaged", "chunks_set_aside", "evaluation_damaged", "export_failed")


@dataclass(frozen=True)
class Rule:
    """expression: holds while something is wrong; its result keeps the label `run`. lasting: so long it must hold.
    summary: what is wrong. seen: the numbers behind it. remedy: what to do. {{ }} is filled in by Prometheus."""

    name: str
    expression: str
    lasting: str
    severity: Literal["info", "warning", "critical"]
    summary: str
    seen: str
    remedy: str


def _events(names: Sequence[str]) -> str:
    matcher = f'event=~"{"|".join(names)}"'
    return f"{counted('dphrl_events_total', '15m', matcher)} > 0"


def _no_step() -> str:
    window = f"{bounds.NO_STEP_MINUTES}m"
    still = f"max by (run) (changes({series('dphrl_step')}[{window}])) == 0"
    # The run is alive now, and was when the window began.
    return f"{newest('dphrl_step')} and on (run) ({still}) and on (run) {newest('dphrl_step', before=window)}"


def _falling_pass_at_k() -> str:
    several = 'k!="1"'
    base = newest("dphrl_pass_at_k", 'policy="base"', several, by="run, dataset, k")
    now = newest("dphrl_pass_at_k", 'policy="current"', several, by="run, dataset, k")
    return f"{now} < {bounds.KEPT:g} * {base}"


def _rising_gap() -> str:
    now, before = (mean("dphrl_mean_logprob_gap", "30m", before=ago) for ago in ("", "2h"))
    return f"{now} > {bounds.GAP_GROWTH} * {before} > {bounds.SMALL_GAP:.5f}"


def _off_policy() -> str:
    weight = mean("dphrl_importance_mean", "30m")
    return f"abs({weight} - 1) > {bounds.IMPORTANCE:g}"


def _idle_beside_others() -> str:
    one = mean("dphrl_engine_busy_fraction", "30m")
    return f"{one} < on (run) group_left () (0.5 * avg by (run) ({one}))"


def _hung() -> str:
    name, window = "dphrl_engine_completions_pending", "15m"
    still = f"max by (run, engine) (changes({series(name)}[{window}])) == 0"
    return f"{newest(name)} > 0 and ({still}) and {newest(name, before=window)}"


def _fewer_engines() -> str:
    return f"{newest('dphrl_rollout_engines')} < {newest('dphrl_rollout_engines', before='1h')}"


def _no_verdicts() -> str:
    failed = counted("dphrl_reward_status_total", "15m", 'status="infrastructure_error"', by="run")
    return f"{failed} / {counted('dphrl_reward_status_total', '15m', by='run')} > {bounds.NO_VERDICT:g}"


GROUPS: dict[str, tuple[Rule, ...]] = {
    "dphrl-progress": (
        Rule(
            "DphrlNoStep",
            _no_step(),
            "5m",
            "critical",
            f"{RUN} has made no step for {bounds.NO_STEP_MINUTES} minutes",
            "It stands at step {{ $value }}.",
            "The last lines of run.log in its folder say what it waits for and until when. If a step or an evaluation "
            "of this run is that long, raise NO_STEP_MINUTES in cluster/dashboards/bounds.py.",
        ),
        Rule(
            "DphrlSkippedSteps",
            f"{counted('dphrl_skipped_steps_total', '15m')} > 0",
            "0m",
            "warning",
            f"{RUN} skipped optimizer steps",
            "In 15 minutes {{ $value | humanize }} steps had a loss or gradient that was not finite; they left the "
            "weights as they were.",
            "Lower learner.lr or learner.grad_clip. After learner.max_skipped_steps of them in a row the run stops.",
        ),
        Rule(
            "DphrlUnwell",
            _events(FINDINGS),
            "0m",
            "warning",
            f"{RUN}: {{{{ $labels.event }}}}",
            "A check on its own curves found {{ $labels.event }}.",
            "Its line in events.jsonl of the run folder has the numbers and the remedy. `dphrl config health` explains "
            "the bounds.",
        ),
        Rule(
            "DphrlDiversityFalls",
            _falling_pass_at_k(),
            "0m",
            "warning",
            f"{RUN} loses Pass@{{{{ $labels.k }}}} on {{{{ $labels.dataset }}}}",
            f"It is {{{{ $value | humanizePercentage }}}}, less than {bounds.KEPT:.0%} of the initial policy's.",
            "Raise algorithm.eta or lower learner.lr, and go on from a checkpoint before the fall.",
        ),
    ),
    "dphrl-gap": (
        Rule(
            "DphrlGapNearItsBound",
            _events(["rising_gap"]),
            "0m",
            "warning",
            f"{RUN}: engines and learner drift apart",
            "The mean log-prob gap after a sync has come near sync.max_mean_logprob_gap, at which the run stops.",
            "Lower learner.lr. If the model is well, raise sync.max_mean_logprob_gap with --resume.",
        ),
        Rule(
            "DphrlGapRising",
            _rising_gap(),
            "10m",
            "warning",
            f"{RUN}: the log-prob gap rises",
            f"Its mean is {{{{ $value }}}} nats, more than {bounds.GAP_GROWTH} times that of two hours before.",
            "Check model.dtype and model.attention, and lower learner.lr before the gap reaches "
            "sync.max_mean_logprob_gap.",
        ),
        Rule(
            "DphrlOffPolicy",
            _off_policy(),
            "10m",
            "warning",
            f"{RUN} trains on samples of another policy",
            "The mean importance weight of its tokens is {{ $value | humanize }} and should be near 1.",
            "Check model.dtype and model.attention; with stale samples lower rollout.max_staleness.",
        ),
    ),
    "dphrl-work": (
        Rule(
            "DphrlEngineIdle",
            _idle_beside_others(),
            "10m",
            "warning",
            f"{RUN}: engine {{{{ $labels.engine }}}} is idle beside the others",
            "It had work in {{ $value | humanizePercentage }} of the last half hour, less than half of the mean.",
            "Look into its log and at its node; rollout.on_failure=replace brings another one when it fails.",
        ),
        Rule(
            "DphrlEngineHangs",
            _hung(),
            "15m",
            "warning",
            f"{RUN}: engine {{{{ $labels.engine }}}} returns nothing",
            "For half an hour {{ $value }} of its completions have been pending.",
            "rollout.completion_timeout_s gives its work to others; run.log and the engine's log on its node say more.",
        ),
        Rule(
            "DphrlEnginesIdle",
            f"{mean('dphrl_rollout_busy_fraction', '30m')} < {bounds.BUSY:g}",
            "30m",
            "info",
            f"{RUN}: its engines are mostly idle",
            "They had work in {{ $value | humanizePercentage }} of the last half hour.",
            "Set rollout.max_staleness=1, or give the learner more ranks, or this run fewer engines (dphrl scale).",
        ),
        Rule(
            "DphrlLearnerWaits",
            f"{mean('dphrl_waiting_share', '30m')} > {bounds.WAITING:g}",
            "30m",
            "info",
            f"{RUN}: the learner mostly waits",
            "It waited for rollouts in {{ $value | humanizePercentage }} of the last half hour.",
            "Give the run more engines (dphrl scale), or set rollout.max_staleness=1.",
        ),
        Rule(
            "DphrlGradersBehind",
            f"max by (run) (min_over_time({series('dphrl_completions_waiting')}[10m])) > 0",
            "5m",
            "warning",
            f"{RUN}: the queue of the graders is never empty",
            "At least {{ $value }} completions have waited for a reward worker all the time for 10 minutes.",
            "Raise reward.num_workers (dphrl scale --reward while it runs), or make the reward faster.",
        ),
    ),
    "dphrl-losses": (
        Rule(
            "DphrlLostOrRestarted",
            _events(LOSSES),
            "0m",
            "warning",
            f"{RUN}: {{{{ $labels.event }}}}",
            "{{ $labels.event }} came {{ $value | humanize }} times in 15 minutes; the run goes on.",
            "If it comes again, look for the reason that its line in events.jsonl and run.log names: memory, a node, a "
            "GPU. learner.max_restarts and rollout.max_replacements bound how often a run bears it.",
        ),
        Rule(
            "DphrlEnginesMissing",
            _fewer_engines(),
            "30m",
            "warning",
            f"{RUN} has fewer engines than an hour ago",
            "{{ $value }} are left.",
            "If nobody scaled it down: run.log says why one was given up; `dphrl scale` brings another.",
        ),
        Rule(
            "DphrlNoVerdicts",
            _no_verdicts(),
            "0m",
            "warning",
            f"{RUN}: the reward fails",
            "It gave no verdict on {{ $value | humanizePercentage }} of the completions of 15 minutes.",
            "run.log has the first three failures. Three steps in a row without any verdict stop the run.",
        ),
        Rule(
            "DphrlDamagedFile",
            _events(DAMAGES),
            "0m",
            "warning",
            f"{RUN}: {{{{ $labels.event }}}}",
            "A file in its folder is not as it was written, or could not be.",
            "Its line in events.jsonl names the file and the remedy; look after the disk.",
        ),
        Rule(
            "DphrlDiskNearlyFull",
            f"{newest('dphrl_disk_free_share')} < {bounds.DISK_FREE:g}",
            "5m",
            "critical",
            f"{RUN}: the disk of its folder is nearly full",
            "{{ $value | humanizePercentage }} of it are free; a checkpoint that does not fit stops the run.",
            "Make room, or stop it with SIGTERM and --resume with a lower checkpoint.keep. `dphrl plan` says how large "
            "a checkpoint is.",
        ),
    ),
}


def rules() -> dict[str, Any]:
    """The whole file, as Prometheus reads it."""
    return {"groups": [{"name": name, "rules": [_entry(rule) for rule in group]} for name, group in GROUPS.items()]}


def _entry(rule: Rule) -> dict[str, Any]:
    return {
        "alert": rule.name,
        "expr": rule.expression,
        "for": rule.lasting,
        "labels": {"severity": rule.severity},
        "annotations": {"summary": rule.summary, "description": f"{RUN}: {rule.seen} What to do: {rule.remedy}"},
    }


def render() -> str:
    """The file's text."""
    head = "# Alert rules of dphrl for Prometheus (2.42 or newer). Made by: python -m cluster.dashboards.alerts\n"
    return head + yaml.safe_dump(rules(), sort_keys=False, width=110, allow_unicode=True)


def main() -> None:
    """Write the rules' file and print its path."""
    ALERTS.write_text(render(), encoding="utf-8")
    print(ALERTS)


if __name__ == "__main__":
    main()
