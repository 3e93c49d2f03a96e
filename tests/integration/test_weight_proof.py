"""Weights that are one update old, in real engines: each way to have them is found at the first sync.

The update is one step of AdamW at a learning rate of 1e-6, the paper's: in bfloat16 it moves one weight in a hundred.
Run with -s, the tests print what log-probs alone would have told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dphrl.protocols import LastUpdate
from tests.integration.test_rollout import LocalLearner

pytestmark = pytest.mark.integration

LR = 1e-6
# dtype and tensor-parallel width of an engine.
KINDS = [("float32", 1), ("bfloat16", 1), pytest.param(("float32", 2), marks=pytest.mark.long)]
LAYER = "model.layers.1."


class Updated(LocalLearner):
    """A learner with float32 masters, whose update is one real step."""

    def __init__(self, tiny_dir: str, config: Any) -> None:
        from dphrl.learner.loading import load_policy

        super().__init__(load_policy(tiny_dir, config.model, temperature=config.rollout.temperature), config, 0)
        self.masters = {name: p.detach().float().clone() for name, p in self.policy.lm.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=LR)

    def update(self, prompts: list[Any]) -> float:
        """Returns the share of weights that it changed, as engines hold them."""
        lm, num_changed = self.policy.lm, 0
        rows = torch.tensor([(prompt.token_ids * 9)[:40] for prompt in prompts])
        lm.zero_grad()
        lm(rows, labels=rows).loss.backward()
        norm = 0.0
        for name, parameter in lm.named_parameters():
            self.masters[name].grad = parameter.grad.float()
            norm += float(parameter.grad.float().square().sum())
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                before = parameter.clone()
                parameter.copy_(self.masters[name])
                num_changed += int((parameter != before).sum())
        self.policy_version += 1
        self.last_update = LastUpdate(norm**0.5, LR)
        return num_changed / sum(master.numel() for master in self.masters.values())


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def synced(ray_cluster: None, make_config: Any, tiny_dir: str, prompts: list[Any], request: Any) -> Iterator[Any]:
    """An engine, its learner, and what brings the learner's weights to it."""
    import ray

    from actors.rollout_engine import RolloutEngine
    from actors.rollout_pool import RayRolloutPool

    dtype, width = request.param
    config = make_config(model={"dtype": dtype}, rollout={"tensor_parallel": width})
    actor = RolloutEngine.options(num_cpus=0.5).remote(config, tiny_dir, 0)
    ray.get(actor.ready.remote(), timeout=180)
    pool = RayRolloutPool([actor], config, prompts[:8], dtype)
    learner = Updated(tiny_dir, config)

    def on_workers(method: Callable[[Any], Any]) -> list[Any]:
        return ray.get(actor.__ray_call__.remote(lambda engine: engine._llm.collective_rpc(method)))

    def refit() -> dict[str, float]:
        return dict(asyncio.run(pool.refit(learner)))

    yield SimpleNamespace(kind=request.param, pool=pool, learner=learner, refit=refit, on_workers=on_workers)
    ray.kill(actor)


def losing(part: str) -> Callable[[Any], None]:
    """Has a worker's backend lose every weight whose name contains `part`."""

    def lose(worker: Any) -> None:
        engine = worker.weight_transfer_engine
        load = engine.model.load_weights
        engine.model.load_weights = lambda weights: load(pair for pair in weights if part not in pair[0])

    return lose


def leaving_the_head(worker: Any) -> None:
    """Has the head keep its packed copy. On CPUs where vLLM packs nothing of this type, that is a copy all the same."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    engine = worker.weight_transfer_engine
    head = engine.model.lm_head
    old = SimpleNamespace(weight=head.weight.clone())
    dispatch_cpu_unquantized_gemm(old, remove_weight=False)
    engine._repack_tied_head = lambda: setattr(
        head, "cpu_linear", lambda x, _, bias: old.cpu_linear(x, old.weight, bias)
    )


def mended(worker: Any) -> None:
    """The worker as it was before."""
    engine = worker.weight_transfer_engine
    engine.__dict__.pop("_repack_tied_head", None)
    engine.model.load_weights = worker._weight_watch._load_noting


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "old weights": (losing(""), r"misses new values of model\.\S+, .* and \d+ more, .*received 0 tensors of 0 bytes"),
    "one old layer": (losing(LAYER), r"misses new values of model\.layers\.1\.\S+, .*received \d+ tensors of"),
    "one old key projection": (
        losing(LAYER + "self_attn.k_proj"),
        r"misses new values of .*model\.layers\.1\.self_attn\.qkv_proj\.weight, in whole or in part",
    ),
    "an old tied head": (leaving_the_head, r"engine 0 holds the new lm_head\.weight but multiplies by an older copy"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_one_update_old_are_found_at_the_first_sync(synced: Any, prompts: list[Any], fault: str) -> None:
    dtype, width = synced.kind
    if not synced.learner.policy_version:
        # All is well, several times, so that the test shows what healthy noise is.
        for _ in range(3):
            print(f"\n{dtype} x {width}, healthy: {synced.refit()}")
    before = synced.refit()
    share = synced.learner.update(prompts[:4])
    assert share > 1e-4, "the update is to be seen by engines"
    break_worker, expected = FAULTS[fault]
    synced.on_workers(break_worker)
    try:
        with pytest.raises(RuntimeError, match=expected):
            synced.refit()
        (gap,) = asyncio.run(synced.pool._proof._gaps(synced.learner, attempt=0))
        print(f"\n{dtype} x {width}, {share:.2%} of weights changed, {fault}: {gap}; before: {before}")
    finally:
        synced.on_workers(mended)
    after = synced.refit()
    assert after["sync/logprob_gap_mean"] <= synced.pool._proof.max_mean_gap


def test_a_sync_that_brings_nothing_new_after_an_update_stops_the_run(synced: Any) -> None:
    learner = synced.learner
    synced.refit()
    learner.policy_version, learner.last_update = learner.policy_version + 1, LastUpdate(0.5, LR)
    with pytest.raises(RuntimeError, match=r"changed no weight, although its gradient norm was 0\.5"):
        synced.refit()
