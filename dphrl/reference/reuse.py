"""The reference buffer of a run: the stored one if nothing that it depends on has changed, else a new one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dphrl.config.schema import Config
from dphrl.fingerprint import changed_parts, fingerprint
from dphrl.prepare import Prepared
from dphrl.protocols import Parts, ReferenceStore, System
from dphrl.reference.buffer import DamagedBufferError, ReferenceBuffer, check_size, check_whole, read_manifest
from dphrl.reference.stage import GradedResponses
from dphrl.tracking.console import Console
from dphrl.types import Prompt

log = logging.getLogger(__name__)


async def prepare_reference(
    config: Config, prepared: Prepared, system: System, parts: Parts, run_folder: Path, console: Console
) -> ReferenceStore | None:
    """The reference buffer: reused if its fingerprint matches, else sampled now. None if the run rehearses nothing.

    A damaged buffer is made again. Raises InputError when the buffer exceeds reference.max_bytes, and RewardFailedError
    when the reward gives no verdict.
    """
    if not config.uses_reference_stage:
        console.info("reference stage: none (no divergence, or one estimated on rollouts alone; no replay)")
        return None
    identity = fingerprint(config, prepared.model_dir, prepared.prompts, parts.learner.dtype)
    folder = run_folder / "reference"
    store: ReferenceStore | None = None
    counts: Mapping[str, float]
    if (buffer := _stored_buffer(folder, identity, console)) is not None:
        check_size(buffer.num_bytes, config.reference)
        store, counts = await system.adopt_reference(buffer, folder), buffer.counts()
        console.info(f"reference buffer reused from {folder}")
    if store is None:
        num_done = _say_sampled(config, prepared.prompts, identity, folder, console)
        total = (len(prepared.prompts) - num_done) * config.reference.num_samples
        if config.reference.confirm:
            total += len(prepared.prompts)
        with console.task("reference stage: completions of the initial policy", total) as advance:
            store, counts = await system.fill_reference(prepared.prompts, identity, folder, advance)
    # The stage may run on another node, and a reused buffer was filled by an earlier process, so run.log lacks them.
    for failure in read_manifest(folder)["failures"]:
        log.info("%s", failure)
    _say_split(config, counts, console)
    return store


def _stored_buffer(folder: Path, identity: Mapping[str, str], console: Console) -> ReferenceBuffer | None:
    """The buffer in `folder` if nothing that it depends on has changed and all of it is as it was written, else None;
    says why a buffer that is there is not used."""
    if not folder.is_dir():
        return None
    try:
        # Only the manifest is read before it is known that this version wrote the other files for the same settings.
        changed = changed_parts(read_manifest(folder)["fingerprint"], identity)
        if not changed:
            return ReferenceBuffer.load(folder)
        check_whole(folder)  # a changed bit of the manifest is no changed setting
    except DamagedBufferError as error:
        console.info(f"{error}; it is made again from the graded responses in {folder}.graded")
        log.warning("%s", error, extra={"event": "buffer_damaged", "facts": {"folder": str(folder)}})
        return None
    console.info(f"reference buffer in {folder} is not reused: {', '.join(changed)} changed")
    return None


def _say_sampled(
    config: Config, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, console: Console
) -> int:
    """Say whether graded responses beside `folder` will be used; returns the number of prompts that have them."""
    graded = GradedResponses(folder, prompts, identity, config.reference.prompts_per_chunk)
    if changed := graded.changed():
        console.info(f"graded responses in {graded.folder} are not used, starting over: {', '.join(changed)} changed")
    for damage in graded.damaged():
        console.info(f"graded responses in {graded.folder}: {damage}; these prompts are sampled again")
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
    for note in _notes(config, counts):
        console.info(note)


def _notes(config: Config, counts: Mapping[str, float]) -> Iterator[str]:
    """What the user should know of this split, one line each."""
    reference = config.reference
    num_completions = counts["num_prompts"] * reference.num_samples
    if failed := num_completions - counts["num_graded"]:
        yield (
            f"NOTE: the reward failed on {failed:.0f} of {num_completions:.0f} completions (run.log has the first "
            "failures in full); the split counts the others, and explores "
            f"{counts['num_without_verdict']:.0f} prompts without any verdict"
        )
    if counts["num_truncated"]:
        yield (
            f"NOTE: {counts['num_truncated']:.0f} prompts would be near-perfect if truncated answers counted, and are "
            f"explored ({counts['num_nothing_storable']:.0f} of them have no complete correct answer, so nothing to "
            f"store): raise rollout.max_tokens={config.rollout.max_tokens}"
        )
    if counts["num_unconfirmed"]:
        yield (
            f"NOTE: {counts['num_unconfirmed']:.0f} prompts were near-perfect but not confirmed by one more answer "
            "(reference.confirm), and are explored"
        )
    if not counts["num_stored_samples"]:
        yield (
            "NOTE: no prompt is near-perfect, so there is nothing to rehearse or replay: the divergence term is "
            f"exactly 0 and this run is plain RLVR. Lower reference.threshold={reference.threshold} (samples nothing "
            "anew), or start from a stronger model"
        )
    if not counts["num_exploration"]:
        then = "this run only replays" if config.num_replayed else "the policy term is exactly 0: it only rehearses"
        yield f"NOTE: no prompt is left to explore: {then}. Use harder problems, or raise reference.threshold"
