"""From a validated config to a finished run: the functions that the commands of the CLI call."""

from __future__ import annotations

import os
import re
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Never

from cluster.planning.shapes import model_shape
from cluster.planning.storage import disk_warning
from cluster.refusals import NOTE
from dphrl.config.loading import InputError, dump_config
from dphrl.config.schema import Config
from dphrl.durable import write_obstacle
from dphrl.evaluation.results import Summary, as_json, write_summaries
from dphrl.evaluation.stage import Evaluation, PartialResult, evaluate_sets
from dphrl.evaluation.table import report_evaluations
from dphrl.fingerprint import blind_spots
from dphrl.learner.checkpoint import list_checkpoints
from dphrl.learner.policy import dtype_name
from dphrl.outputs import check_output, save_output
from dphrl.owner import OWNER_FILE, owned
from dphrl.prepare import Prepared, check_width, prepare
from dphrl.protocols import System
from dphrl.reference.reuse import prepare_reference
from dphrl.resume import ResumeCheck
from dphrl.run import training_run
from dphrl.stopping import StopRequest
from dphrl.tracking.console import Console
from dphrl.tracking.sinks import Sink, SinkGroup, external_sinks
from dphrl.tracking.tracker import Tracker, write_versions


def run_training(
    config: Config, *, resume: bool = False, insist: bool = False, inline: bool = False, overwrite: bool = False
) -> None:
    """Train a model. insist: resume although the checkpoint was trained with something else.

    Raises InputError for what the user can correct, other errors when the run itself failed.
    """
    folder = config.folder
    check_writable(folder)
    with StopRequest(saves=True).listening() as stop, owned(folder, stop.abandon) as owner:
        check_run_folder(folder, resume=resume, overwrite=overwrite)
        owner.remove_leftovers()
        check = ResumeCheck(config, insist=insist) if resume else None
        if check is not None:
            check.check_settings()
        _external_sinks(config)  # a missing library should be reported before anything starts
        quiet_libraries()
        console = Console()
        owner.tell(console.info)
        prepared = prepare(config, console)
        if check is not None:
            check.check_inputs(prepared)
        else:  # a run that resumes has most of its checkpoints already
            _warn_of_a_small_disk(config, prepared, console)
        with open_system(config, prepared, inline=inline) as system:
            if overwrite:  # only now: a mistake in the configuration must not cost the earlier run
                owner.empty_folder()
            train_on(system, config, prepared, console, resume=check, stop=stop)


def train_on(
    system: System,
    config: Config,
    prepared: Prepared,
    console: Console,
    *,
    resume: ResumeCheck | None,
    stop: StopRequest,
) -> None:
    """Train on a system that runs already, in a folder that this process owns. resume: the check that the run passed,
    which may go on; None starts anew."""
    folder = config.folder
    sinks = SinkGroup([*system.sinks(), *_external_sinks(config)])
    with Tracker(folder, tensorboard=config.tracking.tensorboard, sinks=sinks) as tracker:
        dump_config(config, folder / "config.yaml")
        write_versions(folder)
        prepared.log_notes()
        sinks.start(config.model_dump(mode="json"), folder)
        for note in (*blind_spots(prepared.model_dir), *(resume.notes if resume else ())):
            console.info(note)
        run = training_run(config, prepared, system, tracker, console, resume=resume is not None, stop=stop)
        stop.run(_listening(system, folder, run))


async def _listening(system: System, folder: Path, run: Coroutine[object, Never, None]) -> None:
    async with system.listen(folder):
        await run


def _warn_of_a_small_disk(config: Config, prepared: Prepared, console: Console) -> None:
    shape = model_shape(prepared.model_dir, trust_remote_code=config.model.trust_remote_code)
    # Here may be no GPU while the learner has one; then the estimate is too high, by the weights' own size.
    if warning := disk_warning(config, shape, dtype_name(config.model.dtype)):
        console.info(warning)


def _external_sinks(config: Config) -> list[Sink]:
    tracking = config.tracking
    return external_sinks(tracking.project, config.run_name, wandb=tracking.wandb, mlflow=tracking.mlflow)


def run_sampling(config: Config, *, inline: bool = False) -> None:
    """The reference stage alone; a later `train` of the same run finds the buffer by its fingerprint.

    Raises InputError when the run has no reference stage.
    """
    folder = config.folder
    check_writable(folder)
    if not config.uses_reference_stage:
        raise InputError(
            "algorithm: no divergence on reference samples and no replay, so there is no reference stage to run"
        )

    async def run(system: System, prepared: Prepared, console: Console) -> None:
        parts = await system.start(console.info)
        await parts.rollouts.refit(parts.learner)
        for note in blind_spots(prepared.model_dir):
            console.info(note)
        await prepare_reference(config, prepared, system, parts, folder, console)
        console.info(f"buffer     {folder / 'reference'}")

    with StopRequest().listening() as stop, owned(folder, stop.abandon) as owner:
        owner.remove_leftovers()
        quiet_libraries()
        console = Console()
        owner.tell(console.info)
        prepared = prepare(config, console)
        with Tracker(folder, tensorboard=False), open_system(config, prepared, inline=inline) as system:
            prepared.log_notes()
            stop.run(run(system, prepared, console))


def run_evaluation(
    config: Config,
    model: str,
    base: str | None,
    num_samples: int,
    ks: Sequence[int],
    output: Path | None,
    inline: bool,
) -> None:
    """Pass@k of `model` on the config's evaluation sets, with retention against `base` when there is one.

    A killed evaluation of the same models, data and settings to the same output is continued. Raises InputError when
    the config has no evaluation sets, or when `output` is a folder.
    """
    if not config.data.evaluation:
        raise InputError("data.evaluation: empty, so there is nothing to evaluate on; add a data set")
    settings = config.evaluation.model_copy(update={"num_samples": num_samples, "k": tuple(ks)})
    config = config.model_copy(update={"evaluation": settings})
    usual = config.folder / "eval" / f"{_slug(model)}.json"
    if output is None:
        check_writable(config.folder)
    output = output or usual
    check_output(output)  # now, not when the result of hours of work is to be written
    # Beside a device or a pipe there is no place for the chunks and the completions.
    beside = usual if output.exists() and not output.is_file() else output
    samples, partial = beside.with_suffix(".samples"), beside.with_name(beside.name + ".partial")
    with StopRequest().listening() as stop, owned(partial, stop.abandon) as owner:
        owner.remove_leftovers()
        quiet_libraries()
        console = Console()
        owner.tell(console.info)
        results: dict[str, list[Summary]] = {}
        for label, path in (("base", base), ("model", model)):
            if path is not None:
                prepared = prepare(config, console, model=path)
                stored = PartialResult(partial / label, prepared.model_dir)
                known = results.get("base", [])
                evaluation = Evaluation(config, prepared.evaluations, label, known, stored, samples / label)
                results[label] = _evaluate_one(evaluation, prepared, console, stop, inline=inline)
        report_evaluations(console, results)
        for summary in results["model"]:
            counts = ", ".join(f"{count} {status}" for status, count in summary["statuses"].items())
            console.info(f"{summary['dataset']}: {counts}")
        if output == usual:
            write_summaries(output, results["model"])
        else:
            save_output(output, as_json(results["model"]))
        with suppress(InputError):  # the result is there, which counts more than what cannot be deleted
            owner.empty_folder()
    console.info(f"written to {output}, the graded completions to {samples}")


def _slug(path: str) -> str:
    return re.sub(r"[^\w.-]+", "-", path).strip("-")


def _evaluate_one(
    evaluation: Evaluation, prepared: Prepared, console: Console, stop: StopRequest, *, inline: bool
) -> list[Summary]:
    """Start a system for one model, evaluate it, end the system."""

    async def run(system: System) -> list[Summary]:
        parts = await system.start(console.info)
        await parts.rollouts.refit(parts.learner)
        return await evaluate_sets(evaluation, parts, console)

    with open_system(evaluation.config, prepared, inline=inline) as system:
        return stop.run(run(system))


def quiet_libraries() -> None:
    """Leave the terminal to this run: no progress bars of libraries, no warning that a CPU machine has no GPU."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def open_system(config: Config, prepared: Prepared, *, inline: bool) -> AbstractContextManager[System]:
    """The system of this one process, or of actors on a Ray cluster; both are a `protocols.System`.

    Raises InputError, before anything starts, when the engines cannot split the model as the configuration asks.
    """
    if inline:
        from dphrl.inline import InlineSystem

        return InlineSystem(config, prepared.model_dir, prepared.tokenizer)
    check_width(config, prepared.model_dir)
    from cluster.ray_system import RaySystem

    return RaySystem(config, prepared.model_dir, prepared.prompts[: config.sync.num_probes])


def check_writable(folder: Path, setting: str = "run_dir") -> None:
    """Raises InputError when nothing could be written to the folder. setting: what says where it is."""
    if obstacle := write_obstacle(folder):
        raise InputError(f"{setting}: {folder} cannot be written ({obstacle}); choose another place")


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError when two runs would mix in one folder, or when a folder that holds no run would be deleted."""
    metrics = folder / "metrics.jsonl"
    holds_run = list_checkpoints(folder / "checkpoints") or (metrics.is_file() and metrics.stat().st_size)
    if holds_run and not (resume or overwrite):
        raise InputError(
            f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, or choose "
            "another run_name"
        )
    holds_files = folder.is_dir() and any(path.name not in (OWNER_FILE, NOTE) for path in folder.iterdir())
    if overwrite and holds_files and not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} holds no run (no config.yaml), so --overwrite leaves it alone; choose another run_name"
        )
