"""One vLLM engine in one Ray actor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from actors.engine_errors import engine_start
from actors.vllm_settings import engine_arguments, set_variables, worker_threads
from actors.weight_transfer.ledger import EngineRecord
from actors.weight_transfer.packing import PackedTensor
from actors.weight_transfer.segment import Segment
from dphrl.config.schema import Config
from dphrl.data.schedule import completion_seed
from dphrl.own_code import lead, pin
from dphrl.rewards.thinking import decoder
from dphrl.tokenizer import load_tokenizer
from dphrl.tracking.log import install_json_log
from dphrl.types import Completion, Prompt


@ray.remote
class RolloutEngine:
    """Samples completions from vLLM and takes weight updates through vLLM's weight-transfer protocol.

    Lifecycle: a new or restarted actor is stale, that is, it has no current weights and refuses to generate.
    `start_weight_update`, any number of `update_weights` and `finish_weight_update(version)` make it serve. Calls run
    one at a time, so an update waits for a running `generate`, and no completion mixes two versions.
    """

    def __init__(self, config: Config, model_dir: str, index: int, devices: Sequence[str] | None = None) -> None:
        """devices: the GPUs of the node to use if Ray assigned none, because they belong to a colocated learner."""
        pin()
        # vLLM's own processes load our plugin by its name.
        lead()
        install_json_log(f"rollout-{index}")
        set_variables(config, devices)
        self._config, self._index = config, index
        with engine_start(index):
            from vllm import LLM

            from actors.weight_transfer import plugin

            plugin.register()
            if not torch.cuda.is_available():
                # vLLM lets nobody change the number later.
                torch.set_num_threads(worker_threads(config))
            self._llm = LLM(**engine_arguments(config, model_dir))
            self._llm.collective_rpc("watch_weight_updates")
        self._tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        self._decode = decoder(self._tokenizer, config.reward.thinking_marks)
        self._policy_version: int | None = None
        # Worker processes read weights in shared memory; this process is a sole worker itself.
        self._segment = Segment() if config.rollout.tensor_parallel > 1 else None
        self._request_ids = itertools.count()

    def ready(self) -> str:
        """Returns once the engine is up. The text says where the engine runs, for the log."""
        return f"node {ray.util.get_node_ip_address()}, process {os.getpid()}"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Meet the learner in a new group, as vLLM's trainer side asks; a group of before is left."""
        self._policy_version = None
        self._llm.collective_rpc("shutdown_weight_transfer_engine")
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._policy_version = None  # stale until finish, so that a failed update leaves no half-new weights serving
        self._llm.collective_rpc("start_weight_update")

    def update_weights(self, tensors: list[PackedTensor]) -> None:
        """Take one chunk of weights, which Ray passes as read-only views of the object store."""
        self._receive({"tensors": tensors} if self._segment is None else {"placed": self._segment.place(tensors)})

    def receive_weights(self, update_info: dict[str, Any]) -> None:
        """Take weights from vLLM's trainer side, which sends them beside this call. update_info: the backend's own."""
        self._receive(update_info)

    def _receive(self, update_info: dict[str, Any]) -> None:
        self._llm.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, policy_version: int) -> EngineRecord:
        """From now on serve as `policy_version`; the record acknowledges it.

        Raises RuntimeError, and stays stale, when vLLM keeps its prefix cache.
        """
        self._llm.collective_rpc("finish_weight_update")
        # vLLM keeps cached prefixes across updates, but the old weights computed them.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                f"vLLM kept its prefix cache, which the old weights filled, after the update to version "
                f"{policy_version}: some request still holds blocks of it"
            )
        self._policy_version = policy_version
        return EngineRecord.of(policy_version, self._llm.collective_rpc("weight_update_record"))

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        seed: int,
        greedy: bool = False,
        max_tokens: int | None = None,
    ) -> Iterator[list[Completion]]:
        """Yields completions as they finish: each list holds those that one engine step finished.

        Every request has a seed of its own, made of `seed`, its prompt_id and its sample_index. So a completion is a
        function of the weights, the prompt and `seed` (up to rounding, which may decide between two tokens that are
        next to equal): the other requests, their order, the engine and its width have no part in it. max_tokens: a
        limit below rollout.max_tokens, if any. Raises RuntimeError when the engine has no current weights.
        """
        if self._policy_version is None:
            raise RuntimeError(f"rollout engine {self._index} has no current weights; refit it before generating")
        engine = self._llm.llm_engine
        jobs: dict[str, tuple[str, int]] = {}  # (prompt_id, sample_index) by request id
        try:
            for prompt in prompts:
                for sample_index in range(num_samples):
                    own = completion_seed(seed, prompt.prompt_id, sample_index)
                    params = self._sampling_params(greedy, own, max_tokens)
                    request_id = str(next(self._request_ids))
                    engine.add_request(request_id, {"prompt_token_ids": list(prompt.token_ids)}, params)
                    jobs[request_id] = (prompt.prompt_id, sample_index)
            while engine.has_unfinished_requests():
                done = [output for output in engine.step() if output.finished]
                if done:
                    yield [self._completion(output, *jobs.pop(_base_id(output.request_id))) for output in done]
        finally:
            # After a failure, or when the consumer stops, the next call must not decode the requests of this one.
            if jobs:
                engine.abort_request(list(jobs))

    def _sampling_params(self, greedy: bool, seed: int, max_tokens: int | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        rollout = self._config.rollout
        return SamplingParams(
            temperature=0.0 if greedy else rollout.temperature,
            max_tokens=min(rollout.max_tokens, max_tokens or rollout.max_tokens),
            seed=seed,
            logprobs=0,
            # vLLM itself adds those of the model's generation configuration; without a tokenizer it knows no other.
            stop_token_ids=[end] if (end := self._tokenizer.eos_token_id) is not None else [],
            # The text is decoded once at the end, not after every token.
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any, prompt_id: str, sample_index: int) -> Completion:
        assert self._policy_version is not None
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"rollout engine {self._index}: a request ended by {sampled.finish_reason!r}")
        token_ids = tuple(sampled.token_ids)
        return Completion(
            prompt_id,
            sample_index,
            token_ids,
            self._decode(token_ids),
            tuple(step[token].logprob for step, token in zip(sampled.logprobs, token_ids, strict=True)),
            sampled.finish_reason,
            self._policy_version,
        )


def _base_id(request_id: str) -> str:
    # vLLM may add a suffix to make ids unique.
    return request_id.split("-")[0]
