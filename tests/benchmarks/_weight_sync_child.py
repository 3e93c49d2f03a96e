"""One side of `weight_sync`: real engines, and a real model in a learner rank without ranks or optimizer.

Run by path in a process of its own, with a checkout first on PYTHONPATH. It answers each line of standard input, one
JSON object, by one. It must run with older revisions too, so it uses only what those have.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch

NUM_PROBES = 8


def make_config(model: str, width: int) -> Any:
    from dphrl.config.schema import Config

    data = {"name": "factor", "kind": "tiny", "limit": 8}
    rollout = {"max_tokens": 64, "kv_cache_gib": 1, "max_concurrent_sequences": 8, "tensor_parallel": width}
    rollout["threads_per_engine"] = width  # one for each worker
    return Config.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": data, "max_prompt_tokens": 64},
            "reward": {"name": "factorization"},
            "rollout": rollout,
            "learner": {"micro_batch_tokens": 1024},
        }
    )


def learner_class() -> Any:
    from actors.learner_rank import LearnerRank
    from actors.weight_transfer.source import LearnerWeights

    try:
        from dphrl.learner.loading import load_policy
    except ImportError:  # the older side
        from dphrl.learner.policy import load_policy
    from dphrl.learner.update import UpdateSettings

    class Learner(LearnerRank.__ray_metadata__.modified_class):  # type: ignore[misc]
        def __init__(self, config: Any, model: str) -> None:
            torch.set_num_threads(1)
            policy = load_policy(model, config.model, temperature=1.0)
            for parameter in policy.lm.parameters():
                parameter.data = parameter.data.clone()  # those of a trained model are no map of a file
            self._config, self._rank, self._num_ranks = config, 0, 1
            self._published, self._sent, self._policy = [], None, policy
            self._weights = LearnerWeights(policy, 1)
            self._engine = SimpleNamespace(forward=policy, device=torch.device("cpu"))
            self._settings = UpdateSettings.from_config(config)

        def change(self) -> int:
            """Another model each time; returns its bytes."""
            with torch.no_grad():
                for parameter in self._policy.lm.parameters():
                    parameter.flatten()[0] += 1e-4
            return sum(parameter.nbytes for parameter in self._policy.lm.parameters())

        def copy_seconds(self) -> float:
            """Of one memcpy of as many bytes, by one thread, with warm pages."""
            if not hasattr(self, "_buffers"):
                size = sum(parameter.nbytes for parameter in self._policy.lm.parameters())
                self._buffers = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
            began = time.perf_counter()
            self._buffers[0].copy_(self._buffers[1])
            return time.perf_counter() - began

    return ray.remote(Learner)


def count_vllm(engine: Any) -> str:
    """In an engine's actor: sum up the seconds in vLLM. Returns where the actor's code comes from."""
    import actors

    call, engine.vllm_s = engine._llm.collective_rpc, 0.0

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            engine.vllm_s += time.perf_counter() - began

    engine._llm.collective_rpc = timed
    return str(actors.__file__)


def used(actor: Any) -> tuple[float, float]:
    """CPU seconds of the actor and its children, and those in vLLM, so far."""
    me = psutil.Process()
    times = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
    return sum(t.user + t.system for t in times), getattr(actor, "vllm_s", 0.0)


class Side:
    def __init__(self, model: str, widths: list[int]) -> None:
        from actors.learner_group import RayLearner
        from actors.rollout_engine import RolloutEngine
        from actors.vllm_settings import process_variables
        from dphrl.types import Prompt

        self.probes = [Prompt(f"p{i}", "", tuple(range(5 + i, 45 + i)), "", "d") for i in range(NUM_PROBES)]
        self.configs = [make_config(model, width) for width in widths]
        self.rank = learner_class().options(num_cpus=0).remote(self.configs[0], model)
        self.learner = RayLearner([self.rank], "float32")
        self.engines = [
            RolloutEngine.options(num_cpus=0, runtime_env={"env_vars": process_variables(config)}).remote(
                config, model, i
            )
            for i, config in enumerate(self.configs)
        ]
        ray.get([engine.ready.remote() for engine in self.engines], timeout=300)
        self.sources = ray.get([engine.__ray_call__.remote(count_vllm) for engine in self.engines])

    async def sync(self, engines: list[int], prove: bool) -> dict[str, Any]:
        from actors.rollout_pool import RayRolloutPool

        chosen = [self.engines[i] for i in engines]
        pool = RayRolloutPool(chosen, self.configs[engines[0]], self.probes, "float32")
        self.learner._policy_version += 1
        num_bytes = await self.rank.change.remote()
        everyone = [self.rank, *chosen]
        before = await asyncio.gather(*[actor.__ray_call__.remote(used) for actor in everyone])
        began = time.perf_counter()
        await (pool.refit(self.learner) if prove else pool._transfer.send(self.learner))
        seconds = time.perf_counter() - began
        after = await asyncio.gather(*[actor.__ray_call__.remote(used) for actor in everyone])
        spent = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before, strict=True)]
        return {
            "num_bytes": num_bytes,
            "seconds": seconds,
            "learner_cpu_s": spent[0][0],
            "engines_cpu_s": sum(cpu for cpu, _ in spent[1:]),
            "vllm_s": max(vllm for _, vllm in spent[1:]),
        }

    async def copy(self) -> dict[str, Any]:
        return {"seconds": await self.rank.copy_seconds.remote(), "num_bytes": await self.rank.change.remote()}


async def serve(side: Side) -> None:
    for line in sys.stdin:
        order = json.loads(line)
        answer = await (side.sync(**order) if order else side.copy())
        print("answer " + json.dumps(answer), flush=True)


def main() -> None:
    import actors

    checkout, model, widths, chunk_bytes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    ray.init(address="local", num_cpus=8, object_store_memory=2**31, include_dashboard=False, log_to_driver=False)
    try:
        side = Side(model, widths)
        if chunk_bytes:
            ray.get(side.rank.__ray_call__.remote(set_chunk, chunk_bytes))
        for source in (actors.__file__, *side.sources):
            assert source.startswith(checkout), source
        print("answer {}", flush=True)
        asyncio.run(serve(side))
    finally:
        ray.shutdown()


def set_chunk(_: Any, chunk_bytes: int) -> None:
    from actors.weight_transfer import packing

    packing.CHUNK_BYTES = chunk_bytes


if __name__ == "__main__":
    main()
