"""Copies of a run's numbers: never in the run's way, continued on resume, clear when they cannot start."""

from __future__ import annotations

import logging
import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import dphrl.tracking.sinks
from dphrl.config.loading import InputError
from dphrl.tracking.sinks import Background, MlflowSink, SinkGroup, WandbSink, evaluation_record, external_sinks

CONFIG = {"run_name": "r", "learner": {"lr": 1e-6, "num_steps": 3}, "data": {"evaluation": [], "params": {}}}
SUMMARY = {
    "dataset": "math",
    "split": "test",
    "pass@1": 0.5,
    "pass@8": 0.75,
    "retention": None,
    "intervals": {"pass@1": (0.4, 0.6)},
    "per_prompt": [],
    "num_prompts": 4,
}


class Recording:
    """A sink that remembers its calls and fails where told."""

    name = "recording"

    def __init__(self, *, fails_at: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails_at, self.error = fails_at, error or OSError("connection\n  refused")

    def start(self, config: Any, folder: Path) -> None:
        self.calls.append(("start", folder))

    def log_step(self, record: Any) -> None:
        if record["step"] in self.fails_at:
            raise self.error
        self.calls.append(("step", record["step"]))

    def log_evaluation(self, step: int, policy: Any, summaries: Any) -> None:
        self.calls.append(("evaluation", step, policy, len(summaries)))

    def finish(self, status: Any) -> None:
        self.calls.append(("finish", status))


class Unstartable(Recording):
    def start(self, config: Any, folder: Path) -> None:
        raise self.error


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------ never in the run's way


def test_calls_arrive_in_order(tmp_path: Path) -> None:
    first, second = Recording(), Recording()
    group = SinkGroup([first, second])
    group.start(CONFIG, tmp_path / "run")
    group.log_evaluation(0, "base", [SUMMARY])
    for step in (1, 2):
        group.log_step({"step": step})
    group.finish("finished")
    group.finish("failed")
    wanted = [("start", tmp_path / "run"), ("evaluation", 0, "base", 1), ("step", 1), ("step", 2)]
    assert first.calls == second.calls == [*wanted, ("finish", "finished")]
    assert (tmp_path / "run").is_dir()


def test_what_the_caller_changes_later_does_not_reach_a_sink(tmp_path: Path) -> None:
    sink, record = Recording(), {"step": 1}
    group = SinkGroup([sink])
    group.start(CONFIG, tmp_path)
    group.log_step(record)
    record["step"] = 9
    group.finish("finished")
    assert ("step", 1) in sink.calls


def test_a_failing_sink_is_warned_about_and_the_other_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Recording(fails_at=(2, 3, 5)), Recording()
    group = SinkGroup([bad, good])
    group.start(CONFIG, tmp_path)
    for step in range(1, 7):
        group.log_step({"step": step})
    group.finish("finished")
    assert [call[1] for call in bad.calls if call[0] == "step"] == [1, 4, 6]
    assert [call[1] for call in good.calls if call[0] == "step"] == [1, 2, 3, 4, 5, 6]
    said = "recording: connection refused; the run goes on, and metrics.jsonl has it all"
    assert messages(caplog) == [said, said, "recording did not take 3 of 7 records"]


def test_a_sink_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dphrl.tracking.sinks, "FINISH_TIMEOUT_S", 0.05)
    released = threading.Event()

    class Hanging(Recording):
        def log_step(self, record: Any) -> None:
            released.wait(60)

    sink = Background(Hanging())
    sink.start(CONFIG, tmp_path)
    sink.log_step({"step": 1})
    sink.log_step({"step": 2})
    sink.finish("finished")
    released.set()
    assert messages(caplog) == ["recording is still sending after 0.05 s; the run ends without it"]


def test_a_sink_that_cannot_start_is_an_error_and_the_started_ones_end(tmp_path: Path) -> None:
    started = Recording()
    group = SinkGroup([started, Unstartable(error=RuntimeError("no API key"))])
    wanted = "tracking.recording: could not start: no API key; mend it, or set tracking.recording=false"
    with pytest.raises(InputError, match=wanted):
        group.start(CONFIG, tmp_path)
    assert started.calls == [("start", tmp_path), ("finish", "failed")]


def test_an_input_error_of_a_start_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^my own words$"):
        Background(Unstartable(error=InputError("my own words"))).start(CONFIG, tmp_path)


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_library_names_its_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ValueError, match=rf"pip install 'dphrl\[{extra}\]', or set tracking.{extra}=false"):
        external_sinks("p", "r", wandb=extra == "wandb", mlflow=extra == "mlflow")


def test_only_what_is_asked_for_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert external_sinks("p", "r", wandb=False, mlflow=False) == []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert [sink.name for sink in external_sinks("p", "r", wandb=True, mlflow=True)] == ["wandb", "mlflow"]


def test_an_evaluation_as_plain_numbers() -> None:
    wanted = {"evaluation/math/pass@1": 0.5, "evaluation/math/pass@8": 0.75, "evaluation/math/num_prompts": 4}
    assert evaluation_record([SUMMARY]) == wanted
    assert evaluation_record([]) == {}


# ------------------------------------------------------------ Weights & Biases


class FakeWandb(ModuleType):
    """The few names of wandb that the sink calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.step_metrics: dict[str, Any] = {}

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 (wandb's name)
        return settings

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        return SimpleNamespace(
            log=self.logged.append,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
            define_metric=lambda name, step_metric=None: self.step_metrics.update({name: step_metric}),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def run_wandb(folder: Path, status: Any) -> None:
    sink = WandbSink("project", "run")
    sink.start(CONFIG, folder)
    sink.log_evaluation(0, "base", [SUMMARY])
    sink.log_step({"step": 1, "reward/mean": 0.5, "policy/loss": math.nan})
    sink.finish(status)


def test_wandb_gets_numbers_over_our_own_step(wandb: FakeWandb, tmp_path: Path) -> None:
    run_wandb(tmp_path, "finished")
    (init,) = wandb.inits
    assert (init["project"], init["name"], init["resume"]) == ("project", "run", "allow")
    assert (init["config"], init["dir"]) == (CONFIG, str(tmp_path))
    # Left to WANDB_MODE.
    assert "mode" not in init
    assert wandb.step_metrics == {"step": None, "*": "step"}
    assert wandb.logged == [{"step": 0, **evaluation_record([SUMMARY])}, {"step": 1, "reward/mean": 0.5}]
    assert wandb.exit_codes == [0]


def test_wandb_continues_its_run_in_the_same_folder_only(wandb: FakeWandb, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_wandb(tmp_path / "one", "killed")
    # Also when the folder has moved meanwhile.
    (tmp_path / "one").rename(tmp_path / "moved")
    run_wandb(tmp_path / "moved", "finished")
    run_wandb(tmp_path / "two", "failed")
    ids = [init["id"] for init in wandb.inits]
    assert ids[0] == ids[1] != ids[2]
    assert wandb.exit_codes == [1, 0, 1]


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_wandb(tmp_path, "failed")
    run_wandb(tmp_path, "finished")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))


# ------------------------------------------------------------ MLflow


class FakeMlflow(ModuleType):
    """The few names of mlflow that the sink calls, over one store."""

    class MlflowException(Exception):  # noqa: N818 (mlflow's name)
        def __init__(self, error_code: str) -> None:
            super().__init__(error_code)
            self.error_code = error_code

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = SimpleNamespace(
            Param=lambda key, value: (key, value),
            Metric=lambda key, value, timestamp, step: (key, value, step),
        )
        self.exceptions = SimpleNamespace(MlflowException=self.MlflowException)
        self.experiments: list[str] = []
        self.runs: dict[str, SimpleNamespace] = {}
        self.down = False

    def MlflowClient(self) -> FakeMlflow:  # noqa: N802 (mlflow's name)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run_id = f"{experiment_id}-{run_name}-{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(stage="active", status="RUNNING", params=[], metrics=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def get_run(self, run_id: str) -> Any:
        if self.down:
            raise self.MlflowException("INTERNAL_ERROR")
        if run_id not in self.runs:
            raise self.MlflowException("RESOURCE_DOES_NOT_EXIST")
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=self.runs[run_id].stage))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id].status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params += params


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def run_mlflow(folder: Path, status: Any, first_step: int = 1, config: dict[str, Any] = CONFIG) -> None:
    sink = MlflowSink("project", "run")
    sink.start(config, folder)
    sink.log_evaluation(0, "base", [SUMMARY])
    sink.log_step({"step": first_step, "reward/mean": 0.5, "policy/loss": math.nan})
    sink.finish(status)


def test_mlflow_gets_numbers_and_settings(mlflow: FakeMlflow, tmp_path: Path) -> None:
    run_mlflow(tmp_path, "finished")
    ((run_id, run),) = mlflow.runs.items()
    assert (run_id, run.status) == ("project-run-0", "FINISHED")
    # A name may not hold an @.
    assert run.metrics == [
        ("evaluation/math/pass_at_1", 0.5, 0),
        ("evaluation/math/pass_at_8", 0.75, 0),
        ("evaluation/math/num_prompts", 4.0, 0),
        ("reward/mean", 0.5, 1),
    ]
    assert run.params == [
        ("run_name", "r"),
        ("learner.lr", "1e-06"),
        ("learner.num_steps", "3"),
        ("data.evaluation", "[]"),
        ("data.params", "{}"),
    ]


def test_mlflow_continues_its_run_and_leaves_its_parameters(mlflow: FakeMlflow, tmp_path: Path) -> None:
    run_mlflow(tmp_path, "failed")
    run_mlflow(tmp_path, "finished", first_step=2, config={"run_name": "changed"})
    ((_, run),) = mlflow.runs.items()
    assert [step for name, _, step in run.metrics if name == "reward/mean"] == [1, 2]
    assert len(run.params) == 5
    assert run.status == "FINISHED"


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_mlflow_starts_another_run_for_one_that_is_gone(
    how: str, mlflow: FakeMlflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_mlflow(tmp_path, "failed")
    if how == "deleted":
        mlflow.runs["project-run-0"].stage = "deleted"
    else:
        (tmp_path / "mlflow_run_id").write_text("elsewhere\n")
    run_mlflow(tmp_path, "finished")
    assert len(mlflow.runs) == 2
    assert mlflow.experiments == ["project"]
    assert (tmp_path / "mlflow_run_id").read_text() == "project-run-1\n"
    assert len(messages(caplog)) == 1
    assert "is no longer there" in messages(caplog)[0]


def test_mlflow_that_does_not_answer_is_no_reason_for_another_run(mlflow: FakeMlflow, tmp_path: Path) -> None:
    run_mlflow(tmp_path, "failed")
    mlflow.down = True
    with pytest.raises(InputError, match=r"tracking\.mlflow: could not start: INTERNAL_ERROR"):
        Background(MlflowSink("project", "run")).start(CONFIG, tmp_path)
    assert len(mlflow.runs) == 1


def test_many_and_long_settings_go_in_several_calls(mlflow: FakeMlflow, tmp_path: Path) -> None:
    run_mlflow(tmp_path, "finished", config={f"key{i}": "x" * 1000 for i in range(250)})
    ((_, run),) = mlflow.runs.items()
    assert len(run.params) == 250
    assert {len(value) for _, value in run.params} == {dphrl.tracking.sinks.MAX_PARAM_CHARS}


def test_the_real_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_mlflow(tmp_path, "failed")
    run_mlflow(tmp_path, "finished", first_step=2, config={"run_name": "changed"})
    client = real.MlflowClient()
    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.params["learner.lr"]) == ("FINISHED", "run", "1e-06")
    assert [point.step for point in client.get_metric_history(run_id, "reward/mean")] == [1, 2]
    assert run.data.metrics["evaluation/math/pass_at_8"] == 0.75
    assert len(client.search_runs([run.info.experiment_id])) == 1
    client.delete_run(run_id)
    run_mlflow(tmp_path, "finished")
    assert (tmp_path / "mlflow_run_id").read_text().strip() != run_id
    # As another server would see it.
    (tmp_path / "mlflow_run_id").write_text("0123456789abcdef0123456789abcdef\n")
    run_mlflow(tmp_path, "finished")
