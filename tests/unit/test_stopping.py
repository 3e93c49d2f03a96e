"""What signals ask for, and what is finished before."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from dphrl.stopping import ECHO_S, Stopped, StopRequest, keep_handlers


def hear(number: int) -> None:
    os.kill(os.getpid(), number)


def stopped(work: Callable[[StopRequest], object]) -> Stopped:
    """What `work` is stopped with."""
    with pytest.raises(Stopped) as raised, StopRequest().listening() as stop:
        work(stop)
    return raised.value


def test_a_signal_ends_what_runs_and_names_itself() -> None:
    def work(stop: StopRequest) -> None:
        hear(signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    error = stopped(work)
    assert (error.status, error.at_once, str(error)) == (143, False, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_held_is_finished_first() -> None:
    done = []

    def work(stop: StopRequest) -> None:
        with stop.held(), stop.held():
            hear(signal.SIGINT)
            done.append("held")
        done.append("never")

    assert stopped(work).status == 130
    assert done == ["held"]


def test_a_second_signal_ends_at_once_but_its_echo_does_not() -> None:
    done = []

    def work(stop: StopRequest) -> None:
        with stop.held():
            hear(signal.SIGINT)
            hear(signal.SIGINT)
            done.append("echo")
            time.sleep(ECHO_S)
            hear(signal.SIGINT)
            done.append("never")

    assert stopped(work).at_once
    assert done == ["echo"]


def test_sigterm_after_ctrl_c_still_lets_what_is_held_finish() -> None:
    done = []

    def work(stop: StopRequest) -> None:
        with stop.held():
            hear(signal.SIGINT)
            hear(signal.SIGTERM)
            done.append("held")

    error = stopped(work)
    assert (done, error.status, error.at_once) == (["held"], 143, False)


def test_a_checkpoint_is_asked_for_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(saves=True).listening() as stop:
        assert not stop.take_save()
        hear(signal.SIGUSR1)
        assert stop.take_save()
        assert not stop.take_save()
        stop.check()
    assert capfd.readouterr().err == "dphrl: a checkpoint is saved after the present step\n"


def test_a_command_without_checkpoints_promises_none(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest().listening() as stop:
        hear(signal.SIGUSR1)
        assert not stop.take_save()
        stop.check()
    assert capfd.readouterr().err == ""


def test_a_signal_ends_a_wait_of_the_event_loop() -> None:
    cleaned = []

    async def work() -> None:
        asyncio.get_running_loop().call_later(0.05, hear, signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    began = time.monotonic()
    error = stopped(lambda stop: stop.run(work()))
    assert time.monotonic() - began < 10
    assert (cleaned, error.status) == ([True], 130)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, "collected"), (signal.SIGTERM, "given up")])
def test_collecting_is_given_up_for_a_scheduler_and_not_for_a_person(number: int, ends: str) -> None:
    done: list[str] = []

    async def collect() -> None:
        hear(number)
        await asyncio.sleep(0.2)
        done.append("collected")

    async def work(stop: StopRequest) -> None:
        with stop.held():
            try:
                await stop.unless_stopped(collect(), by=[signal.SIGTERM])
            except Stopped:
                done.append("given up")
                await asyncio.sleep(0.01)
                done.append("saved")
                raise

    stopped(lambda stop: stop.run(work(stop)))
    assert done == {"collected": ["collected"], "given up": ["given up", "saved"]}[ends]


def test_what_comes_after_a_signal_is_not_begun() -> None:
    begun = []

    async def evaluate() -> None:
        begun.append(True)

    async def work(stop: StopRequest) -> None:
        with stop.held():
            hear(signal.SIGINT)
            await stop.unless_stopped(evaluate())

    stopped(lambda stop: stop.run(work(stop)))
    assert begun == []


def test_a_second_signal_ends_what_never_waits() -> None:
    async def work(stop: StopRequest) -> None:
        with stop.held():
            hear(signal.SIGINT)
            time.sleep(ECHO_S)
            hear(signal.SIGINT)
            time.sleep(60)

    assert stopped(lambda stop: stop.run(work(stop))).at_once


HANGING = """
import asyncio, os, signal, time
from dphrl.stopping import ECHO_S, Stopped, StopRequest, end_process

async def work(stop):
    with stop.held():
        hangs = asyncio.create_task(asyncio.to_thread(time.sleep, 600))
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(2 * ECHO_S)
        os.kill(os.getpid(), signal.SIGINT)
        await hangs

signal.signal(signal.SIGINT, signal.default_int_handler)
with StopRequest().listening() as stop:
    try:
        stop.run(work(stop))
    except Stopped as stopped:
        print("ends at once:", stopped.at_once, flush=True)
        end_process(stopped.status)
"""


def test_a_second_signal_does_not_wait_for_a_thread_that_hangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (130, "ends at once: True\n"), done.stderr


def test_a_second_signal_in_another_task_is_told_once(
    caplog: pytest.LogCaptureFixture, left_to_asyncio: list[str]
) -> None:
    async def signalled() -> None:
        hear(signal.SIGINT)
        time.sleep(ECHO_S)
        hear(signal.SIGINT)
        await asyncio.sleep(60)

    async def fails() -> None:
        raise ValueError("told")

    async def work(stop: StopRequest) -> None:
        with stop.held():
            tasks = [asyncio.create_task(fails()), asyncio.create_task(signalled())]
            await asyncio.sleep(60)
            await asyncio.gather(*tasks)

    assert stopped(lambda stop: stop.run(work(stop))).at_once
    gc.collect()
    told = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert told == ["told"]
    assert len(left_to_asyncio) == 1
    left_to_asyncio.clear()


def test_a_lost_folder_is_an_error_of_its_own() -> None:
    async def work(stop: StopRequest) -> None:
        with stop.held():
            asyncio.get_running_loop().call_later(0.01, stop.abandon, "taken over")
            await asyncio.sleep(60)

    stop = StopRequest()
    assert not stop.lost
    with pytest.raises(RuntimeError, match="taken over"):
        stop.run(work(stop))
    assert stop.lost == "taken over"


def test_the_first_error_of_a_group_is_raised_itself() -> None:
    async def fail() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.wait_for(asyncio.sleep(60), 0.01))

    with pytest.raises(TimeoutError):
        StopRequest().run(fail())


def test_handlers_survive_a_library_that_sets_its_own() -> None:
    def work(stop: StopRequest) -> None:
        with keep_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        hear(signal.SIGTERM)
        time.sleep(5)

    assert stopped(work).status == 143


def test_a_signal_that_the_process_was_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            hear(signal.SIGINT)
            time.sleep(0.01)
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)
