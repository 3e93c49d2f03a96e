"""vLLM's own trainer side with our source, sender and client, against engines of width 2 that are threads.

The wire is real (gloo, a process group of 1 + 2 x 2 ranks), and so are vLLM's `send_weights` and its threads; the
engines only keep what they receive. So a session can be broken at every point in seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.weight_transfer import client
from actors.weight_transfer.ledger import EngineRecord, Ledger
from tests.integration import gloo_transfer
from tests.integration.gloo_transfer import GlooGroup

pytestmark = pytest.mark.integration

LIMIT_S = 2.0
WIDTH = 2


class ThreadEngine:
    """Two workers, each a thread with its own end of the group. `fault`: (method, raises | hangs | dies) of one."""

    def __init__(self) -> None:
        self.fault = ("", "")
        self.groups: list[GlooGroup | None] = [None] * WIDTH
        self.received: list[dict[str, torch.Tensor]] = [{} for _ in range(WIDTH)]
        self.ranks: list[int] = []
        self.version: int | None = None
        self._turn = threading.Lock()
        for name in ("init_weight_transfer_engine", "start_weight_update", "receive_weights", "finish_weight_update"):
            setattr(self, name, SimpleNamespace(remote=self._method(name)))

    def _method(self, name: str) -> Callable[..., Future[Any]]:
        return lambda argument=None: in_thread(lambda: self._collective(name, argument))

    def _collective(self, name: str, argument: Any) -> Any:
        with self._turn:  # an actor runs one call at a time
            # Like vLLM, it asks both workers and then waits for one after the other.
            parts = [in_thread(lambda worker=worker: self._work(name, argument, worker)) for worker in range(WIDTH)]
            for part in parts:
                part.result()
        if name == "finish_weight_update":
            self.version = argument
            return EngineRecord(argument)
        self.version = None
        return None

    def _work(self, name: str, argument: Any, worker: int) -> None:
        if self.fault[0] == name and worker == 0:
            if self.fault[1] == "hangs":
                time.sleep(LIMIT_S + 1)
            if self.fault[1] == "dies":
                self.groups[worker] = None  # closes its connections, as the end of a process does
            raise ray_error("a fault made for the test")
        if name == "init_weight_transfer_engine":
            rank = argument["rank_offset"] + worker
            self.ranks.append(rank)
            self.groups[worker] = GlooGroup(
                argument["master_address"], argument["master_port"], rank, argument["world_size"]
            )
        if name == "receive_weights":
            self._receive(argument, worker)

    def _receive(self, info: Any, worker: int) -> None:
        group = self.groups[worker]
        assert group is not None
        described = [
            (n, getattr(torch, d), s)
            for n, d, s in zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        ]
        self.received[worker] = {}
        for bucket in gloo_transfer.buckets(described):
            tensors = [torch.empty(shape, dtype=dtype) for _, dtype, shape in bucket]
            packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
            try:
                group.broadcast(packed, src=0)
            except RuntimeError as error:
                raise ray_error(str(error)) from None
            parts = packed.split([tensor.nbytes for tensor in tensors])
            for (name, dtype, shape), part in zip(bucket, parts, strict=True):
                self.received[worker][name] = part.view(dtype).view(shape)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Not a pool's: at the end the interpreter would wait for one that is stuck."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="engine", daemon=True).start()
    return result


def ray_error(message: str) -> Exception:
    from ray.exceptions import RayTaskError

    return RayTaskError("receive_weights", "Traceback ...", RuntimeError(message))


@pytest.fixture(autouse=True)
def futures_for_references(monkeypatch: pytest.MonkeyPatch) -> None:
    def ray_wait(futures: list[Any], num_returns: int, timeout: float) -> Any:
        done, late = wait(futures, timeout, FIRST_COMPLETED)
        return list(done), list(late)

    monkeypatch.setattr(client.ray, "wait", ray_wait)
    monkeypatch.setattr(client.ray, "get", lambda future: future.result())
    gloo_transfer.register()


@pytest.fixture(scope="module", autouse=True)
def the_rest() -> Iterator[None]:
    yield
    gloo_transfer.wait_for_the_rest()


class Policy:
    """Enough of one for `LearnerWeights`: several buckets, two types, a tied weight."""

    def __init__(self) -> None:
        self.lm = torch.nn.Module()
        self.lm.embed = torch.nn.Embedding(400, 300)
        self.lm.layers = torch.nn.ModuleList(torch.nn.Linear(300, 500) for _ in range(3))
        self.lm.norm = torch.nn.LayerNorm(300).to(torch.bfloat16)
        self.lm.head = torch.nn.Linear(300, 400, bias=False)
        self.lm.head.weight = self.lm.embed.weight


@pytest.fixture
def learner() -> Any:
    from actors.weight_transfer.source import LearnerWeights
    from actors.weight_transfer.trainer import LearnerSource, open_sender

    gloo_transfer.register()
    policy = Policy()
    source = LearnerSource(LearnerWeights(policy, zero_stage=0), records=True)  # type: ignore[arg-type]
    sender = open_sender(source, "nccl", 0, 1)
    return SimpleNamespace(policy=policy, source=source, sender=sender)


def test_the_source_declares_what_it_yields(learner: Any) -> None:
    declared = [(m.name, m.dtype, m.shape) for m in learner.source.metadata()]
    assert declared == [(name, t.dtype, tuple(t.shape)) for name, t in learner.source]
    names = [name for name, *_ in declared]
    assert "embed.weight" in names
    assert "head.weight" not in names, "a tied weight comes once"


def test_every_worker_has_a_rank_of_its_own_and_gets_every_weight(learner: Any) -> None:
    engines = [ThreadEngine(), ThreadEngine()]
    for version in (1, 2):
        with torch.no_grad():
            for parameter in learner.policy.lm.parameters():
                parameter.add_(1)
        outcome = learner.sender.send(engines, WIDTH, version, LIMIT_S)
        assert [record.policy_version for record in outcome.records] == [version, version]
        expected = dict(learner.policy.lm.named_parameters())
        for engine in engines:
            for received in engine.received:
                assert received.keys() == expected.keys()
                assert all(torch.equal(received[name], tensor) for name, tensor in expected.items())
        ledger = Ledger()
        for pair in engines[1].received[1].items():
            ledger.note(*pair)
        assert learner.source.summary == ledger.summary
    assert sorted(rank for engine in engines for rank in engine.ranks) == [1, 2, 3, 4], "one group for both sessions"
    assert sorted(engines[1].ranks) == [3, 4]


@pytest.mark.parametrize("how", ["raises", "hangs", "dies"])
@pytest.mark.parametrize(
    "method", ["init_weight_transfer_engine", "start_weight_update", "receive_weights", "finish_weight_update"]
)
def test_a_broken_session_frees_the_learner_in_time_and_a_new_group_works(learner: Any, method: str, how: str) -> None:
    engines = [ThreadEngine(), ThreadEngine()]
    engines[1].fault = (method, how)
    began = time.monotonic()
    outcome = learner.sender.send(engines, WIDTH, 1, LIMIT_S)
    took = time.monotonic() - began
    assert outcome.failures, outcome
    (failure,) = [failure for failure in outcome.failures if failure.index == 1]
    assert failure.how == ("hung" if how == "hangs" else "raised")
    assert took <= LIMIT_S + 5
    assert how == "hangs" or took < LIMIT_S, "a failure is not waited out"
    print(f"{method} {how}: {took:.2f} s: {failure}; cut: {outcome.cut}")
    replaced = [
        ThreadEngine() if i in {f.index for f in outcome.failures} | {*outcome.cut} else engines[i] for i in (0, 1)
    ]
    assert replaced[1] is not engines[1]
    assert learner.sender.send(replaced, WIDTH, 2, LIMIT_S).records[1].policy_version == 2


def test_a_sharded_learner_declares_full_shapes_and_gives_tensors_that_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is packed when it is collected, and by then ZeRO-3 has let go of its tensors."""
    import deepspeed

    from actors.weight_transfer.source import LearnerWeights
    from actors.weight_transfer.trainer import LearnerSource

    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    for name, value in {**variables, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    try:
        lm = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Linear(50, 20))
        expected = {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}
        deepspeed.initialize(
            model=lm,
            config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        )
        assert next(lm.parameters()).numel() == 0, "sharded"
        weights = LearnerWeights(SimpleNamespace(lm=lm), zero_stage=3)  # type: ignore[arg-type]
        source = LearnerSource(weights, records=True)
        assert [(m.name, m.shape) for m in source.metadata()] == [(n, tuple(t.shape)) for n, t in expected.items()]
        bucket = dict(source)
        assert all(torch.equal(bucket[name], tensor) for name, tensor in expected.items())
        begun = iter(source)
        next(begun)
        source.complete()
        assert next(begun, None) is None, "the pass that was begun is ended, not another one made"
        assert next(lm.parameters()).numel() == 0
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
