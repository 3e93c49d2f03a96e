"""One vLLM engine in one Ray actor."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from actors.asks import Answer, Ask
from actors.decoding import Decoding
from actors.engine_errors import engine_start
from actors.engine_processes import end_with_any_worker, keep_temporary_files_together, scratch_of_engines
from actors.leftovers import remembering_shared_memory
from actors.outbox import Outbox
from actors.step_thread import StepThread
from actors.vllm_settings import set_variables, start_vllm
from actors.watched import WATCH, Watched
from actors.weight_transfer.failures import Place
from actors.weight_transfer.ledger import EngineRecord
from actors.weight_transfer.packing import PackedTensor
from actors.weight_transfer.segment import Segment
from dphrl.config.schema import Config
from dphrl.own_code import lead, pin
from dphrl.rewards.thinking import decoder
from dphrl.scratch import scratch_folder
from dphrl.tokenizer import load_tokenizer
from dphrl.tracking.log import install_json_log
from dphrl.types import Completion, Prompt

T = TypeVar("T")


@ray.remote(concurrency_groups=WATCH)
class RolloutEngine(Watched):
    """Samples completions from vLLM and takes weight updates through vLLM's weight-transfer protocol.

    Lifecycle: a new or restarted actor is stale, that is, it has no current weights and refuses work.
    `start_weight_update`, any number of `update_weights` and `finish_weight_update(version)` make it serve. It takes
    work and weights while it decodes: everything of vLLM runs in one thread, between two of its steps.
    """

    _in_update = False

    def __init__(self, config: Config, model_dir: str, index: int, devices: Sequence[str] | None = None) -> None:
        """devices: the GPUs of the node to use if Ray assigned none, because they belong to a colocated learner."""
        pin()
        # vLLM's own processes load our plugin by its name.
        lead()
        install_json_log(f"rollout-{index}")
        set_variables(config, devices)
        keep_temporary_files_together(config.folder)
        self._config, self._index = config, index
        self._outboxes: dict[str, Outbox[Answer]] = {}
        self._probe_numbers = itertools.count()
        self._events: asyncio.AbstractEventLoop | None = None
        # Worker processes read weights in shared memory; this process is a sole worker itself.
        self._segment = Segment() if config.rollout.tensor_parallel > 1 else None
        self._thread = StepThread(f"rollout-{index}")
        with remembering_shared_memory(config.folder), engine_start(index):
            self._thread.open(lambda: self._open(model_dir, devices is not None))
        end_with_any_worker(self._fail)

    def _open(self, model_dir: str, shares_devices: bool) -> Decoding:
        config = self._config
        self._llm = start_vllm(config, model_dir, shares_devices=shares_devices)
        self._llm.collective_rpc("watch_weight_updates")
        self._tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        decode = decoder(self._tokenizer, config.reward.thinking_marks)
        ends = [end] if (end := self._tokenizer.eos_token_id) is not None else []
        self._decoding = Decoding(self._llm, config, self._index, self._deliver, self._fail, decode, ends)
        return self._decoding

    async def ready(self) -> Place:
        """Returns once the engine is up."""
        return Place(ray.util.get_node_ip_address(), os.getpid())

    # ---------------------------------------------------------------------------------- work

    async def submit(self, owner: str, asks: Sequence[Ask]) -> None:
        """Decode what is asked; `finished` gives it to the same owner, a pool.

        Raises RuntimeError when the engine has no current weights.
        """
        self._outbox(owner)
        await self._thread.do(lambda: self._decoding.submit(owner, asks))

    async def finished(self, owner: str, num_seen: int) -> list[Answer]:
        """What is finished for the owner, but for the first `num_seen`, which it has; as soon as there is something.

        Raises what vLLM raised when it failed.
        """
        return await self._outbox(owner).after(num_seen)

    async def abort(self, owner: str, call: int) -> None:
        """Forget what the owner asked for one of its calls."""
        await self._thread.do(lambda: self._decoding.abort(owner, call))

    async def probe(self, prompts: Sequence[Prompt], seed: int, max_tokens: int) -> list[Completion]:
        """A completion of each prompt, before all that waits. Raises what `submit` and `finished` raise."""
        owner = f"probe {next(self._probe_numbers)}"
        asks = [Ask(0, prompt, (0,), seed) for prompt in prompts]
        outbox = self._outbox(owner)
        try:
            await self._thread.do(lambda: self._decoding.submit(owner, asks, urgent=True, max_tokens=max_tokens))
            answers: list[Answer] = []
            while len(answers) < len(prompts):
                answers += await outbox.after(len(answers))
        finally:
            del self._outboxes[owner]
        return [completion for _, completion in answers]

    def _outbox(self, owner: str) -> Outbox[Answer]:
        self._events = asyncio.get_running_loop()
        return self._outboxes.setdefault(owner, Outbox())

    def _deliver(self, owner: str, answers: list[Answer]) -> None:
        self._soon(lambda: self._outboxes[owner].put(answers) if owner in self._outboxes else None)

    def _fail(self, error: Exception) -> None:
        def tell() -> None:
            for outbox in self._outboxes.values():
                outbox.fail(error)

        if self._events is not None:  # else nobody has asked for anything yet
            self._soon(tell)

    def _soon(self, call: Callable[[], Any]) -> None:
        assert self._events is not None, "nothing is finished before it was asked for"
        self._events.call_soon_threadsafe(call)

    async def remove_temporary_files(self) -> None:
        """For the end of the run: Ray may end this process without a chance to do it then."""
        shutil.rmtree(scratch_folder(scratch_of_engines(self._config.folder)), ignore_errors=True)

    # ---------------------------------------------------------------------------------- devices

    async def sleep(self, level: int) -> None:
        """Give the GPU's memory away. The cache is dropped; the weights go to host memory (level 1) or are dropped too
        (level 2: the engine is then stale). On a CPU vLLM does nothing but remember it."""

        def sleep() -> None:
            if level == 2:
                self._decoding.lose_weights()
            self._llm.sleep(level=level)

        await self._thread.do(sleep)

    async def wake_up(self, tags: list[str]) -> None:
        """Take memory again for "weights", "kv_cache" or both. Weights that were dropped must be sent again."""
        await self._thread.do(lambda: self._llm.wake_up(tags=tags))

    # ---------------------------------------------------------------------------------- weights

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Meet the learner in a new group, as vLLM's trainer side asks; a group of before is left."""

        def meet() -> None:
            self._end_broken_update()
            self._llm.collective_rpc("shutdown_weight_transfer_engine")
            self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

        await self._with_weights_at_stake(meet)

    async def start_weight_update(self) -> None:
        """Decode no more until `finish_weight_update`."""

        def start() -> None:
            self._decoding.hold()
            self._end_broken_update()
            self._llm.collective_rpc("start_weight_update")
            self._in_update = True

        await self._with_weights_at_stake(start)

    async def update_weights(self, tensors: list[PackedTensor]) -> None:
        """Take one chunk of weights, which Ray passes as read-only views of the object store."""

        def update() -> None:
            self._receive({"tensors": tensors} if self._segment is None else {"placed": self._segment.place(tensors)})

        await self._with_weights_at_stake(update)

    async def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take weights from vLLM's trainer side, which sends them beside this call. update_info: the backend's own."""
        await self._with_weights_at_stake(lambda: self._receive(update_info))

    async def finish_weight_update(self, policy_version: int) -> EngineRecord:
        """From now on serve as `policy_version`; the record acknowledges it.

        Raises RuntimeError, and stays stale, when vLLM keeps its prefix cache.
        """

        def finish() -> EngineRecord:
            self._llm.collective_rpc("finish_weight_update")
            self._in_update = False
            self._decoding.serve(policy_version)
            return EngineRecord.of(policy_version, self._llm.collective_rpc("weight_update_record"))

        return await self._with_weights_at_stake(finish)

    async def _with_weights_at_stake(self, call: Callable[[], T]) -> T:
        """The result of `call` in the engine's thread. A failed update leaves no half-new weights serving."""

        def staked() -> T:
            try:
                return call()
            except BaseException:
                self._in_update = False  # vLLM has ended it too
                self._decoding.lose_weights()
                raise

        return await self._thread.do(staked)

    def _end_broken_update(self) -> None:
        """End an update in whose midst the learner was lost: vLLM begins no other before. Some layers then hold a part
        of its weights, and the next update brings those of all."""
        if self._in_update:
            self._llm.collective_rpc("finish_weight_update")
            self._in_update = False

    def _receive(self, update_info: dict[str, Any]) -> None:
        self._llm.collective_rpc("update_weights", kwargs={"update_info": update_info})
