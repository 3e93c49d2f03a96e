"""What a step says about its speed: tokens and bytes a second, waiting, and the use of its GPUs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from actors import learner_group
from actors.learner_group import RayLearner
from cluster import ray_system
from dphrl.inline import InlineLearner
from dphrl.learner import utilization as utilization_module
from dphrl.learner.lora import add_adapters
from dphrl.learner.policy import PolicyModel
from dphrl.learner.utilization import Compute, compute_of, peak_flops, utilization
from dphrl.tracking.step_metrics import speeds, step_metrics
from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.unit.report_folders import render, write_run
from tests.unit.test_report import points

RECORD = {
    "rollout/num_tokens": 3000.0,
    "learner/num_tokens": 8000.0,
    "sync/num_bytes": 5e9,
    "time/step_s": 10.0,
    "time/rollout_s": 9.0,  # ran beside the last update
    "time/reward_s": 1.0,
    "time/learn_s": 4.0,
    "time/sync_s": 2.0,
}


def test_speeds_are_amounts_over_their_own_times() -> None:
    assert speeds(RECORD) == pytest.approx(
        {
            "rollout/tokens_per_s": 300.0,
            "learner/tokens_per_s": 2000.0,
            "sync/gb_per_s": 2.5,
            "time/waiting_share": 0.4,
        }
    )


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("sync/num_bytes", {"sync/gb_per_s"}),
        ("time/sync_s", {"sync/gb_per_s"}),
        ("learner/num_tokens", {"learner/tokens_per_s"}),
        ("time/learn_s", {"learner/tokens_per_s", "time/waiting_share"}),
    ],
)
def test_a_speed_without_its_parts_is_left_out(missing: str, gone: set[str]) -> None:
    record = {name: value for name, value in RECORD.items() if name != missing}
    assert speeds(RECORD).keys() - speeds(record).keys() == gone


def test_waiting_is_never_negative() -> None:
    assert speeds(RECORD | {"time/step_s": 5.9})["time/waiting_share"] == 0


def test_a_step_s_record_holds_them() -> None:
    record = step_metrics(TrainBatch(0, 0, (), 1.0, {"learner/num_tokens": 60.0}), [], RECORD)
    assert record["learner/tokens_per_s"] == 2000.0, "told later, so it counts"
    assert record["time/waiting_share"] == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------ the GPU's peak


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("", "bfloat16", None),
    ],
)
def test_peaks_are_told_by_the_device_s_words(name: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(name, dtype) == (None if tera is None else tera * 1e12)


def small_model(*, tied: bool) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, head_dim=8, num_key_value_heads=2, tie_word_embeddings=tied, **shape)
    return PolicyModel(LlamaForCausalLM(config), temperature=1.0).lm


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_model(tied: bool) -> None:
    lm = small_model(tied=tied)
    # What multiplies: every matrix and norm, and the head once.
    inner = sum(p.numel() for name, p in lm.named_parameters() if "embed_tokens" not in name and "lm_head" not in name)
    compute = compute_of(lm, "NVIDIA H100 80GB HBM3", "bfloat16", 4)
    assert compute == Compute(6.0 * (inner + 40 * 16), 12.0 * 3 * 4 * 8, 4 * 989.4e12)


def test_frozen_weights_need_no_gradient_of_their_own(make_config: Any) -> None:
    lm, lora = small_model(tied=True), make_config(model={"lora": {"rank": 2}}).model.lora
    whole = sum(p.numel() for p in lm.parameters())
    add_adapters(lm, lora, 0)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    compute = compute_of(lm, "NVIDIA H100 80GB HBM3", "bfloat16", 1)
    assert trained > 0
    assert compute is not None
    assert compute.flops_per_token == 4.0 * whole + 6.0 * trained


def test_weights_that_zero_has_sharded_count_whole() -> None:
    lm = small_model(tied=True)
    whole = compute_of(lm, "NVIDIA A100", "float32", 1)
    for parameter in lm.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert compute_of(lm, "NVIDIA A100", "float32", 1) == whole


@pytest.mark.parametrize("field", utilization_module.EXPERTS)
def test_a_model_with_experts_is_not_counted(field: str) -> None:
    lm = small_model(tied=True)
    setattr(lm.config, field, 8)
    assert compute_of(lm, "NVIDIA A100", "bfloat16", 1) is None


def test_a_model_of_unknown_shape_and_an_unknown_device_are_not_counted() -> None:
    assert compute_of(nn.Linear(2, 2), "NVIDIA A100", "bfloat16", 1) is None
    assert compute_of(small_model(tied=True), "Radeon", "bfloat16", 1) is None


def batch_of(*minibatches: tuple[int, ...]) -> TrainBatch:
    def row(length: int) -> TrainRow:
        return TrainRow(RowKind.POLICY, (0,) * length, 1, (0.0,) * (length - 1), 1.0)

    return TrainBatch(0, 0, tuple(tuple(map(row, lengths)) for lengths in minibatches), 1e-3)


def test_utilization_is_operations_over_what_the_time_allows() -> None:
    compute = Compute(flops_per_token=100.0, flops_per_pair=2.0, peak_flops=1000.0)
    operations = 100 * (3 + 4 + 5) + 2 * (9 + 16 + 25)
    found = utilization(compute, batch_of((3, 4), (5,)), 10.0)
    assert found == {"learner/mfu": pytest.approx(operations / 10_000)}
    assert utilization(None, batch_of((3,)), 10.0) == {}
    assert utilization(compute, batch_of((3,)), 0.0) == {}


def test_ranks_tell_their_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_group.ray, "put", lambda value: value)

    async def update(batch: Any) -> dict[str, float]:
        await asyncio.sleep(0.05)
        return {"learner/grad_norm": 1.0}

    rank: Any = SimpleNamespace(update=SimpleNamespace(remote=update))
    compute = Compute(flops_per_token=1.0, flops_per_pair=0.0, peak_flops=100.0)
    metrics = asyncio.run(RayLearner([rank], compute=compute).update(batch_of((50,))))
    assert 0.01 < metrics["learner/mfu"] <= 50 / (0.05 * 100)
    assert "learner/mfu" not in asyncio.run(RayLearner([rank]).update(batch_of((50,))))


def test_what_rank_0_says_of_its_gpu_comes_to_the_learner(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Compute(1.0, 0.0, 100.0)

    async def run() -> dict[str, Any]:
        return {"dtype": "float32", "compute": compute}

    monkeypatch.setattr(ray_system, "Start", lambda *given: SimpleNamespace(run=run))
    system = object.__new__(ray_system.RaySystem)
    system.config, system.model_dir, system.probes = make_config(tracking={"prometheus": False}), "", ()
    system._ranks, system._workers, system._turns, system._scaler = [], [], None, None
    system._actors = SimpleNamespace(engines={}, start=None)  # type: ignore[assignment]
    parts = asyncio.run(system.start(print))
    assert isinstance(parts.learner, RayLearner)
    assert parts.learner._compute is compute


def test_inline_a_gpu_s_utilization_is_told_and_a_cpu_s_is_not(
    make_config: Any, tiny_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def updated() -> dict[str, float]:
        return asyncio.run(InlineLearner(make_config(), tiny_dir).update(batch_of((5,))))

    if not torch.cuda.is_available():
        assert "learner/mfu" not in updated()
    monkeypatch.setattr("dphrl.inline.device_name", lambda: "NVIDIA H100 PCIe")
    assert updated()["learner/mfu"] > 0


# ------------------------------------------------------------------------------------------ the report


def test_the_report_draws_what_was_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "only")
    assert "Learner waiting" not in render(tmp_path, run).text, "an older run has none"
    records = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    measured = [
        line.removesuffix("}") + f', "time/waiting_share": 0.{i}, "rollout/busy_fraction": 0.5{i}}}'
        for i, line in enumerate(records)
    ]
    (run / "metrics.jsonl").write_text("\n".join(measured) + "\n")
    page = render(tmp_path, run)
    assert points(page.chart("Learner waiting"), "only") == [[1, 0], [2, 0.1], [3, 0.2], [4, 0.3]]
    assert points(page.chart("Engines at work"), "only") == [[1, 0.5], [2, 0.51], [3, 0.52], [4, 0.53]]
