"""The evaluation of the model that a run starts from: made once, and read again when the run resumes."""

from __future__ import annotations

from pathlib import Path

from dphrl.config.schema import Config
from dphrl.durable import write_whole
from dphrl.evaluation.results import Summary, read_summaries, say_damaged, write_summaries
from dphrl.evaluation.stage import Evaluation, PartialResult, evaluate_sets
from dphrl.fingerprint.files import hash_value
from dphrl.prepare import Prepared
from dphrl.protocols import Parts
from dphrl.tracking.console import Console


async def base_evaluation(
    config: Config, prepared: Prepared, parts: Parts, run_folder: Path, console: Console
) -> list[Summary]:
    """Evaluate the base model, or read the stored result if nothing that it depends on has changed.

    The list is empty when evaluation.num_samples is 0.
    """
    if not config.evaluation.num_samples:
        return []
    path, stamp = run_folder / "eval" / "base.json", run_folder / "eval" / ".base-identity"
    partial = PartialResult.beside(path, prepared.model_dir)
    sets = [(s.name, s.split, partial.identity(config, s.prompts, parts.learner.dtype)) for s in prepared.evaluations]
    identity = hash_value([config.evaluation.k, sets])
    if path.is_file() and stamp.is_file() and stamp.read_bytes() == identity.encode():
        if (stored := read_summaries(path)) is not None:
            partial.remove()  # chunks are left if a kill came after the stamp was written
            return stored
        say_damaged(path, console)
    evaluation = Evaluation(config, prepared.evaluations, "base", partial=partial)
    summaries = await evaluate_sets(evaluation, parts, console)
    stamp.unlink(missing_ok=True)
    write_summaries(path, summaries)
    write_whole(stamp, identity)
    partial.remove()
    return summaries
