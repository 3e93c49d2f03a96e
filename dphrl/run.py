"""A whole run around the loop: reference stage, evaluation before and after, checkpoints, resume, the final table."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.evaluation.stage import PartialResult, Summary, evaluate_sets
from dphrl.fingerprint import changed_parts, fingerprint, hash_model, hash_value
from dphrl.learner.checkpoint import MANIFEST, CheckpointManifest, list_checkpoints, read_manifest, save_checkpoint
from dphrl.loop import Metrics, Parts, train
from dphrl.prepare import Prepared
from dphrl.protocols import ReferenceStore
from dphrl.reference.buffer import ReferenceBuffer, check_size
from dphrl.reference.stage import GradedResponses
from dphrl.tracking.console import Console, format_table
from dphrl.tracking.tracker import Tracker
from dphrl.types import Prompt, RolloutGroup

log = logging.getLogger(__name__)

# Of a terminal that is not narrow: a table that fits needs no wrapping there.
TABLE_WIDTH = 100


class System(Protocol):
    """A place to run: one process, or a Ray cluster."""

    async def start(self, on_ready: Callable[[str], None]) -> Parts: ...

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: Callable[[int], None]
    ) -> tuple[ReferenceStore, dict[str, float]]: ...

    async def adopt_reference(self, buffer: ReferenceBuffer) -> ReferenceStore: ...


async def training_run(
    config: Config, prepared: Prepared, system: System, tracker: Tracker, console: Console, *, resume: bool
) -> None:
    """Train to the last step, evaluated and exported; `resume` continues from the newest checkpoint, if any."""
    parts = await system.start(console.info)
    console.info(f"first sync: {_gap(await parts.rollouts.refit(parts.learner))}")
    reference = await prepare_reference(config, prepared, system, parts, tracker.folder, console)
    base = await _base_evaluation(config, prepared, parts, tracker.folder, console)
    tracker.log_evaluation(0, "base", base)
    start_step = await _restore(prepared, parts, tracker, console) if resume else 0
    observer = _Observer(config, prepared, parts, tracker, console, base)
    await observer.catch_up(start_step)
    await train(config, prepared.prompts, parts, reference, observer, start_step=start_step)
    trained = await observer.finish()
    report_evaluations(console, {"base": base, "trained": trained})
    console.info(f"model      {list_checkpoints(tracker.folder / 'checkpoints')[-1] / 'hf'}")
    console.info(f"run folder {tracker.folder}  (metrics.jsonl, samples/, reference/, eval/, tensorboard/, run.log)")


async def prepare_reference(
    config: Config, prepared: Prepared, system: System, parts: Parts, run_folder: Path, console: Console
) -> ReferenceStore | None:
    """The reference buffer: reused where its fingerprint matches, else sampled now. None for plain RLVR.

    Raises InputError when the buffer exceeds reference.max_bytes.
    """
    if not config.uses_reference_samples:
        console.info("reference stage: none (no divergence, or one estimated on rollouts alone)")
        return None
    identity = fingerprint(config, prepared.model_dir, prepared.prompts, parts.learner.dtype)
    folder = run_folder / "reference"
    store: ReferenceStore | None = None
    if (folder / "manifest.json").is_file():
        buffer = ReferenceBuffer.load(folder)
        changed = changed_parts(buffer.fingerprint, identity)
        if changed:
            console.info(f"reference buffer in {folder} is not reused: {', '.join(changed)} changed")
        else:
            check_size(buffer.num_bytes, config.reference)
            store, counts = await system.adopt_reference(buffer), buffer.counts()
            console.info(f"reference buffer reused from {folder}")
    if store is None:
        num_done = _say_sampled(config, prepared.prompts, identity, folder, console)
        total = (len(prepared.prompts) - num_done) * config.reference.num_samples
        with console.task("reference stage: completions of the initial policy", total) as advance:
            store, counts = await system.fill_reference(prepared.prompts, identity, folder, advance)
    _say_split(config, counts, console)
    return store


def _say_sampled(
    config: Config, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, console: Console
) -> int:
    """Tell whether graded responses beside `folder` will be used; returns the number of prompts they are of."""
    graded = GradedResponses(folder, prompts, identity, config.reference.prompts_per_chunk)
    if changed := graded.changed():
        console.info(f"graded responses in {graded.folder} are not used, starting over: {', '.join(changed)} changed")
    num_done = graded.num_done()
    if num_done == len(prompts):
        console.info("reference stage: every prompt is sampled already, selecting from its graded responses")
    elif num_done:
        console.info(f"reference stage: continuing, {num_done} of {len(prompts)} prompts done")
    return num_done


def _say_split(config: Config, counts: Mapping[str, float], console: Console) -> None:
    reference = config.reference
    console.info(
        f"reference split: {counts['num_near_perfect']:.0f} near-perfect prompts (>= {reference.threshold} of "
        f"{reference.num_samples} correct), {counts['num_exploration']:.0f} to explore, "
        f"{counts['num_dropped']:.0f} dropped; {counts['num_stored_samples']:.0f} samples stored "
        f"({counts['num_stored_tokens']:.0f} tokens, {counts['num_bytes']:.0f} bytes); "
        f"mean score {counts['mean_correct']:.3f}"
    )
    if not counts["num_stored_samples"]:
        console.info(
            "NOTE: no prompt is near-perfect, so there is nothing to rehearse: the divergence term is exactly 0 and "
            f"this run is plain RLVR. Lower reference.threshold={reference.threshold} (samples nothing anew), or start "
            "from a stronger model"
        )
    if not counts["num_exploration"]:
        console.info(
            "NOTE: no prompt is left to explore: the policy term is exactly 0 and this run only rehearses. "
            "Use harder problems, or raise reference.threshold"
        )


def report_evaluations(console: Console, models: Mapping[str, Sequence[Summary]]) -> None:
    """One table: a row per data set and model, so that base and trained stand one above the other.

    With half of each 95 % interval and the majority vote of most samples, where that fits TABLE_WIDTH columns.
    """
    if not any(models.values()):
        return
    for intervals, majority in ((True, True), (False, True), (False, False)):
        columns, rows = _evaluation_table(models, intervals=intervals, majority=majority)
        if max(map(len, format_table(columns, rows).splitlines())) <= TABLE_WIDTH:
            break
    console.table("evaluation" + (", ± half of the 95 % interval" if intervals else ""), columns, rows)


def _evaluation_table(
    models: Mapping[str, Sequence[Summary]], *, intervals: bool, majority: bool
) -> tuple[list[str], list[list[object]]]:
    summaries = [(model, summary) for model, of_model in models.items() for summary in of_model]
    first = summaries[0][1]
    keys = [*(key for key in first if key.startswith("pass@")), "greedy"]
    if majority:
        votes = [key for key in first if key.startswith("majority@")]
        keys += sorted(votes, key=lambda key: int(key.removeprefix("majority@")))[-1:]
    keys += ["retention", "distinct_correct"]
    # A column that no model has anything for, as retention without a base, is none.
    keys = [key for key in keys if any(summary.get(key) is not None for _, summary in summaries)]

    def cell(summary: Summary, key: str) -> object:
        value, interval = summary.get(key), summary.get("intervals", {}).get(key)
        if not intervals or value is None or interval is None:
            return value
        return f"{value:.3f} ±{(interval[1] - interval[0]) / 2:.3f}"

    rows: list[list[object]] = []
    for name in dict.fromkeys(summary["dataset"] for _, summary in summaries):
        for model, summary in summaries:
            if summary["dataset"] == name:
                rows.append([name, summary["split"], model, *(cell(summary, key) for key in keys)])
    names = [key.replace("majority@", "maj@").replace("distinct_correct", "distinct") for key in keys]
    return ["data set", "split", "model", *names], rows


def write_summaries(path: Path, summaries: Sequence[Summary]) -> None:
    """As JSON, made whole before it is put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(json.dumps(list(summaries), indent=2) + "\n")
    staging.replace(path)


def _gap(synced: Mapping[str, float]) -> str:
    return f"engine and learner log-probs agree within {synced['sync/logprob_gap_max']:.2g}"


async def _base_evaluation(
    config: Config, prepared: Prepared, parts: Parts, run_folder: Path, console: Console
) -> list[Summary]:
    """Once per run: a resumed one finds its base results, unless what they were measured on has changed."""
    if not config.evaluation.num_samples:
        return []
    path, stamp = run_folder / "eval" / "base.json", run_folder / "eval" / ".base-identity"
    rollout = config.rollout
    sampling = (
        config.evaluation.num_samples,
        config.evaluation.k,
        rollout.temperature,
        rollout.max_tokens,
        config.seed,
    )
    asked = [(s.name, s.split, [(p.prompt_id, p.token_ids, p.answer) for p in s.prompts]) for s in prepared.evaluations]
    reward = config.reward.model_dump(include={"name", "params", "extraction", "timeout_s"})
    identity = hash_value([hash_model(prepared.model_dir), parts.learner.dtype, reward, sampling, asked])
    partial = PartialResult.beside(path, prepared.model_dir)
    if path.is_file() and stamp.is_file() and stamp.read_text() == identity:
        partial.remove()  # if a kill came between the stamp and this
        return list(json.loads(path.read_text()))
    summaries = await evaluate_sets(config, prepared.evaluations, parts, console, "base", partial=partial)
    stamp.unlink(missing_ok=True)
    write_summaries(path, summaries)
    stamp.write_text(identity)
    partial.remove()
    return summaries


async def _restore(prepared: Prepared, parts: Parts, tracker: Tracker, console: Console) -> int:
    """Learner, engines and metrics as of the newest checkpoint; returns the number of steps already done."""
    found = list_checkpoints(tracker.folder / "checkpoints")
    if not found:
        console.info("resume: no checkpoint yet, starting at step 1")
        tracker.truncate_after(0)
        return 0
    manifest = read_manifest(found[-1])
    if manifest.layout != parts.learner.layout:
        raise InputError(
            f"{found[-1]} was written by a learner of another layout ({manifest.layout}; now {parts.learner.layout}); "
            "resume with the same learner.num_ranks, learner.zero_stage and --inline"
        )
    if manifest.model != hash_model(prepared.model_dir):
        raise InputError(f"{found[-1]} belongs to a run of another initial model than {prepared.model_dir}")
    await parts.learner.load(found[-1], manifest.policy_version)
    await parts.rollouts.refit(parts.learner)
    tracker.truncate_after(manifest.step)
    console.info(f"resume: {manifest.step} steps done, continuing from {found[-1]}")
    return manifest.step


class _Observer:
    """Tracks, saves and evaluates after each step."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        parts: Parts,
        tracker: Tracker,
        console: Console,
        base: Sequence[Summary],
    ) -> None:
        self.config, self.prepared, self.parts, self.base = config, prepared, parts, base
        self.tracker, self.console = tracker, console

    async def after_step(self, step: int, metrics: Metrics, groups: Sequence[RolloutGroup]) -> None:
        self.tracker.log_samples(step, groups, self.config.tracking.samples_per_step)
        self.tracker.log_step(metrics)
        self.console.step_line(metrics, self.config.learner.num_steps)
        last = step == self.config.learner.num_steps
        if last or _is_due(step, self.config.checkpoint.every_steps):
            await self._save(step)
        if not last and _is_due(step, self.config.evaluation.every_steps):
            await self._evaluate(step)

    async def catch_up(self, step: int) -> None:
        """The evaluation that a kill came in between, after the checkpoint of `step` which the run resumed from."""
        due = 0 < step < self.config.learner.num_steps and _is_due(step, self.config.evaluation.every_steps)
        if due and not self._result(step).is_file():
            await self._evaluate(step)

    async def finish(self) -> list[Summary]:
        """The final evaluation, of the weights the engines hold now."""
        return await self._evaluate(self.config.learner.num_steps)

    async def _save(self, step: int) -> None:
        learner = self.parts.learner
        model = hash_model(self.prepared.model_dir)
        manifest = CheckpointManifest(step, learner.policy_version, learner.layout, model)
        folder = self.tracker.folder.absolute() / "checkpoints"
        path = await save_checkpoint(folder, manifest, self.parts.learner.save, keep=self.config.checkpoint.keep)
        log.info("checkpoint %s", path)

    async def _evaluate(self, step: int) -> list[Summary]:
        if not self.config.evaluation.num_samples:
            return []
        path, partial = self._result(step), self._partial(step)
        sets, label = self.prepared.evaluations, f"step {step}"
        summaries = await evaluate_sets(
            self.config, sets, self.parts, self.console, label, base=self.base, partial=partial
        )
        write_summaries(path, summaries)
        self.tracker.log_evaluation(step, "current", summaries)
        if partial is not None:
            partial.remove()
        return summaries

    def _result(self, step: int) -> Path:
        return self.tracker.folder / "eval" / f"step_{step}.json"

    def _partial(self, step: int) -> PartialResult | None:
        """None for a policy that no checkpoint holds: a resumed run would evaluate other weights at this step."""
        try:
            manifest = self.tracker.folder / "checkpoints" / f"step_{step}" / MANIFEST
            # A step taken again may come out a little different, and its checkpoint is then another one.
            saved = manifest.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        policy = f"step {step}, version {self.parts.learner.policy_version}, saved {saved}"
        return PartialResult.beside(self._result(step), self.prepared.model_dir, policy)


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
