"""One vLLM engine in one Ray actor."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch

from actors.weight_transfer.packing import PackedTensor
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed
from dphrl.learner.policy import dtype_name
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
        if devices is not None:
            # This must come before the first use of CUDA, which reads the variable once.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        # vLLM reads these at import. The engine runs in this process: nothing is serialized, and Ray sees a crash.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.rollout.kv_cache_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM
        from vllm.config.weight_transfer import WeightTransferConfig

        from actors.weight_transfer import plugin

        plugin.register()
        on_gpu = torch.cuda.is_available()
        self._config, self._index = config, index
        self._llm = LLM(
            model=model_dir,
            # Prompts come and completions leave as token ids, so vLLM needs no tokenizer, and the one that it would
            # load is not always the model's own.
            skip_tokenizer_init=True,
            dtype=dtype_name(config.model.dtype),
            seed=config.seed + index,
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=config.rollout.max_concurrent_sequences,
            tensor_parallel_size=config.rollout.tensor_parallel,
            gpu_memory_utilization=config.rollout.gpu_memory_utilization,
            enforce_eager=not on_gpu if config.rollout.enforce_eager is None else config.rollout.enforce_eager,
            trust_remote_code=config.model.trust_remote_code,
            # Log-probs are those of the distribution that is sampled from, with temperature, not of the raw logits.
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend="object_store"),
            # Only with sleep mode does vLLM give memory back to the learner of a shared GPU. A CPU has no such mode.
            enable_sleep_mode=on_gpu and devices is not None,
            disable_log_stats=True,
        )
        self._tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        self._decode = decoder(self._tokenizer, config.reward.thinking_marks)
        self._policy_version: int | None = None
        self._request_ids = itertools.count()
        if not on_gpu:
            torch.set_num_threads(config.rollout.threads_per_engine)

    def ready(self) -> str:
        """Returns once the engine is up. The text says where the engine runs, for the log."""
        return f"node {ray.util.get_node_ip_address()}, process {os.getpid()}"

    def sleep(self, level: int) -> None:
        """Give the GPU's memory away. The cache is dropped; the weights go to host memory (level 1) or are dropped too
        (level 2: the engine is then stale). On a CPU vLLM does nothing but remember it."""
        if level == 2:
            self._policy_version = None
        self._llm.sleep(level=level)

    def wake_up(self, tags: list[str]) -> None:
        """Take memory again for "weights", "kv_cache" or both. Weights that were dropped must be sent again."""
        self._llm.wake_up(tags=tags)

    def start_weight_update(self) -> None:
        self._policy_version = None  # stale until finish, so that a failed update leaves no half-new weights serving
        self._llm.collective_rpc("start_weight_update")

    def update_weights(self, tensors: list[PackedTensor]) -> None:
        """Take one chunk of weights, which Ray passes as read-only views of the object store."""
        self._llm.collective_rpc("update_weights", kwargs={"update_info": {"tensors": tensors}})

    def finish_weight_update(self, policy_version: int) -> int:
        """From now on serve as `policy_version`; returns it as the acknowledgement."""
        self._llm.collective_rpc("finish_weight_update")
        # vLLM keeps cached prefixes across updates, but the old weights computed them.
        self._llm.reset_prefix_cache()
        self._policy_version = policy_version
        return policy_version

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        seed: int,
        greedy: bool = False,
        max_tokens: int | None = None,
    ) -> Iterator[list[Completion]]:
        """Yields completions as they finish: each list holds those that one engine step finished.

        With the setting `deterministic`, each request has its own seed, so `seed` decides every completion. Without
        it, `seed` decides them only for the same batch composition and without tensor parallelism, because the workers
        of a parallel engine have their own generators. max_tokens: a limit below rollout.max_tokens, if any. Raises
        RuntimeError when the engine has no current weights.
        """
        if self._policy_version is None:
            raise RuntimeError(f"rollout engine {self._index} has no current weights; refit it before generating")
        # A generator per request costs a kernel launch each, so requests without a seed share this process's default.
        torch.manual_seed(seed + self._index)
        engine = self._llm.llm_engine
        jobs: dict[str, tuple[str, int]] = {}  # (prompt_id, sample_index) by request id
        try:
            for place, prompt in enumerate(prompts):
                for sample_index in range(num_samples):
                    params = self._sampling_params(greedy, derive_seed(seed, place, sample_index), max_tokens)
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
            seed=seed if self._config.deterministic else None,
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
