"""Named events: from a log call to a line on disk, a count in the step's record, a row of the report."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from dphrl.tracking.events import EVENTS_FILE, current_step, read_events
from dphrl.tracking.tracker import Tracker, read_metrics
from tests.unit.report_folders import render, write_run

log = logging.getLogger("actors.anything")


def tell(name: str, message: str = "engine %d was started anew", number: int = 2, **extra: Any) -> None:
    log.warning(message, number, extra={"event": name, **extra})


def test_a_log_record_with_an_event_is_a_line_of_the_file(tmp_path: Path) -> None:
    token = current_step.set(7)
    try:
        with Tracker(tmp_path, tensorboard=False):
            log.warning("a plain warning is no event")
            tell("engine_replaced", facts={"engine": 2, "gap": math.nan, "at": [1, math.inf]})
            # It is on disk now, whatever happens next.
            (line,) = (tmp_path / EVENTS_FILE).read_text().splitlines()
    finally:
        current_step.reset(token)
    event = json.loads(line)
    assert list(event) == ["time", "step", "event", "message", "facts"]
    assert event["time"].endswith("Z")
    assert (event["step"], event["event"], event["message"]) == (7, "engine_replaced", "engine 2 was started anew")
    assert event["facts"] == {"engine": 2, "gap": None, "at": [1, None]}, "JSON has no NaN"
    tell("later")
    assert len(read_events(tmp_path)) == 1, "the tracker is closed"


def test_a_record_may_name_its_step_and_hold_what_json_does_not_know(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False):
        tell("resumed", step=12, facts={"checkpoint": Path("checkpoints/step_12")})
        log.info("outside a step: \ud800", extra={"event": "note"})
    first, second = read_events(tmp_path)
    assert (first["step"], first["facts"]) == (12, {"checkpoint": "checkpoints/step_12"})
    assert (second["step"], second["facts"]) == (None, {})


def test_a_line_that_a_kill_cut_off_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_text('{"event": "whole", "step": 1}\n{"event": "cut o')
    with Tracker(tmp_path, tensorboard=False):
        tell("next")
        tell("after")
    assert [event["event"] for event in read_events(tmp_path)] == ["whole", "next", "after"]


def test_events_are_counted_in_the_next_record_and_outlive_a_resume(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tell("skipped_step")
        tell("skipped_step")
        tell("no_signal")
        tracker.log_step({"step": 1})
        tracker.log_step({"step": 2})
        first, second = read_metrics(tmp_path)
        tracker.truncate_after(1)
    assert not any(name.startswith("events/") for name in second), "each is counted once"
    assert (first["events/skipped_step"], first["events/no_signal"]) == (2, 1)
    assert len(read_events(tmp_path)) == 3


def test_a_line_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(tmp_path, tensorboard=False) as tracker:
        (tmp_path / EVENTS_FILE).mkdir()
        tell("no_signal")
        tracker.log_step({"step": 1})
    assert "IsADirectoryError" in capsys.readouterr().err
    assert read_metrics(tmp_path)[0]["events/no_signal"] == 1


def test_the_report_has_a_table_and_marks(tmp_path: Path) -> None:
    quiet, told = write_run(tmp_path / "quiet"), write_run(tmp_path / "told")
    plain = render(tmp_path, quiet)
    assert "No run has told of anything." in plain.text
    event = {"time": "2026-01-02T03:04:05.678Z", "step": 3, "event": "no_signal", "message": "<b>flat</b>", "facts": {}}
    resumed = {"time": "2026-01-02T03:04:06.678Z", "step": None, "event": "resumed", "message": "again", "facts": {}}
    routine = event | {"step": 2, "event": "checkpoint"}
    (told / EVENTS_FILE).write_text("".join(json.dumps(one) + "\n" for one in (routine, event, resumed)))
    page = render(tmp_path, quiet, told)
    rows = page.table("arm seed step event")
    assert rows[1:] == [
        ["told", "0", "3", "no_signal", "<b>flat</b>", "2026-01-02T03:04:05.678Z"],
        ["told", "0", "-", "resumed", "again", "2026-01-02T03:04:06.678Z"],
    ]
    upright = [[line for line in one.chart("Reward").iter() if line.get("class") == "guide"] for one in (plain, page)]
    assert len(upright[1]) == len(upright[0]) + 1
