"""A model from a checkpoint alone: for an export that failed, or one that nobody made."""

from __future__ import annotations

import shutil
from pathlib import Path

from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.durable import damage, put_in_place, seal
from dphrl.learner.checkpoint import checkpoint_path, list_checkpoints, newest_whole, read_manifest, step_of
from dphrl.learner.export import export_model
from dphrl.learner.loading import load_policy
from dphrl.learner.lora import add_adapters, plain_weights
from dphrl.learner.state import STATE_FOLDER, StoredState, restore_weights
from dphrl.models import resolve_model
from dphrl.tracking.console import Console


def export_checkpoint(run: Path, step: int | None, target: Path, console: Console) -> None:
    """Write the model of a run's checkpoint, of `step` or the newest, as a Hugging Face directory `target`.

    It needs the model that the run began with, and host memory for one copy. Raises InputError when there is no such
    run or whole checkpoint, or when `target` holds something.
    """
    checkpoint = _find(run, step, console)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; name a new folder")
    manifest = read_manifest(checkpoint)
    config = Config.model_validate(dict(manifest.settings))
    # No attention is computed, and this machine may have no GPU.
    model = config.model.model_copy(update={"dtype": manifest.dtype, "attention": "sdpa"})
    source = _resolve(model.path)
    policy = load_policy(source, model, temperature=1.0)
    add_adapters(policy.lm, model.lora, config.seed)
    with StoredState(checkpoint / STATE_FOLDER) as stored:
        restore_weights(policy, stored)
    weights = {weight.name: weight.value().detach() for weight in plain_weights(policy.lm)}
    staging = target.absolute().with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        export_model(policy.lm, source, staging, weights)
        seal(staging)
        put_in_place(staging, target.absolute())
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    console.info(f"model of step {manifest.step} written to {target}")


def _find(run: Path, step: int | None, console: Console) -> Path:
    folder = run / "checkpoints"
    there = [step_of(path) for path in list_checkpoints(folder)]
    if not there:
        raise InputError(f"{run}: holds no checkpoints; name the folder of a run")
    if step is None:
        found = newest_whole(folder, console.info)
        assert found is not None, "there is at least one"
        return found
    if step not in there:
        raise InputError(
            f"--step {step}: {run} has checkpoints of steps {', '.join(map(str, there))}; give one of them"
        )
    if problem := damage(checkpoint_path(folder, step)):
        raise InputError(f"{checkpoint_path(folder, step)}: is damaged ({problem}); give another --step")
    return checkpoint_path(folder, step)


def _resolve(path: str) -> str:
    try:
        return str(resolve_model(path))
    except ValueError as error:
        raise InputError(
            f"{error} (the run began with this model, and its tokenizer and configuration are needed)"
        ) from error
