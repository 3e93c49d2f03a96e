"""What vLLM is told at an engine's start, what becomes of a failed one, and what an engine leaves behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import engine_errors, vllm_settings
from actors.engine_errors import EngineStartError, ErrorFileHandler, engine_start
from actors.engine_processes import (
    SHARED_MEMORY,
    end_with_any_worker,
    forget_names_of_shared_memory,
    forget_names_of_sockets,
    names_of_shared_memory,
    remove_orphans,
)
from dphrl.config.loading import InputError
from dphrl.learner.repeatable import use_repeatable_kernels
from dphrl.prepare import check_width


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The environment, which is as before when the test is over."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_BATCH_INVARIANT", "CUBLAS_WORKSPACE_CONFIG"):
        os.environ.pop(name, None)
    return os.environ


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(("width", "threads", "each"), [(1, 2, 2), (2, 2, 1), (2, 1, 1), (2, 8, 4), (4, 6, 1)])
def test_workers_share_the_threads_of_their_engine(
    make_config: Any, variables: Any, width: int, threads: int, each: int
) -> None:
    config = make_config(rollout={"tensor_parallel": width, "threads_per_engine": threads})
    assert (
        vllm_settings.process_variables(config).items()
        >= {"OMP_NUM_THREADS": str(each), **vllm_settings.KEEP_MEMORY}.items()
    )
    vllm_settings.set_variables(config, None)
    assert variables["OMP_NUM_THREADS"] == str(each), "its children inherit it"
    assert variables.get("VLLM_CPU_OMP_THREADS_BIND") == ("nobind" if width > 1 else None)


@pytest.mark.parametrize(("dtype", "products"), [("float32", "ieee"), ("bfloat16", None)])
def test_products_of_a_float32_engine_are_float32(make_config: Any, dtype: str, products: str | None) -> None:
    variables = vllm_settings.process_variables(make_config(model={"dtype": dtype}))
    assert variables.get("TRITON_F32_DEFAULT") == products


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_engines_have_a_fixed_workspace_and_invariant_kernels_on_a_gpu(
    make_config: Any, variables: Any, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, deterministic: bool
) -> None:
    monkeypatch.setattr(vllm_settings.torch.cuda, "is_available", lambda: on_gpu)
    vllm_settings.set_variables(make_config(deterministic=deterministic), None)
    assert variables.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    assert variables.get("VLLM_BATCH_INVARIANT") == ("1" if deterministic and on_gpu else None)


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({"max_tokens": 24}, 4096),
        ({"max_tokens": 24, "tensor_parallel": 2}, 8192),
        # A prompt of 8192 tokens has room beside the one token of each of 256 + 8 other sequences.
        ({"max_tokens": 8192}, 16 + 8192 + 256 + 8),
    ],
)
def test_tokens_of_a_step_on_a_cpu(make_config: Any, rollout: dict[str, Any], expected: int) -> None:
    config = make_config(rollout=rollout, sync={"num_probes": 8}, learner={"micro_batch_tokens": 8208})
    arguments = vllm_settings.engine_arguments(config, "model")
    assert arguments["max_num_seqs"] == 256 + 8
    assert arguments["max_num_batched_tokens"] == expected


def test_tokens_of_a_step_on_a_gpu_are_for_vllm_to_say(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings.torch.cuda, "is_available", lambda: True)
    assert vllm_settings.engine_arguments(make_config(), "model")["max_num_batched_tokens"] is None


def test_a_deterministic_learner_has_a_fixed_workspace_and_deterministic_kernels(variables: Any) -> None:
    try:
        use_repeatable_kernels(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert variables["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        use_repeatable_kernels(False)
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------ widths

SIX_HEADS = {"hidden_size": 192, "num_attention_heads": 6}


@pytest.mark.parametrize(
    ("sizes", "width", "said"),
    [
        ({}, 3, "4 attention heads, which do not divide by it; choose one of 1, 2, 4"),
        (
            {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2},
            3,
            "2 key-value heads, which neither",
        ),
        ({"intermediate_size": 322}, 4, "intermediate_size=322, which does not divide by it; choose one of 1, 2$"),
        (
            {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 300},
            3,
            "of 24 tok",
        ),
    ],
)
def test_a_width_that_does_not_split_the_model_is_refused(
    make_config: Any, tiny_dir: str, tmp_path: Path, sizes: dict[str, int], width: int, said: str
) -> None:
    found = json.loads((Path(tiny_dir) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | sizes))
    config = make_config(rollout={"tensor_parallel": width})
    with pytest.raises(InputError, match=rf"^rollout.tensor_parallel={width}: .*{said}"):
        check_width(config, str(tmp_path))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_width_that_splits_the_model_is_not_refused(make_config: Any, tiny_dir: str, width: int) -> None:
    check_width(make_config(rollout={"tensor_parallel": width}), tiny_dir)


def test_several_workers_may_have_a_copy_of_one_head(make_config: Any, tiny_dir: str, tmp_path: Path) -> None:
    found = json.loads((Path(tiny_dir) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"num_key_value_heads": 2}))
    check_width(make_config(rollout={"tensor_parallel": 4}), str(tmp_path))


# ------------------------------------------------------------------------------------------ failures


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_errors.ray.util, "get_node_ip_address", lambda: "10.0.0.7")


def fail(index: int, start: Callable[[], None]) -> None:
    with engine_start(index):
        start()


def test_a_failed_start_names_engine_node_and_reason_in_one_line(node: None) -> None:
    def start() -> None:
        raise ValueError("no room\nfor the cache")

    with pytest.raises(EngineStartError) as caught:
        fail(3, start)
    assert str(caught.value).startswith(
        "rollout engine 3 on node 10.0.0.7 did not start: ValueError: no room for the cache (vLLM's output is"
    )
    assert "\n" not in str(caught.value)


WORKER = """
import logging, sys
from actors.engine_errors import keep_errors
keep_errors()
keep_errors()
log = logging.getLogger("vllm.worker")
try:
    raise KeyError(sys.argv[1])
except KeyError:
    log.exception("it failed")
log.error("and so did everything after it")
log.warning("no error")
"""


def test_the_reason_is_that_of_the_worker_which_failed_first(node: None) -> None:
    def start() -> None:
        for what in ("first", "second"):
            subprocess.run([sys.executable, "-c", WORKER, what], check=True)
        raise RuntimeError("see the trace above")

    with pytest.raises(EngineStartError, match="did not start: KeyError: 'first' "):
        fail(0, start)


def test_what_this_process_logged_is_no_reason(node: None) -> None:
    handler = ErrorFileHandler()
    record = logging.LogRecord("vllm", logging.ERROR, "", 0, "told here", None, None)

    def start() -> None:
        handler.emit(record)
        raise RuntimeError("raised here")

    with pytest.raises(EngineStartError, match="did not start: RuntimeError: raised here "):
        fail(0, start)
    handler.emit(record)  # the file is gone, and stays so


def test_a_start_that_goes_well_raises_nothing_and_leaves_no_file(node: None) -> None:
    with engine_start(0):
        path = os.environ[engine_errors.VARIABLE]
        assert Path(path).exists()
    assert not Path(path).exists()
    assert engine_errors.VARIABLE not in os.environ


# ------------------------------------------------------------------------------------------ shared memory


def hold(name: str, connection: Connection) -> None:
    """A child that has shared memory of this name, and a semaphore, until it hears from its parent."""
    held, lock = shared_memory.SharedMemory(name=name), multiprocessing.get_context("spawn").Lock()
    connection.send(lock._semlock.name)  # type: ignore[attr-defined]
    connection.recv()
    assert held.buf is not None
    connection.send(bytes(held.buf[:4]))
    held.close()
    os._exit(0)  # without complaints about what is gone


def test_shared_memory_in_use_here_or_in_a_child_loses_its_name_and_no_other() -> None:
    mine, of_child, of_nobody = (shared_memory.SharedMemory(create=True, size=64) for _ in range(3))
    assert of_child.buf is not None
    of_child.buf[:4] = b"mine"
    of_child.close()
    of_nobody.close()
    other = SHARED_MEMORY / "dphrl-test-other"
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(of_child.name, theirs))
    child.start()
    try:
        other.write_bytes(b"x")
        used = {mine.name, of_child.name, ours.recv().replace("/", "sem.")}
        assert used <= {*forget_names_of_shared_memory()}
        assert not any((SHARED_MEMORY / name).exists() for name in used)
        assert (SHARED_MEMORY / of_nobody.name).exists()
        assert other.exists()
        ours.send("end")
        assert ours.recv() == b"mine", "who has it still has it"
    finally:
        child.kill()
        child.join()
        mine.close()
        other.unlink()
        of_nobody.unlink()
        for name in (mine.name, of_child.name):
            resource_tracker.unregister(f"/{name}", "shared_memory")


def test_sockets_in_use_lose_their_names_and_go_on() -> None:
    folder = Path(tempfile.gettempdir())
    mine, other = folder / str(uuid.uuid4()), folder / f"not-vllm-{uuid.uuid4()}"
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as client,
        socket.socket(socket.AF_UNIX) as named,
    ):
        server.bind(str(mine))
        named.bind(str(other))
        server.listen()
        client.connect(str(mine))
        assert str(mine) in forget_names_of_sockets()
        assert not mine.exists()
        assert other.exists()
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"still there")
            assert accepted.recv(32) == b"still there"
    other.unlink()


def test_shared_memory_of_a_process_that_died_is_removed_and_no_other() -> None:
    from multiprocessing import shared_memory

    old = shared_memory.SharedMemory(create=True, size=64)
    old.close()
    before = names_of_shared_memory()
    used, orphan = (shared_memory.SharedMemory(create=True, size=64) for _ in range(2))
    orphan.close()
    try:
        assert remove_orphans(before) == [orphan.name]
        assert {old.name, used.name} <= names_of_shared_memory()
    finally:
        used.close()
        used.unlink()
        old.unlink()


# ------------------------------------------------------------------------------------------ waiting


def test_an_engine_ends_with_the_first_of_its_workers_and_says_why() -> None:
    context = multiprocessing.get_context("fork")
    read, write = os.pipe()

    def engine() -> None:
        workers = [context.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        end_with_any_worker(lambda error: os.write(write, str(error).encode()))
        os.kill(workers[1].pid or 0, signal.SIGKILL)
        time.sleep(60)

    process = context.Process(target=engine)
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert re.fullmatch(r"the engine's worker process \d+ was ended by signal 9", os.read(read, 200).decode())


@pytest.fixture
def socket_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where vLLM's sockets lie, which stay when a process ends. Their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="dq-", dir="/tmp") as folder:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield


@pytest.mark.usefixtures("socket_folder")
def test_processes_of_an_engine_sleep_while_they_wait_for_each_other() -> None:
    """vLLM's real queue between the processes of an engine, with both ends here."""
    shm_broadcast = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast")
    from actors.weight_transfer import plugin

    init = shm_broadcast.SpinCondition.__init__
    before = init.__defaults__
    try:
        plugin._wait_asleep()
        writer = shm_broadcast.MessageQueue(1, 1)
        reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
        heard: list[Any] = []

        def read() -> None:
            reader.wait_until_ready()
            heard.extend(reader.dequeue(timeout=20) for _ in range(2))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        writer.wait_until_ready()
        writer.enqueue("one")
        began = time.process_time()
        time.sleep(0.8)
        used = time.process_time() - began
        writer.enqueue("two")
        thread.join(20)
    finally:
        init.__defaults__ = before
    assert heard == ["one", "two"]
    assert used < 0.4, "the reader took the core for as long as it waited"
