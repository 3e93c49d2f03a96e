"""What a run writes and says: metrics, samples, log, resume; progress, step lines and tables."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import dphrl.tracking.console
from dphrl.tracking.console import Console, format_step, format_table
from dphrl.tracking.metrics import BY_NAME, METRICS, REQUIRED, complete_step, validate_step
from dphrl.tracking.tracker import Tracker, read_metrics
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup


def record(step: int, **changes: float) -> dict[str, float]:
    return {**dict.fromkeys(REQUIRED, 0.5), "step": step, **changes}


def steps_on_disk(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


# ------------------------------------------------------------ the namespace


def test_names_are_unique_and_explained() -> None:
    assert len(BY_NAME) == len(METRICS)
    assert all(metric.meaning.endswith(".") for metric in METRICS)
    contract = "step policy_version reward/mean policy/loss policy/clip_fraction policy/entropy divergence/loss"
    assert {*contract.split(), "reward/status/infrastructure_error", "time/sync_s"} <= set(REQUIRED)


def test_a_complete_record_is_valid() -> None:
    validate_step(record(1))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"policy/loss": math.nan}, "policy/loss is nan"),
        ({"learner/grad_norm": math.inf}, "learner/grad_norm is inf"),
        ({"x": "text"}, "x is 'text', not a number"),
        ({"x": True}, "x is True, not a number"),
    ],
)
def test_a_record_with_a_bad_value_is_refused(change: dict[str, float], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        validate_step({**record(3), **change})


def test_a_missing_name_is_told_with_the_step() -> None:
    incomplete = record(3)
    del incomplete["reward/mean"]
    with pytest.raises(ValueError, match=r"metrics of step 3: reward/mean is missing"):
        validate_step(incomplete)


def test_a_run_without_divergence_has_a_divergence_of_zero() -> None:
    plain = record(1)
    del plain["divergence/loss"]
    assert complete_step(plain)["divergence/loss"] == 0.0
    assert complete_step(record(1))["divergence/loss"] == 0.5


# ------------------------------------------------------------ metrics.jsonl


def test_a_step_is_on_disk_at_once(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", tensorboard=False) as tracker:
        tracker.log_step(record(1, **{"reward/mean": 0.25}))
        assert read_metrics(tmp_path / "run")[0]["reward/mean"] == 0.25
        tracker.log_step(record(2))
        assert steps_on_disk(tmp_path / "run") == [1, 2]


def test_a_number_that_is_not_finite_is_null_and_warned_about(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log_step(record(1, **{"policy/loss": math.nan}))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["policy/loss"] is None
    assert "WARNING dphrl.tracking.tracker: metrics of step 1: policy/loss is nan" in (tmp_path / "run.log").read_text()


def test_resume_forgets_later_steps_and_goes_on(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in range(1, 6):
            tracker.log_step(record(step))
            tracker.log_samples(step, [group("a", 1)], 4)
    # The kill came in the middle of a line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/m')
    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert tracker.truncate_after(3) == 3
        assert steps_on_disk(tmp_path) == [1, 2, 3]
        tracker.log_step(record(4))
    assert steps_on_disk(tmp_path) == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{step:06d}.jsonl" for step in (1, 2, 3)
    ]


def test_a_last_line_without_its_end_gets_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)))
    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert tracker.truncate_after(1) == 0
        tracker.log_step(record(2))
    assert steps_on_disk(tmp_path) == [1, 2]


def test_truncation_in_mid_run_and_without_a_file(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert tracker.truncate_after(0) == 0
        tracker.log_step(record(1))
        assert tracker.truncate_after(0) == 1
        tracker.log_step(record(1))
    assert steps_on_disk(tmp_path) == [1]


def test_evaluations_of_steps_that_are_taken_again_go(tmp_path: Path) -> None:
    names = ["base.json", "step_4.json", ".step_4.json.sha256", "step_40.json", ".step_40.json.sha256", "mine_40.json"]
    (tmp_path / "eval" / "step_40.json.partial").mkdir(parents=True)
    for name in names:
        (tmp_path / "eval" / name).touch()
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.truncate_after(39)
    left = {path.name for path in (tmp_path / "eval").iterdir()}
    assert left == {"base.json", "step_4.json", ".step_4.json.sha256", "mine_40.json"}


# ------------------------------------------------------------ TensorBoard, run.log


def test_scalars_go_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path) as tracker:
        tracker.log_step(record(1, **{"reward/mean": 0.25}))
        tracker.log_step(record(2, **{"reward/mean": 0.75}))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]


def test_a_missing_tensorboard_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Tracker(tmp_path) as tracker:
        tracker.log_step(record(1))
        tracker.log_step(record(2))
    assert (tmp_path / "run.log").read_text().count("no TensorBoard scalars") == 1
    assert steps_on_disk(tmp_path) == [1, 2]


def test_the_log_has_our_news_and_others_warnings_only_while_open(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False):
        logging.getLogger("actors.rollout_pool").info("engine 1 restarted")
        logging.getLogger("somebody").info("chatter")
        logging.getLogger("somebody").warning("trouble \udc80")
    logging.getLogger("dphrl.loop").warning("after the end")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO actors.rollout_pool: engine 1 restarted",
        "WARNING somebody: trouble \\udc80",
    ]
    assert lines[0][10] == "T"
    assert lines[0].split(" ")[0].endswith("Z")


# ------------------------------------------------------------ sinks


class Copies:
    name = "copies"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def start(self, config: object, folder: Path) -> None:
        raise AssertionError("whoever opens the tracker starts its sinks")

    def log_step(self, record: dict[str, float]) -> None:
        self.calls.append(("step", record["step"], record["divergence/loss"]))

    def log_evaluation(self, step: int, policy: str, summaries: object) -> None:
        self.calls.append(("evaluation", step, policy, summaries))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


def run_with(copies: Copies, folder: Path, error: BaseException | None) -> None:
    plain = record(1)
    del plain["divergence/loss"]
    with Tracker(folder, tensorboard=False, sinks=copies) as tracker:
        tracker.log_evaluation(0, "base", [])
        tracker.log_step(plain)
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (RuntimeError("no"), "failed"), (KeyboardInterrupt(), "killed")]
)
def test_sinks_get_what_is_written_and_how_it_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    copies = Copies()
    with suppress(RuntimeError, KeyboardInterrupt):
        run_with(copies, tmp_path, error)
    assert copies.calls == [("evaluation", 0, "base", []), ("step", 1, 0.0), ("finish", status)]


# ------------------------------------------------------------ samples


def group(prompt_id: str, num_completions: int, text: str = "text") -> RolloutGroup:
    completions = tuple(
        Completion(prompt_id, i, (1,), f"{text} {i}", (-0.1,), "stop", 7) for i in range(num_completions)
    )
    results = tuple(RewardResult(RewardStatus.WRONG, "not it") for _ in completions)
    return RolloutGroup(Prompt(prompt_id, f"ask {prompt_id}", (1,), "!", "d"), completions, results)


def test_samples_come_from_as_many_prompts_as_there_are(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        path = tracker.log_samples(12, [group("a", 3), group("b", 1), group("c", 3)], 5)
        assert tracker.log_samples(13, [group("a", 3)], 0) is None
        assert tracker.log_samples(14, [], 5) is None
    assert path == tmp_path / "samples" / "step_000012.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        ("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1)
    ]  # fmt: skip
    assert rows[0] == {
        "prompt_id": "a",
        "prompt": "ask a",
        "completion": "text 0",
        "score": 0.0,
        "status": "wrong",
        "detail": "not it",
        "policy_version": 7,
        "sample_index": 0,
        "finish_reason": "stop",
    }
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["step_000012.jsonl"]


@pytest.mark.parametrize("text", ["\ud800", "é\u2028\n\x00", '"\\'])
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        path = tracker.log_samples(1, [group("a", 1, text)], 1)
    assert path is not None
    assert json.loads(path.read_text(encoding="utf-8"))["completion"] == f"{text} 0"


# ------------------------------------------------------------ the console


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(dphrl.tracking.console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def plain() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream, interactive=False), stream


def test_a_quick_task_is_one_plain_line(clock: Clock) -> None:
    console, stream = plain()
    with console.task("reference sampling", 640) as advance:
        for _ in range(640):
            advance()
        clock.now += 2.5
    assert stream.getvalue() == "reference sampling  640/640 (100 %)  2.5 s\n"


def test_a_long_task_has_a_line_each_tenth_and_the_last(clock: Clock) -> None:
    console, stream = plain()
    with console.task("sampling", 100) as advance:
        for _ in range(100):
            clock.now += 1.0
            advance(1)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sampling  10/100 (10 %)  10.0 s, about 90 s left"
    assert lines[-1] == "sampling  100/100 (100 %)  100.0 s"
    assert len(lines) == 10


def test_a_task_that_samples_says_how_fast(clock: Clock) -> None:
    console, stream = plain()
    with console.task("sampling", 100) as advance:
        for _ in range(4):
            clock.now += 5.0
            advance(25, 500)
    assert stream.getvalue().splitlines() == [
        "sampling  25/100 (25 %)  5.0 s, about 15 s left  100 tok/s",
        "sampling  50/100 (50 %)  10.0 s, about 10 s left  100 tok/s",
        "sampling  75/100 (75 %)  15.0 s, about 5 s left  100 tok/s",
        "sampling  100/100 (100 %)  20.0 s  100 tok/s",
    ]


def test_lines_keep_their_distance(clock: Clock) -> None:
    console, stream = plain()
    with console.task("sampling", 10) as advance:
        for _ in range(10):
            clock.now += 2.0
            advance(1)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["3/10", "6/10", "9/10", "10/10"]


def test_work_that_crawls_says_it_is_alive(clock: Clock) -> None:
    console, stream = plain()
    with console.task("sampling", 10_000) as advance:
        for _ in range(5):
            clock.now += 30.0
            advance(1)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["2/10000", "4/10000", "5/10000"]


def fail_after_four(console: Console) -> None:
    with console.task("b", 10) as advance:
        advance(4)
        raise RuntimeError("no")


def test_a_task_of_unknown_length_and_one_that_fails(clock: Clock) -> None:
    console, stream = plain()
    with console.task("a", None) as advance:
        advance(7)
    with pytest.raises(RuntimeError, match="no"):
        fail_after_four(console)
    assert stream.getvalue().splitlines() == ["a  7  0.0 s", "b  4/10 (40 %)  0.0 s (stopped)"]


def test_bars_may_overlap_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(stream, interactive=True)
    with console.task("first", 2) as first, console.task("second", 3) as second:
        first(2)
        first(0, 7)
        console.info("[in between]")
        second(3)
    with console.task("third", 1) as third:
        third()
    for word in ("first", "second", "2/2", "3/3", "[in between]", "third", "1/1", "tok/s"):
        assert word in stream.getvalue()


def test_a_step_is_one_line() -> None:
    values = {
        "reward/mean": 0.53,
        "policy/loss": -0.0123,
        "divergence/loss": 0.0041,
        "sync/logprob_gap_max": 2.4e-7,
        "sync/logprob_gap_mean": 3.1e-8,
        "rollout/num_tokens": 3150,
        "time/step_s": 2.1,
    }
    console, stream = plain()
    console.step_line(record(3, **values), 60)
    wanted = "step  3/60  reward 0.530  loss -0.0123  div 0.0041  gap 2e-07  mean gap 3e-08  1500 tok/s  2.1 s\n"
    assert stream.getvalue() == wanted
    assert format_step({"step": 12}, 60) == "step 12/60"
    assert format_step({"step": 12, "time/step_s": 2, "time/waiting_share": 0.412}, 60) == (
        "step 12/60  2.0 s (41% waiting)"
    )


def test_a_table_is_aligned_and_never_wrapped() -> None:
    console, stream = plain()
    console.table("result", ["arm", "pass@1", "n"], [["base [x]", 0.4153, 10], ["a" * 120, None, 7]])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "result"
    assert lines[1] == "arm" + " " * 119 + "pass@1   n"
    assert lines[3] == "base [x]" + " " * 115 + "0.415  10"
    assert lines[4] == "a" * 120 + "       -   7"
    assert format_table(["a", "b"], []) == "a  b\n-  -"
