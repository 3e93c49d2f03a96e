"""The evaluation of the model that a run starts from: made once, and read again when the run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dphrl.config.schema import Config
from dphrl.evaluation.stage import Evaluation, PartialResult, Summary, evaluate_sets
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
    if path.is_file() and stamp.is_file() and stamp.read_text() == identity:
        partial.remove()  # chunks are left if a kill came after the stamp was written
        return list(json.loads(path.read_text()))
    evaluation = Evaluation(config, prepared.evaluations, "base", partial=partial)
    summaries = await evaluate_sets(evaluation, parts, console)
    stamp.unlink(missing_ok=True)
    write_summaries(path, summaries)
    stamp.write_text(identity)
    partial.remove()
    return summaries


def write_summaries(path: Path, summaries: Sequence[Summary]) -> None:
    """Write `summaries` as JSON: aside first, then put in place as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(json.dumps(list(summaries), indent=2) + "\n")
    staging.replace(path)
