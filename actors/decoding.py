"""The requests of one vLLM engine: which wait, which are decoded, and which version of the weights made each token."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.asks import Answer, Ask
from dphrl.config.schema import Config
from dphrl.data.schedule import completion_seed
from dphrl.types import Completion


@dataclass(slots=True)
class Request:
    """One completion in the making.

    owner: whose it is. spans: (policy_version, number of its tokens) of versions before the present one.
    """

    owner: str
    ask: Ask
    sample_index: int
    max_tokens: int
    urgent: bool
    spans: list[tuple[int, int]] = field(default_factory=list)


class Decoding:
    """`step_thread.Work` over a `vllm.LLM`: takes asks at any time, and lets vLLM have as many as it decodes at once.

    The rest waits here and not in vLLM, so that urgent ones pass it. Every request has a seed of its own, made of the
    ask's, its prompt_id and its sample_index. So a completion is a function of the weights, the prompt and the seed (up
    to rounding, which may decide between two tokens that are next to equal): the other requests, their order, the
    engine and its width have no part in it.

    Weights change between `hold` and `serve`, and nothing is stepped in between. Completions in the making then go on
    with the new weights. vLLM computes the keys and values of their tokens anew, so that each token has the log-prob of
    one version; with rollout.on_update=keep it goes on with those of the old weights.
    """

    def __init__(
        self,
        llm: Any,
        config: Config,
        index: int,
        deliver: Callable[[str, list[Answer]], None],
        fail: Callable[[Exception], None],
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: Sequence[int],
    ) -> None:
        """deliver: called with an owner and what is finished for it. fail: called when a step raises. decode: from
        token ids to text."""
        self._llm, self._rollout, self._index = llm, config.rollout, index
        self._deliver, self._fail, self._decode = deliver, fail, decode
        self._stop_token_ids = list(stop_token_ids)
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}
        self._num_urgent = 0
        self._ids = itertools.count()
        self._held, self._num_serves = True, 0
        self.policy_version: int | None = None

    # ---------------------------------------------------------------------------------- asks

    def submit(self, owner: str, asks: Sequence[Ask], *, urgent: bool = False, max_tokens: int | None = None) -> None:
        """Decode these for `owner`. urgent: before all that wait. max_tokens: a limit below rollout.max_tokens, if any.

        Raises RuntimeError when the engine has no current weights and gets none at the moment.
        """
        if self.policy_version is None:
            raise RuntimeError(f"rollout engine {self._index} has no current weights; refit it before generating")
        limit = min(self._rollout.max_tokens, max_tokens or self._rollout.max_tokens)
        requests = [Request(owner, ask, i, limit, urgent) for ask in asks for i in ask.sample_indices]
        if urgent:
            for request in requests:
                self._start(request)
        else:
            self._waiting += requests

    def abort(self, owner: str, call: int) -> None:
        """Forget what is not finished of one call."""
        self._waiting = deque(r for r in self._waiting if (r.owner, r.ask.call) != (owner, call))
        self._drop([i for i, r in self._running.items() if (r.owner, r.ask.call) == (owner, call)])

    # ---------------------------------------------------------------------------------- steps

    @property
    def ready(self) -> bool:
        return not self._held and bool(self._running or self._waiting)

    def step(self) -> None:
        while self._waiting and len(self._running) - self._num_urgent < self._rollout.max_concurrent_sequences:
            self._start(self._waiting.popleft())
        done = [output for output in self._llm.llm_engine.step() if output.finished]
        finished: dict[str, list[Answer]] = {}
        for output in done:
            request = self._forget(_own_id(output.request_id))
            finished.setdefault(request.owner, []).append((request.ask.call, self._completion(output, request)))
        for owner, answers in finished.items():
            self._deliver(owner, answers)

    def fail(self, error: Exception) -> None:
        """Everybody who waits gets the error, and what was asked is forgotten."""
        self.lose_weights()
        self._fail(error)

    # ---------------------------------------------------------------------------------- weights

    def hold(self) -> None:
        """Step no more until `serve`, because the weights are about to change. What is submitted now waits for them."""
        self._held = True

    def lose_weights(self) -> None:
        """The weights are no version's: forget what was asked, and refuse what is asked, until `serve`."""
        self._held, self.policy_version = True, None
        self._forget_all()

    def serve(self, policy_version: int) -> None:
        """Go on with the weights of this version. Raises RuntimeError when vLLM keeps its prefix cache."""
        before = self.policy_version
        if before is not None and before != policy_version:
            self._note_spans(before)
        keeps = bool(self._running) and self._rollout.on_update == "keep"
        # vLLM keeps cached prefixes across updates, but the old weights computed them. Where requests keep theirs, the
        # salt of their prompts keeps others from them. A version is no salt: a learner that starts again repeats it.
        if not self._llm.reset_prefix_cache(reset_running_requests=not keeps) and not keeps:
            raise RuntimeError(
                f"vLLM kept its prefix cache, which the old weights filled, after the update to version "
                f"{policy_version}: some request still holds blocks of it"
            )
        self._held, self.policy_version = False, policy_version
        self._num_serves += 1

    def _note_spans(self, version: int) -> None:
        if not self._running:
            return
        scheduled = self._llm.llm_engine.engine_core.engine_core.scheduler.requests
        for request_id, request in scheduled.items():
            ours = self._running.get(_own_id(request_id))
            if ours is not None and (num_new := request.num_output_tokens - sum(n for _, n in ours.spans)) > 0:
                ours.spans.append((version, num_new))

    # ---------------------------------------------------------------------------------- vLLM's side

    def _start(self, request: Request) -> None:
        request_id = str(next(self._ids))
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.ask.prompt.token_ids)}
        if self._rollout.on_update == "keep":
            prompt["cache_salt"] = str(self._num_serves)
        self._llm.llm_engine.add_request(request_id, prompt, self._sampling_params(request))
        self._running[request_id] = request
        self._num_urgent += request.urgent

    def _drop(self, ids: list[str]) -> None:
        if ids:
            self._llm.llm_engine.abort_request(ids)
            for request_id in ids:
                self._forget(request_id)

    def _forget_all(self) -> None:
        self._waiting.clear()
        # An engine that just failed may fail here too, and nobody asks it again.
        with contextlib.suppress(Exception):
            self._drop(list(self._running))
        self._running.clear()
        self._num_urgent = 0

    def _forget(self, request_id: str) -> Request:
        request = self._running.pop(request_id)
        self._num_urgent -= request.urgent
        return request

    def _sampling_params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ask = request.ask
        return SamplingParams(
            temperature=0.0 if ask.greedy else self._rollout.temperature,
            max_tokens=request.max_tokens,
            seed=completion_seed(ask.seed, ask.prompt.prompt_id, request.sample_index),
            logprobs=0,
            # vLLM itself adds those of the model's generation configuration; without a tokenizer it knows no other.
            stop_token_ids=self._stop_token_ids,
            # The text is decoded once at the end, not after every token.
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, request: Request) -> Completion:
        assert self.policy_version is not None
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"rollout engine {self._index}: a request ended by {sampled.finish_reason!r}")
        token_ids = tuple(sampled.token_ids)
        last = len(token_ids) - sum(num_tokens for _, num_tokens in request.spans)
        spans = (*request.spans, (self.policy_version, last))
        return Completion(
            request.ask.prompt.prompt_id,
            request.sample_index,
            token_ids,
            self._decode(token_ids),
            tuple(step[token].logprob for step, token in zip(sampled.logprobs, token_ids, strict=True)),
            sampled.finish_reason,
            spans[0][0],
            spans if len(spans) > 1 else (),
        )


def _own_id(request_id: str) -> str:
    # vLLM may add a suffix to make ids unique.
    return request_id.split("-")[0]
