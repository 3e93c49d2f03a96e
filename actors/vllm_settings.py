"""What vLLM is told when an engine starts: variables of its process, and the engine's arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from actors.weight_transfer.backends import engine_backend
from dphrl.config.schema import Config
from dphrl.learner.policy import dtype_name
from dphrl.learner.repeatable import CUBLAS_WORKSPACE
from dphrl.processors import waiting_variables

# A weight update allocates and frees every layer twice, as it comes and packed for the kernels. By itself glibc takes
# the memory of each large allocation from the system and gives it back, which has every page cleared and mapped anew:
# a fifth of the update's time. This has it keep what it once had. Without its cache of small pieces, because these lie
# at the edges of aligned blocks, and eight such blocks are freed before one of them is whole enough to be used again.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {"mmap_max": 0, "trim_threshold": 2**40, "arena_max": 1, "tcache_count": 0}.items()
    )
}


# Tokens of one of vLLM's steps on a CPU, for each worker: vLLM's own number.
STEP_TOKENS_ON_CPU = 4096


def worker_threads(config: Config) -> int:
    """Computing threads of each of an engine's workers on a CPU, which share those of the engine."""
    return max(1, config.rollout.threads_per_engine // config.rollout.tensor_parallel)


def process_variables(config: Config) -> dict[str, str]:
    """Variables that must be there when the engine's process starts, because libraries read them once."""
    variables = {"OMP_NUM_THREADS": str(worker_threads(config))} | waiting_variables() | KEEP_MEMORY
    # In float32 vLLM's attention on a GPU is Triton's, which by itself multiplies in TF32: a thousand times coarser.
    variables |= {"TRITON_F32_DEFAULT": "ieee"} if config.model.dtype == "float32" else {}
    return variables | (CUBLAS_WORKSPACE if config.deterministic else {})


def set_variables(config: Config, devices: Sequence[str] | None) -> None:
    """Set what vLLM reads when it is imported, here and in its own worker processes, which inherit it.

    devices: the GPUs to use if Ray assigned none. Call it before the first use of CUDA, which reads its variable once.
    """
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    os.environ |= process_variables(config)
    # The engine runs in this process: nothing is serialized, and Ray sees a crash.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # This one would overrule the cache's size in `engine_arguments`.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A process of Ray has threads, so its children must not be forks. vLLM would find that out, and warn.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if config.rollout.tensor_parallel > 1:
        # By itself vLLM gives each worker a NUMA node of its own, and refuses when there are fewer than workers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if config.deterministic and torch.cuda.is_available():
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")


def step_tokens_on_cpu(config: Config, num_sequences: int) -> int:
    """Tokens of one of vLLM's steps: the longest prompt goes into one step, also while all others get their tokens."""
    return max(STEP_TOKENS_ON_CPU * config.rollout.tensor_parallel, config.max_sequence_tokens + num_sequences)


def keep_prompts_whole(llm: Any) -> None:
    """Have an engine on a CPU compute each prompt in one step, or wait for a step that has room for it.

    Where it cuts a prompt of a request with a seed, vLLM turns back the request's generator, and torch's generators on
    a CPU cannot be turned back: the step fails. Set here and not among the arguments, because a model with a recurrent
    state must not start so, and all others would start with a warning.
    """
    llm.llm_engine.engine_core.engine_core.scheduler.scheduler_config.enable_chunked_prefill = False


def engine_arguments(config: Config, model_dir: str, *, shares_devices: bool = False) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`. shares_devices: whether its GPUs are a learner's too."""
    from vllm.config.weight_transfer import WeightTransferConfig

    on_gpu, rollout = torch.cuda.is_available(), config.rollout
    # Probes of a sync go beside what an engine is at.
    num_sequences = rollout.max_concurrent_sequences + config.sync.num_probes
    return {
        "model": model_dir,
        # Prompts come and completions leave as token ids, so vLLM needs no tokenizer, and the one that it would load
        # is not always the model's own.
        "skip_tokenizer_init": True,
        "dtype": dtype_name(config.model.dtype),
        "max_model_len": config.max_sequence_tokens,
        "max_num_seqs": num_sequences,
        "max_num_batched_tokens": None if on_gpu else step_tokens_on_cpu(config, num_sequences),
        # A step must be over when it returns, because weights may change before the next.
        "async_scheduling": False if rollout.max_staleness else None,
        "tensor_parallel_size": rollout.tensor_parallel,
        # In a placement group vLLM would make Ray actors of its workers, which find no bundle there. Processes of this
        # actor use the GPUs that it was given.
        "distributed_executor_backend": "mp" if rollout.tensor_parallel > 1 else "uni",
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # For each worker. A GPU's memory decides by itself.
        "kv_cache_memory_bytes": None if on_gpu else rollout.kv_cache_gib * 2**30 // rollout.tensor_parallel,
        "enforce_eager": not on_gpu if rollout.enforce_eager is None else rollout.enforce_eager,
        "trust_remote_code": config.model.trust_remote_code,
        # Log-probs are those of the distribution that is sampled from, with temperature, not of the raw logits.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=engine_backend(config.sync)),
        # Only with sleep mode does vLLM give memory back to the learner of a shared GPU. A CPU has no such mode.
        "enable_sleep_mode": on_gpu and shares_devices,
        # Its methods become methods of every worker.
        "worker_extension_cls": "actors.weight_transfer.worker.RecordingWorker",
        "disable_log_stats": True,
    }


def start_vllm(config: Config, model_dir: str, *, shares_devices: bool = False) -> Any:
    """A `vllm.LLM` for rollouts, without current weights. Call `set_variables` before. Its arguments are those of
    `engine_arguments`."""
    from vllm import LLM

    from actors.weight_transfer import plugin

    plugin.register()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # vLLM lets nobody change the number later.
        torch.set_num_threads(worker_threads(config))
    llm = LLM(**engine_arguments(config, model_dir, shares_devices=shares_devices))
    if not on_gpu:
        keep_prompts_whole(llm)
    return llm
