"""Where a run's numbers go besides its folder: the `Sink` protocol, Weights & Biases, MLflow.

The folder's metrics.jsonl is the record. A sink only gets a copy to look at, so its failure stops a run only before the
run has started. A later failure gives a warning, and the run goes on.
"""

from __future__ import annotations

import logging
import math
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from dphrl.config.loading import InputError
from dphrl.durable import write_whole

log = logging.getLogger(__name__)

# The end of a run waits this long for records that a sink still has to send.
FINISH_TIMEOUT_S = 60.0
# MLflow takes this many parameters in one call.
MAX_PARAMS_PER_CALL = 100
# Error messages are cut here. The limit is high because MLflow names the remedy after two long sentences.
MAX_ERROR_CHARS = 600
# Longer values are cut here: MLflow servers cut them too, and older servers refuse them.
MAX_PARAM_CHARS = 500

Status = Literal["finished", "failed", "killed"]
# Which policy was evaluated: the model that the run started from, or what it has trained so far.
Policy = Literal["base", "current"]
Summaries = Sequence[Mapping[str, Any]]


class Sink(Protocol):
    """Gets a copy of what a run measures.

    Lifecycle: `start` once, any number of log calls, `finish` once. A resumed run makes a new sink with the same
    folder, and that sink continues what the earlier one began.
    """

    @property
    def name(self) -> str:
        """The name of the sink's switch in the config, below `tracking`."""
        ...

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """config: every setting, nested as in the YAML. It may raise, because nothing has run yet."""
        ...

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Take one record of metrics.jsonl."""
        ...

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        """Take an evaluation's result, one summary per data set, of the policy after `step` steps."""
        ...

    def finish(self, status: Status) -> None:
        """Send what is left. No call comes after this."""
        ...


def evaluation_record(summaries: Summaries, prefix: str = "evaluation") -> dict[str, float]:
    """The plain numbers of an evaluation, under names such as `<prefix>/<data set>/pass@8`."""
    return {
        f"{prefix}/{summary['dataset']}/{name}": value
        for summary in summaries
        for name, value in finite_numbers(summary).items()
    }


def finite_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a record that a chart can show."""
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class WandbSink:
    """Weights & Biases. Its own settings (WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY) come from the environment."""

    name = "wandb"

    def __init__(self, project: str, run_name: str) -> None:
        """Raises InputError when the library is missing."""
        self.project, self.run_name = project, run_name
        self._wandb = _optional_import(self.name)
        self._run: Any = None

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        self._run = self._wandb.init(
            project=self.project,
            name=self.run_name,
            id=_stored_id(folder / "wandb_run_id"),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            # A resumed run may have other settings, such as num_steps.
            allow_val_change=True,
            # run.log has the output already, and a progress bar would make this copy of it long.
            settings=self._wandb.Settings(console="off"),
        )
        # W&B's own step counter never goes back, so it would drop the steps that a resumed run takes again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_step(self, record: Mapping[str, Any]) -> None:
        self._run.log(finite_numbers(record))

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        # The base model is the point of the curve at step 0.
        self._run.log({"step": step, **evaluation_record(summaries)})

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MlflowSink:
    """MLflow, at MLFLOW_TRACKING_URI or where MLflow keeps runs by default.

    It uses MLflow's client, not the global "active run", which belongs to one thread and to the user's own code.
    """

    name = "mlflow"

    def __init__(self, project: str, run_name: str) -> None:
        """Raises InputError when the library is missing."""
        self.project, self.run_name = project, run_name
        self._mlflow = _optional_import(self.name)
        self._client: Any = None
        self._run_id = ""

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        self._client = self._mlflow.MlflowClient()
        stored = folder / "mlflow_run_id"
        run_id = stored.read_text(encoding="utf-8").strip() if stored.is_file() else ""
        if run_id and self._is_there(run_id):
            self._run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        if run_id:
            log.warning("mlflow: run %s is no longer there; starting another one", run_id)
        experiment = self._client.get_experiment_by_name(self.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self.project)
        self._run_id = self._client.create_run(experiment_id, run_name=self.run_name).info.run_id
        stored.write_text(self._run_id + "\n", encoding="utf-8")
        # Only the first start sends parameters: MLflow refuses a parameter that changes.
        flat = [(key, str(value)[:MAX_PARAM_CHARS]) for key, value in _flatten(config)]
        params = [self._mlflow.entities.Param(_mlflow_name(key), value) for key, value in flat]
        for start in range(0, len(params), MAX_PARAMS_PER_CALL):
            self._client.log_batch(self._run_id, params=params[start : start + MAX_PARAMS_PER_CALL])

    def log_step(self, record: Mapping[str, Any]) -> None:
        self._log(int(record["step"]), {key: value for key, value in record.items() if key != "step"})

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        self._log(step, evaluation_record(summaries))

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, status=status.upper())

    def _log(self, step: int, record: Mapping[str, Any]) -> None:
        metric, now_ms = self._mlflow.entities.Metric, int(time.time() * 1000)
        numbers = finite_numbers(record)
        metrics = [metric(_mlflow_name(key), float(value), now_ms, step) for key, value in numbers.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def _is_there(self, run_id: str) -> bool:
        try:
            return str(self._client.get_run(run_id).info.lifecycle_stage) == "active"
        except self._mlflow.exceptions.MlflowException as error:
            # Any other error, such as a server that does not answer, must not lead to a second run.
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False


class Background:
    """Makes a sink's calls in order in their own thread, so that a slow or absent tracking server does not slow a run.

    Lifecycle: `start` runs in the caller and raises InputError; every log call returns at once; `finish` waits for
    calls that are left, FINISH_TIMEOUT_S at most, and a second `finish` does nothing. A call that fails is lost. The
    first of several failures in a row gives a warning, and `finish` says how many calls were lost.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink, self.name = sink, sink.name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # The thread is a daemon, so that a sink that hangs does not keep a finished run from ending.
        self._thread = threading.Thread(target=self._work, name=f"sink-{sink.name}", daemon=True)
        self._num_calls = self._num_lost = 0
        self._started = False

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        try:
            self._sink.start(config, folder)
        except InputError:
            raise
        except Exception as error:
            remedy = f"mend it, or set tracking.{self.name}=false"
            raise InputError(f"tracking.{self.name}: could not start: {_one_line(error)}; {remedy}") from error
        self._started = True
        self._thread.start()

    def log_step(self, record: Mapping[str, Any]) -> None:
        self._calls.put(lambda: self._sink.log_step(record))

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        self._calls.put(lambda: self._sink.log_evaluation(step, policy, summaries))

    def finish(self, status: Status) -> None:
        if not self._started:
            return
        self._started = False
        self._calls.put(lambda: self._sink.finish(status))
        self._calls.put(None)
        self._thread.join(FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("%s is still sending after %g s; the run ends without it", self.name, FINISH_TIMEOUT_S)
        elif self._num_lost:
            log.warning("%s did not take %d of %d records", self.name, self._num_lost, self._num_calls)

    def _work(self) -> None:
        failing = False
        while (call := self._calls.get()) is not None:
            self._num_calls += 1
            try:
                call()
                failing = False
            except Exception as error:
                self._num_lost += 1
                if not failing:
                    log.warning("%s: %s; the run goes on, and metrics.jsonl has it all", self.name, _one_line(error))
                failing = True


class SinkGroup:
    """Several sinks, or none, as one sink; each has its own thread."""

    name = "tracking"

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = [Background(sink) for sink in sinks]

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Start all sinks. If one cannot start, finish those that have started, and raise InputError."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for sink in self._sinks:
                sink.start(config, folder)
        except BaseException:
            self.finish("failed")
            raise

    def log_step(self, record: Mapping[str, Any]) -> None:
        record = dict(record)  # it is sent later, when the caller may have changed it
        for sink in self._sinks:
            sink.log_step(record)

    def log_evaluation(self, step: int, policy: Policy, summaries: Summaries) -> None:
        for sink in self._sinks:
            sink.log_evaluation(step, policy, summaries)

    def finish(self, status: Status) -> None:
        for sink in self._sinks:
            sink.finish(status)


def external_sinks(project: str, run_name: str, *, wandb: bool, mlflow: bool) -> list[Sink]:
    """The services that a run reports to. Raises InputError, which names the extra to install, if one is missing."""
    wanted: list[Sink] = []
    if wandb:
        wanted.append(WandbSink(project, run_name))
    if mlflow:
        wanted.append(MlflowSink(project, run_name))
    return wanted


def _optional_import(name: str) -> Any:
    """Import the library `name`, which is also the name of its switch and of its extra. Raises InputError."""
    try:
        return import_module(name)
    except ImportError as error:
        remedy = f"pip install 'dphrl[{name}]', or set tracking.{name}=false"
        raise InputError(f"tracking.{name}: {_one_line(error)}; {remedy}") from error


def _stored_id(path: Path) -> str:
    """The id in the file; the first call makes the id.

    The id stays with the run's folder: a folder that is moved keeps its curves, one that is overwritten gets new ones.
    """
    if not path.is_file():
        write_whole(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by dotted name, as on the command line."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _mlflow_name(name: str) -> str:
    """`name` as MLflow allows it: with word characters, `/`, `.`, `-` and spaces only."""
    return re.sub(r"[^\w/.\- ]", "_", name.replace("@", "_at_"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:MAX_ERROR_CHARS] or type(error).__name__
