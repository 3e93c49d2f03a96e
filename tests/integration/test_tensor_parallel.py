"""Real vLLM engines of one and of two workers, in a placement group as in a run: what they sample, and how they end.

A completion is a function of the weights, its prompt and its seed. In float32, with a model as small as this one, two
ways to compute the same differ by some 1e-6 nats. That decides a token only where two are as close as that, about once
in a million tokens, so identical ids are asked for here. With larger models or bfloat16 they could not be.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from tests.integration.test_rollout import LocalLearner, generate, perturbed_policy

pytestmark = pytest.mark.integration

SHARED_MEMORY = Path("/dev/shm")
WIDTHS = {"first": 1, "second": 1, "wide": 2}
Sampled = Mapping[tuple[str, int], tuple[int, ...]]


def start_engine(config: Any, model_dir: str, index: int, **options: Any) -> Any:
    from actors import rollout_engine
    from actors.vllm_settings import process_variables

    options |= {"num_cpus": 0.25, "runtime_env": {"env_vars": process_variables(config)}}
    engine_class: Any = rollout_engine.RolloutEngine
    return engine_class.options(**options).remote(config, model_dir, index)


def of_width(make_config: Any, width: int, **changes: Any) -> Any:
    return make_config(rollout={"tensor_parallel": width}, **changes)


@pytest.fixture(scope="module")
def engines(ray_cluster: None, make_config: Any, tiny_dir: str) -> Iterator[dict[str, Any]]:
    """The engines of WIDTHS, in one placement group."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 0.25}] * len(WIDTHS))
    assert group.wait(30)
    actors = {}
    for i, (name, width) in enumerate(WIDTHS.items()):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        actors[name] = start_engine(of_width(make_config, width), tiny_dir, i, scheduling_strategy=place)
    ray.get([actor.ready.remote() for actor in actors.values()], timeout=600)
    yield actors
    remove_placement_group(group)


@pytest.fixture(scope="module")
def policy(engines: dict[str, Any], make_config: Any, tiny_dir: str, prompts: list[Any]) -> Any:
    """What all engines hold: other weights than those that they were started with."""
    from actors.rollout_pool import RayRolloutPool

    config = make_config()
    policy = perturbed_policy(tiny_dir, config, 0.01)
    pool = RayRolloutPool([*engines.values()], config, prompts[:8])
    gap = asyncio.run(pool.refit(LocalLearner(policy, config, 1)))["sync/logprob_gap_max"]  # type: ignore[arg-type]
    assert gap <= 1e-4
    return policy


def sample(actors: Sequence[Any], config: Any, prompts: list[Any], seed: int, num_samples: int = 8) -> Sampled:
    from actors.rollout_pool import RayRolloutPool

    completions = generate(RayRolloutPool(actors, config), prompts, num_samples, seed=seed)
    return {(c.prompt_id, c.sample_index): c.token_ids for c in completions}


def test_both_widths_are_greedy_as_transformers_is(
    engines: dict[str, Any], policy: Any, make_config: Any, prompts: list[Any]
) -> None:
    from actors.rollout_pool import RayRolloutPool

    config = make_config()
    for name in ("first", "wide"):
        pool = RayRolloutPool([engines[name]], config)
        found = {c.prompt_id: c.token_ids for c in generate(pool, prompts, 1, seed=0, greedy=True)}
        for prompt in prompts:
            output = policy.lm.generate(
                torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=config.rollout.max_tokens
            )
            assert found[prompt.prompt_id] == tuple(output[0, len(prompt.token_ids) :].tolist()), name


def test_the_same_prompt_and_seed_give_the_same_tokens_everywhere(
    engines: dict[str, Any], policy: Any, make_config: Any, prompts: list[Any], tmp_path: Path
) -> None:
    config = make_config(reference={"num_samples": 8, "threshold": 1, "prompts_per_chunk": 7})
    narrow, wide = of_width(make_config, 1), of_width(make_config, 2)
    small = make_config(reference={"num_samples": 8, "threshold": 1, "prompts_per_chunk": 5})
    both = [engines["first"], engines["second"]]
    expected = sample([engines["first"]], narrow, prompts, 11)
    ways = {
        "the same engine again": sample([engines["first"]], narrow, prompts, 11),
        "another engine": sample([engines["second"]], narrow, prompts, 11),
        "two engines": sample(both, narrow, prompts, 11),
        "another order": sample([engines["first"]], narrow, prompts[::-1], 11),
        "in three parts": {k: v for i in range(3) for k, v in sample(both, narrow, prompts[i::3], 11).items()},
        "half as many samples": sample(both, narrow, prompts, 11, num_samples=4),
        "an engine of two workers": sample([engines["wide"]], wide, prompts, 11),
    }
    stage = reference_responses(engines["first"], config, prompts, tmp_path / "whole")
    with pytest.raises(KilledError):
        reference_responses(engines["first"], config, prompts, tmp_path / "killed", chunks=1)
    stages = {
        "a stage that was killed and continues": reference_responses(
            engines["second"], config, prompts, tmp_path / "killed"
        ),
        "a stage in other chunks": reference_responses(engines["first"], small, prompts, tmp_path / "small"),
        "a stage of an engine of two workers": reference_responses(engines["wide"], config, prompts, tmp_path / "wide"),
    }
    table = {way: sum(found[key] == expected[key] for key in found) / len(found) for way, found in ways.items()}
    table |= {way: float(found == stage) for way, found in stages.items()}
    print("\n".join(f"{way:40} {share:.3f} of the completions" for way, share in table.items()))
    assert table == dict.fromkeys(table, 1.0)
    assert len(expected) == 8 * len(prompts)
    assert any(stage.values()), "the comparison is of something"
    assert len({*expected.values()}) > len(prompts), "samples of a prompt differ"
    assert sample([engines["first"]], narrow, prompts, 12) != expected


class KilledError(Exception):
    """The stage ends here, as if its process had been killed."""


def reference_responses(
    engine: Any, config: Any, prompts: list[Any], folder: Path, chunks: int | None = None
) -> dict[str, list[tuple[int, ...]]]:
    """The stored responses by prompt of a reference stage in `folder`; it dies after `chunks` of them."""
    from actors.rollout_pool import RayRolloutPool
    from dphrl.inline import InlineRewards
    from dphrl.reference.stage import fill_reference

    class Pool(RayRolloutPool):
        num_chunks = 0

        async def generate(self, *args: Any, **options: Any) -> Any:
            self.num_chunks += 1
            if chunks is not None and self.num_chunks > chunks:
                # Chunks are asked for together; it dies when so many are on disk.
                while len([*folder.with_name(folder.name + ".graded").glob("chunk_*.parquet")]) < chunks:
                    await asyncio.sleep(0.01)
                raise KilledError
            async for completions in super().generate(*args, **options):
                yield completions

    async def score(sequences: Any) -> list[Any]:
        return [(0.0,) * (len(ids) - num_prompt) for ids, num_prompt in sequences]

    async def run() -> Any:
        rewards, learner = InlineRewards(config), SimpleNamespace(score=score)
        try:
            return await fill_reference(config, prompts, Pool([engine], config), rewards, learner, {}, folder)  # type: ignore[arg-type]
        finally:
            rewards.grader.close()

    found: dict[str, list[tuple[int, ...]]] = {}
    try:
        buffer = asyncio.run(run())
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    for stored in buffer.samples:
        found.setdefault(stored.prompt_id, []).append(stored.token_ids)
    return found


def test_a_worker_that_cannot_start_is_told_with_engine_node_and_reason(
    engines: dict[str, Any], make_config: Any, tiny_dir: str, tmp_path: Path
) -> None:
    import ray

    before = {*SHARED_MEMORY.iterdir()}
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    actor = start_engine(of_width(make_config, 2), str(model), 7)
    with pytest.raises(ray.exceptions.ActorDiedError) as caught:
        ray.get(actor.ready.remote(), timeout=600)  # pytest has the limit
    line = str(caught.value).strip().splitlines()[-1]
    node = ray.util.get_node_ip_address()
    assert f"EngineStartError: rollout engine 7 on node {node} did not start: SafetensorError: " in line
    assert {*SHARED_MEMORY.iterdir()} <= before


def test_a_killed_engine_leaves_no_process_and_no_shared_memory(engines: dict[str, Any], policy: Any) -> None:
    import ray

    here = psutil.Process(ray.get(engines["wide"].ready.remote()).process)
    children = here.children(recursive=True)
    assert sum("Worker_TP" in child.name() or "Worker_TP" in " ".join(child.cmdline()) for child in children) == 2
    mapped = [line.split()[-1] for line in Path(f"/proc/{here.pid}/maps").read_text().splitlines() if "/psm_" in line]
    assert not mapped or not any(Path(path).exists() for path in mapped)
    ray.kill(engines["wide"])
    _, left = psutil.wait_procs([here, *children], timeout=20)
    left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"still there after {time.monotonic():.0f} s"
