"""Log lines as JSON: whole, one a line, with the step and the actor they belong to."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from dphrl.config.loading import InputError
from dphrl.tracking.log import JsonFormatter, current_step, install_json_log


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.setenv("DPHRL_LOG", "json")
    text = io.StringIO()
    handler = install_json_log("driver", text)
    assert handler is not None
    yield text
    logging.getLogger().removeHandler(handler)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_holds_all_one_looks_for(stream: io.StringIO) -> None:
    token = current_step.set(7)
    logging.getLogger("dphrl.loop").info("synced %d engines", 2)
    current_step.reset(token)
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "dphrl.loop",
        "message": "synced 2 engines",
        "step": 7,
        "actor": "driver",
    }


def test_text_of_any_kind_stays_one_line(stream: io.StringIO) -> None:
    logging.getLogger("actors.rollout_pool").warning("two\nlines \ud800 é")
    (line,) = lines(stream)
    assert line["message"] == "two\nlines \ud800 é"
    assert line["step"] is None


def test_an_error_brings_its_traceback(stream: io.StringIO) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("cluster.launch").exception("it failed")
    (line,) = lines(stream)
    assert line["traceback"].endswith("ValueError: no")


def test_others_only_warn(stream: io.StringIO) -> None:
    logging.getLogger("somebody").info("chatter")
    logging.getLogger("somebody").warning("trouble")
    assert [line["message"] for line in lines(stream)] == ["trouble"]


def test_tasks_keep_steps_of_their_own(stream: io.StringIO) -> None:
    log = logging.getLogger("dphrl.loop")

    async def rollouts(step: int) -> None:
        current_step.set(step)
        await asyncio.sleep(0)
        log.info("rollouts")

    async def loop() -> None:
        current_step.set(1)
        upcoming = asyncio.create_task(rollouts(2))
        await asyncio.sleep(0)
        log.info("update")
        await upcoming

    asyncio.run(loop())
    assert {line["message"]: line["step"] for line in lines(stream)} == {"update": 1, "rollouts": 2}


def test_a_second_call_renames_and_adds_no_line(stream: io.StringIO) -> None:
    install_json_log("learner-0")
    logging.getLogger("actors.learner_rank").info("up")
    assert [line["actor"] for line in lines(stream)] == ["learner-0"]


def test_nothing_is_installed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(logging.getLogger().handlers)
    for value in ("", "text"):
        monkeypatch.setenv("DPHRL_LOG", value)
        assert install_json_log("driver") is None
    monkeypatch.delenv("DPHRL_LOG")
    assert install_json_log("driver") is None
    monkeypatch.setenv("DPHRL_LOG", "yaml")
    with pytest.raises(InputError, match="DPHRL_LOG: 'yaml' is no log format; use json or text"):
        install_json_log("driver")
    assert logging.getLogger().handlers == before
    assert not any(isinstance(handler.formatter, JsonFormatter) for handler in before)
