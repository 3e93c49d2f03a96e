"""The object store's way for weights: packed in chunks, published as a stream, sent to engines, mapped by workers."""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.learner_group import RayLearner
from actors.vllm_settings import KEEP_MEMORY
from actors.weight_transfer import packing
from actors.weight_transfer.failures import SyncFailedError
from actors.weight_transfer.ledger import EngineRecord, Ledger
from actors.weight_transfer.packing import pack_tensor, packed_chunks, unpack_tensors
from actors.weight_transfer.segment import ALIGN_BYTES, Segment, SegmentReader
from actors.weight_transfer.session import MAX_CHUNKS_TAKEN, EngineSteps, ObjectStoreTransfer
from dphrl.config.runtime import SyncConfig

# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_tensor_comes_back_as_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    packed = pack_tensor("model.weight", tensor.requires_grad_() if dtype.is_floating_point else tensor)
    [(_, back)] = unpack_tensors([packed])
    assert (packed.name, back.dtype, tuple(back.shape)) == ("model.weight", dtype, shape)
    assert torch.equal(back, tensor)


def test_a_view_that_is_not_contiguous_is_packed_by_its_values() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(unpack_tensors([pack_tensor("w", tensor)])[0][1], tensor)


def test_packing_copies_nothing_that_is_whole() -> None:
    tensor = torch.arange(12.0)
    assert pack_tensor("w", tensor).data.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize("chunk_bytes", [1, 100, 160, 400, 10**6])
def test_every_tensor_is_in_one_chunk_and_chunks_are_of_bounded_size(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk_bytes)
    tensors = [(f"w{i}", torch.full((10 + 30 * (i == 4),), float(i))) for i in range(9)]  # 40 bytes, one of 160
    chunks = list(packed_chunks(tensors))
    sent = {name: tensor for chunk in chunks for name, tensor in unpack_tensors(chunk)}
    assert list(sent) == [name for name, _ in tensors]
    assert all(torch.equal(sent[name], tensor) for name, tensor in tensors)
    assert all(chunks)
    sizes = [sum(p.data.nbytes for p in chunk) for chunk in chunks]
    assert all(size <= chunk_bytes or len(chunk) == 1 for size, chunk in zip(sizes, chunks, strict=True))
    # No chunk could have taken the next one's first tensor.
    firsts = [chunk[0].data.nbytes for chunk in chunks[1:]]
    assert all(size + first > chunk_bytes for size, first in zip(sizes, firsts, strict=False))


def test_chunks_are_packed_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 80)
    read: list[int] = []

    def source() -> Any:
        for i in range(10):
            read.append(i)
            yield f"w{i}", torch.zeros(10)

    chunks = packed_chunks(source())
    assert [p.name for p in next(chunks)] == ["w0", "w1"]
    assert read == [0, 1, 2], "the first that does not fit is the last that was read"


# ------------------------------------------------------------------------------------------ publishing


@pytest.mark.parametrize("tied", [True, False])
def test_rank_zero_publishes_every_weight_once(make_config: Any, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from actors import learner_rank
    from actors.weight_transfer.source import LearnerWeights

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, tie_word_embeddings=tied, **shape))
    ranks = []
    for number in range(2):
        rank = object.__new__(learner_rank.LearnerRank.__ray_metadata__.modified_class)
        rank._rank, rank._config, rank._sent = number, make_config(), None
        rank._weights = LearnerWeights(SimpleNamespace(lm=lm), zero_stage=2)
        ranks.append(rank)
    with pytest.raises(RuntimeError, match="has not sent its weights yet"):
        ranks[0].sent()
    published = list(ranks[0].publish())
    assert all(told is True for told in published[::2])
    chunks = published[1::2]
    assert list(ranks[1].publish()) == [], "the other ranks only take part in the gathers"
    sent = {name: tensor for chunk in chunks for name, tensor in unpack_tensors(chunk)}
    assert sum(len(chunk) for chunk in chunks) == len(sent)
    assert sent.keys() == dict(lm.named_parameters()).keys()
    assert ("lm_head.weight" in sent) is not tied
    assert all(torch.equal(sent[name], parameter) for name, parameter in lm.named_parameters())
    ledger = Ledger()
    for name, parameter in lm.named_parameters():
        ledger.note(name, parameter)
    assert ranks[0].sent() == ledger.summary


def test_a_rank_publishes_as_a_stream_that_waits_for_its_reader() -> None:
    from actors.learner_rank import CHUNKS_AHEAD, LearnerRank

    publish = LearnerRank.__ray_metadata__.modified_class.publish
    assert publish.__ray_num_returns__ == "streaming"
    assert publish.__ray_generator_backpressure_num_objects__ == 2 * CHUNKS_AHEAD


def handle(**methods: Any) -> Any:
    return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})


async def answer(value: Any, after_s: float = 0.0) -> Any:
    await asyncio.sleep(after_s)
    if isinstance(value, Exception):
        raise value
    return value


async def stream(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield answer(item)


@pytest.mark.parametrize("failing", [0, 1])
def test_whichever_rank_fails_is_heard_while_the_others_wait_for_it(failing: int) -> None:
    async def waits() -> AsyncIterator[Any]:
        if failing:
            yield answer(True, 0.01)
            yield "chunk 0"
        yield answer(True, 60)

    async def fails() -> AsyncIterator[Any]:
        await asyncio.sleep(0.02)
        yield answer(ValueError(f"rank {failing} failed"))

    streams = [waits, waits]
    streams[failing] = fails

    async def run() -> str:
        learner = RayLearner([handle(publish=each) for each in streams])
        try:
            async with asyncio.timeout(10):
                async for _ in learner.publish():
                    pass
        except (ValueError, TimeoutError) as error:
            return repr(error)
        return "no error"

    assert asyncio.run(run()) == f"ValueError('rank {failing} failed')"


def test_the_learner_lets_go_of_a_chunk_when_the_next_is_asked_for() -> None:
    import weakref

    class Chunk:
        pass

    async def run() -> Any:
        async def two() -> AsyncIterator[Any]:
            for _ in range(2):
                yield answer(True)
                yield Chunk()

        chunks = RayLearner([handle(publish=two)]).publish()
        first = weakref.ref(await anext(chunks))
        await anext(chunks)
        held = first()
        await chunks.aclose()  # type: ignore[attr-defined]
        return held

    assert asyncio.run(run()) is None


# ------------------------------------------------------------------------------------------ sending


class Engine:
    """Takes weights, each chunk in its own time; fails at a step if told."""

    def __init__(self, log: list[Any], chunk_s: float = 0.0, fails_at: Any = None) -> None:
        self.log, self.chunk_s, self.fails_at, self.calls = log, chunk_s, fails_at, []
        self.start_weight_update = SimpleNamespace(remote=lambda: self._call("start"))
        self.update_weights = SimpleNamespace(remote=lambda chunk: self._call(chunk, chunk_s))
        self.finish_weight_update = SimpleNamespace(
            remote=lambda version: self._call(("finish", version), result=EngineRecord(version))
        )
        self._lock = asyncio.Lock()

    async def _call(self, what: Any, seconds: float = 0.0, result: Any = None) -> Any:
        async with self._lock:
            self.calls.append(what)
            if what == self.fails_at:
                raise ValueError("no room")
            await asyncio.sleep(seconds)
            self.log.append(("taken", what))
        return result


class Learner:
    policy_version = 7

    def __init__(self, log: list[Any], num_chunks: int) -> None:
        self.log, self.num_chunks = log, num_chunks

    async def publish(self) -> AsyncIterator[Any]:
        for number in range(self.num_chunks):
            self.log.append(("asked", number))
            yield number


async def send(learner: Any, *engines: Any) -> list[Any]:
    return await ObjectStoreTransfer(EngineSteps(dict(enumerate(engines)), 10.0), SyncConfig(timeout_s=10.0)).send(
        learner
    )


def test_every_engine_takes_every_chunk_in_order() -> None:
    engines = [Engine([]), Engine([], chunk_s=0.005)]
    assert asyncio.run(send(Learner([], 5), *engines)) == [EngineRecord(7), EngineRecord(7)]
    for engine in engines:
        assert engine.calls == ["start", 0, 1, 2, 3, 4, ("finish", 7)]
        assert [what for _, what in engine.log] == engine.calls, "nothing is broken off"


def test_the_next_chunk_is_asked_for_while_one_is_taken_and_few_are_under_way() -> None:
    log: list[Any] = []
    asyncio.run(send(Learner(log, 6), Engine(log, chunk_s=0.01)))
    assert log.index(("asked", 0)) > log.index(("taken", "start")), "ranks gather only when engines are free"
    for number in range(1, 6):
        place = log.index(("asked", number))
        taken = [what for what in log[:place] if what[0] == "taken" and isinstance(what[1], int)]
        assert number - len(taken) < MAX_CHUNKS_TAKEN
        assert len(taken) < number, "the learner does not wait for the chunk before"


def test_an_engine_that_fails_is_named_and_the_others_end_their_session() -> None:
    bad, good = Engine([], fails_at=1), Engine([])
    with pytest.raises(SyncFailedError, match="no room") as error:
        asyncio.run(send(Learner([], 4), good, bad))
    assert [(f.index, f.doing) for f in error.value.failures] == [(1, "take chunk 2 of the weights")]
    assert good.calls == ["start", 0, 1, 2, 3, ("finish", 7)]
    assert "finish" not in [call[0] for call in bad.calls if isinstance(call, tuple)]


def test_nothing_is_published_when_no_engine_is_left() -> None:
    log: list[Any] = []
    with pytest.raises(SyncFailedError, match="start a weight update"):
        asyncio.run(send(Learner(log, 4), Engine(log, fails_at="start")))
    assert ("asked", 0) not in log


def test_a_learner_that_fails_is_not_taken_for_an_engine() -> None:
    class Broken(Learner):
        async def publish(self) -> AsyncIterator[Any]:
            yield 0
            raise ValueError("the learner's own")

    with pytest.raises(ValueError, match="the learner's own"):
        asyncio.run(send(Broken([], 0), Engine([], chunk_s=0.01)))


# ------------------------------------------------------------------------------------------ by place


def worker(orders: Connection, answers: Connection) -> None:
    """A worker process: sums what it reads, or keeps the mapping and waits."""
    reader = SegmentReader()
    while (chunk := orders.recv()) is not None:
        answers.send([(p.name, p.dtype, p.shape, p.data.tobytes(), p.data.flags.writeable) for p in reader.read(chunk)])


@pytest.fixture
def ask() -> Any:
    context = multiprocessing.get_context("spawn")
    (theirs, orders), (answers, out) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(theirs, out))
    process.start()

    def call(chunk: Any) -> Any:
        orders.send(chunk)
        assert answers.poll(60)
        return answers.recv()

    yield call
    orders.send(None)
    process.join(20)


def chunk_of(*sizes: int) -> list[Any]:
    return [pack_tensor(f"w{i}", torch.randn(size, 2).to(torch.bfloat16)) for i, size in enumerate(sizes)]


def test_another_process_reads_each_chunk_from_the_same_segment(ask: Any) -> None:
    segment = Segment()
    paths = set()
    # A larger chunk makes the segment grow, a smaller one uses it again.
    for sizes in [(3, 5), (1,), (70_000, 1, 0), (), (9,)]:
        tensors = chunk_of(*sizes)
        placed = segment.place(tensors)
        paths.add(placed.path)
        assert all(t.offset % ALIGN_BYTES == 0 for t in placed.tensors)
        assert ask(placed) == [(p.name, "bfloat16", p.shape, p.data.tobytes(), False) for p in tensors]
    assert len(paths) == 1
    segment.close()


def test_what_a_call_carries_is_small_whatever_the_chunk() -> None:
    import pickle

    assert len(pickle.dumps(Segment().place(chunk_of(300_000)))) < 1000


def test_an_actor_that_is_killed_leaves_no_segment_behind() -> None:
    program = """
import os, signal, torch
from actors.weight_transfer.packing import pack_tensor
from actors.weight_transfer.segment import Segment
placed = Segment().place([pack_tensor("w", torch.zeros(2**20))])
print(placed.path, os.path.exists(placed.path), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = set(os.listdir("/dev/shm"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    path, existed = done.stdout.split()
    assert existed == "True"
    assert not os.path.exists(path)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "weights" in name} == set()


def test_a_reader_keeps_its_mapping_from_chunk_to_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[int] = []

    def count(file: int, size: int, **options: Any) -> mmap.mmap:
        mapped.append(size)
        return real(file, size, **options)

    real = mmap.mmap
    segment, reader = Segment(), SegmentReader()
    placed = segment.place(chunk_of(1000))
    monkeypatch.setattr(mmap, "mmap", count)
    for _ in range(3):
        assert reader.read(placed)[0].data.nbytes == 4000
    assert len(mapped) == 1


# ------------------------------------------------------------------------------------------ memory

# Allocates and frees 64 MiB, as a weight update does with each layer; prints how many faults the fourth time took.
_CHURN = """
import resource, torch
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_an_engines_process_keeps_the_memory_that_it_frees() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHURN], env=os.environ | KEEP_MEMORY, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 * 2**20 / resource.getpagesize() / 4
