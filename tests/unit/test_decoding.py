"""The requests of one engine, with a stand-in for vLLM's engine that makes a token of each request in a step."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from actors.asks import Answer, Ask
from actors.decoding import Decoding
from actors.outbox import Outbox
from actors.step_thread import StepThread
from dphrl.data.schedule import completion_seed
from dphrl.types import Prompt


class FakeLLM:
    """`length` tokens for each request; the token is the number of weights that it was made with."""

    def __init__(self, length: int = 4) -> None:
        self.length, self.weights = length, 0
        self.requests: dict[str, Any] = {}
        self.added: list[Any] = []
        self.resets: list[bool] = []
        self.most = 0
        self.llm_engine = self
        scheduler = SimpleNamespace(requests=self.requests)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        request = SimpleNamespace(prompt=prompt, params=params, tokens=[], num_output_tokens=0)
        self.requests[f"{request_id}-suffix"] = request
        self.added.append(request)

    def abort_request(self, ids: list[str]) -> None:
        for request_id in ids:
            del self.requests[f"{request_id}-suffix"]

    def step(self) -> list[Any]:
        self.most = max(self.most, len(self.requests))
        outputs = []
        for request_id, request in list(self.requests.items()):
            request.tokens.append(self.weights)
            request.num_output_tokens += 1
            finished = request.num_output_tokens >= min(self.length, request.params.max_tokens)
            logprobs = [{token: SimpleNamespace(logprob=-0.5)} for token in request.tokens]
            sample = SimpleNamespace(token_ids=request.tokens, logprobs=logprobs, finish_reason="stop")
            outputs.append(SimpleNamespace(request_id=request_id, finished=finished, outputs=[sample]))
            if finished:
                del self.requests[request_id]
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.resets.append(reset_running_requests)
        return True


def ask_of(call: int, name: str, num: int = 2, greedy: bool = False) -> Ask:
    return Ask(call, Prompt(name, "text", (1, 2, 3), "", "d"), tuple(range(num)), 7, greedy)


class Run:
    """A `Decoding` at version 1, and what it delivered."""

    def __init__(self, make_config: Any, **rollout: Any) -> None:
        self.llm, self.delivered, self.errors = FakeLLM(), [], []
        config = make_config(rollout={"max_concurrent_sequences": 4, "max_tokens": 8, **rollout})
        self.decoding = Decoding(self.llm, config, 3, self.deliver, self.errors.append, str, [9])
        self.decoding.serve(1)

    def deliver(self, owner: str, answers: list[Answer]) -> None:
        self.delivered += [(owner, call, completion) for call, completion in answers]

    def to_the_end(self) -> list[Any]:
        while self.decoding.ready:
            self.decoding.step()
        return self.delivered


def test_every_completion_is_its_owners_with_a_seed_of_its_own(make_config: Any) -> None:
    run = Run(make_config)
    run.decoding.submit("one", [ask_of(0, "a"), ask_of(0, "b", greedy=True)])
    run.decoding.submit("two", [ask_of(5, "a", num=3)])
    found = sorted((owner, call, c.prompt_id, c.sample_index) for owner, call, c in run.to_the_end())
    assert found == [
        *[("one", 0, name, i) for name in "ab" for i in range(2)],
        *[("two", 5, "a", i) for i in range(3)],
    ]
    assert all(c.token_ids == (0,) * 4 and c.policy_version == 1 and not c.version_spans for *_, c in run.delivered)
    for request, (name, i) in zip(run.llm.added, [("a", 0), ("a", 1), ("b", 0), ("b", 1)], strict=False):
        assert request.params.seed == completion_seed(7, name, i)
        assert request.params.temperature == (0.0 if name == "b" else 1.0)
        assert request.params.max_tokens == 8
        assert request.params.stop_token_ids == [9]
        assert request.prompt == {"prompt_token_ids": [1, 2, 3]}


def test_vllm_has_no_more_than_it_decodes_at_once_and_urgent_ones_pass(make_config: Any) -> None:
    run = Run(make_config)
    run.decoding.submit("pool", [ask_of(0, name) for name in "abcdef"])
    run.decoding.step()
    assert len(run.llm.requests) == 4
    run.decoding.submit("probe", [ask_of(0, "probe")], urgent=True, max_tokens=2)
    run.decoding.step()
    run.decoding.step()
    assert [owner for owner, *_ in run.delivered] == ["probe"] * 2
    assert [len(c.token_ids) for *_, c in run.delivered] == [2, 2]
    assert len(run.to_the_end()) == 2 + 12
    assert run.llm.most == 6, "four and two urgent ones"


def test_what_is_aborted_is_gone_and_nothing_else(make_config: Any) -> None:
    run = Run(make_config)
    run.decoding.submit("pool", [ask_of(0, "a"), ask_of(1, "b"), ask_of(0, "c")])
    run.decoding.submit("other", [ask_of(0, "a")])
    run.decoding.step()
    run.decoding.abort("pool", 0)
    assert sorted((owner, call, c.prompt_id) for owner, call, c in run.to_the_end()) == [
        *[("other", 0, "a")] * 2,
        *[("pool", 1, "b")] * 2,
    ]


@pytest.mark.parametrize("on_update", ["recompute", "keep"])
def test_each_token_is_of_the_version_that_made_it(make_config: Any, on_update: str) -> None:
    run = Run(make_config, on_update=on_update)
    run.decoding.submit("pool", [ask_of(0, "a", 1)])
    run.decoding.step()
    run.decoding.submit("pool", [ask_of(0, "b", 1)])
    for version in (2, 3):
        run.decoding.hold()
        assert not run.decoding.ready
        run.decoding.submit("pool", [ask_of(0, f"while {version} comes", 1)])
        run.llm.weights = version
        run.decoding.serve(version)
        run.decoding.step()
    by_prompt = {c.prompt_id: c for *_, c in run.to_the_end()}
    # The stand-in's first weights are number 0, of version 1.
    assert by_prompt["a"].token_ids == (0, 2, 3, 3)
    assert by_prompt["a"].version_spans == ((1, 1), (2, 1), (3, 2))
    assert by_prompt["a"].policy_version == 1
    assert by_prompt["b"].token_ids == (2, 3, 3, 3)
    assert (by_prompt["b"].version_spans, by_prompt["b"].policy_version) == (((2, 1), (3, 3)), 2)
    assert (by_prompt["while 3 comes"].version_spans, by_prompt["while 3 comes"].policy_version) == ((), 3)
    # The first of version 1 found no request; the others find some, and keep their cache or not.
    assert run.llm.resets == [True, on_update == "recompute", on_update == "recompute"]
    salts = [request.prompt.get("cache_salt") for request in run.llm.added]
    assert salts == (["1", "2", "2", "3"] if on_update == "keep" else [None] * 4)


def test_weights_of_the_same_version_again_find_no_prefix_of_those_before(make_config: Any) -> None:
    run = Run(make_config, on_update="keep")
    for version in (2, 1, 2):  # as when the learner goes on from a checkpoint
        run.decoding.serve(version)
        run.decoding.submit("pool", [ask_of(0, "a", 1)])
        run.decoding.step()
    assert len({request.prompt["cache_salt"] for request in run.llm.added}) == 3


def test_the_same_version_again_makes_no_span(make_config: Any) -> None:
    run = Run(make_config)
    run.decoding.submit("pool", [ask_of(0, "a", 1)])
    run.decoding.step()
    run.decoding.hold()
    run.decoding.serve(1)
    ((*_, completion),) = run.to_the_end()
    assert (completion.policy_version, completion.version_spans) == (1, ())


def test_a_stale_engine_refuses_work_and_forgets_what_it_had(make_config: Any) -> None:
    run = Run(make_config)
    run.decoding.submit("pool", [ask_of(0, name) for name in "abc"])
    run.decoding.step()
    run.decoding.lose_weights()
    assert not run.decoding.ready
    assert run.llm.requests == {}
    with pytest.raises(RuntimeError, match="rollout engine 3 has no current weights; refit it before generating"):
        run.decoding.submit("pool", [ask_of(0, "d")])
    run.decoding.serve(2)
    assert not run.decoding.ready
    run.decoding.submit("pool", [ask_of(0, "d", 1)])
    ((*_, completion),) = run.to_the_end()
    assert completion.policy_version == 2


# ------------------------------------------------------------------------------------- the thread


def test_calls_run_between_steps_in_one_thread() -> None:
    seen: list[tuple[str, int]] = []

    class Work:
        ready = False
        num_steps = 0

        def step(self) -> None:
            seen.append(("step", threading.get_ident()))
            self.num_steps += 1
            self.ready = self.num_steps < 3

        def fail(self, error: Exception) -> None:
            raise AssertionError from error

    def call() -> int:
        seen.append(("call", threading.get_ident()))
        work.ready = True
        return 5

    work = Work()

    async def run() -> None:
        thread = StepThread("test")
        thread.open(lambda: work)
        assert await thread.do(call) == 5
        while work.num_steps < 3:
            await asyncio.sleep(0.001)
        with pytest.raises(ZeroDivisionError):
            await thread.do(lambda: 1 // 0)
        assert await thread.do(lambda: 6) == 6, "an error of a call is the caller's alone"

    asyncio.run(run())
    assert [what for what, _ in seen] == ["call", "step", "step", "step"]
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_a_step_that_fails_is_told_once_and_the_thread_lives(make_config: Any) -> None:
    run = Run(make_config)

    async def steps() -> None:
        thread = StepThread("test")
        thread.open(lambda: run.decoding)

        def breaks() -> list[Any]:
            raise RuntimeError("CUDA error")

        run.llm.step = breaks  # type: ignore[method-assign]
        await thread.do(lambda: run.decoding.submit("pool", [ask_of(0, "a")]))
        while not run.errors:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="no current weights"):
            await thread.do(lambda: run.decoding.submit("pool", [ask_of(0, "a")]))

    asyncio.run(steps())
    assert [str(error) for error in run.errors] == ["CUDA error"]


def test_an_engine_that_does_not_open_says_why() -> None:
    def fails() -> Any:
        raise RuntimeError("no such model")

    with pytest.raises(RuntimeError, match="no such model"):
        StepThread("test").open(fails)


# ------------------------------------------------------------------------------------- the outbox


def test_an_answer_that_was_lost_is_given_again_and_none_twice() -> None:
    async def run() -> None:
        box: Outbox[int] = Outbox()
        box.put([1, 2])
        assert await box.after(0) == [1, 2]
        assert await box.after(0) == [1, 2], "the first answer did not arrive"
        box.put([3])
        assert await box.after(2) == [3]
        waiting = asyncio.create_task(box.after(3))
        await asyncio.sleep(0)
        assert not waiting.done()
        box.put([4])
        assert await waiting == [4]
        box.fail(RuntimeError("it died"))
        assert await box.after(3) == [4], "what is finished is finished"
        for _ in range(2):
            with pytest.raises(RuntimeError, match="it died"):
                await box.after(4)

    asyncio.run(run())
