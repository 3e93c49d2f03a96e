"""`dphrl plan`: simulated clusters, memory by hand-made sums, time from speeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.planning.describe import describe_plan, parse_cluster
from cluster.planning.memory import (
    GIB,
    cached_sequences,
    colocation_obstacle,
    engine_memory,
    host_memory,
    learner_memory,
    while_decoding,
)
from cluster.planning.placement import Node, plan_placement
from cluster.planning.shapes import KNOWN_SHAPES, ModelShape, model_shape, shape_of
from cluster.planning.storage import disk_need, disk_warning
from cluster.planning.timing import Speed, given_speed, measured_speed, step_time
from dphrl.config.loading import InputError, config_to_yaml, load_config

PAPER = "paper/sql-dph-js"


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


# ------------------------------------------------------------ simulated clusters


def test_a_cluster_is_read_from_its_text() -> None:
    cluster = parse_cluster(["nodes=2,gpus=8,cpus=96,gpu_gib=141", "nodes=1,cpus=64"])
    assert [(node.num_gpus, node.num_cpus) for node in cluster.nodes] == [(8, 96), (8, 96), (0, 64)]
    assert len({node.name for node in cluster.nodes}) == 3
    assert cluster.gpu_gib == 80  # the smallest decides


@pytest.mark.parametrize("text", ["nodes=x", "gpu=8", "nodes=0", "nodes=1.5", "gpus=-1", "", "nodes=1,gpu_gib=0"])
def test_a_cluster_that_makes_no_sense_is_one_line(text: str) -> None:
    result = plan(PAPER, "--simulate", text)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"dphrl: error: --simulate {text}:")
    assert len(result.stderr.splitlines()) == 1


def test_a_plan_on_a_cluster_one_does_not_have() -> None:
    shown = plan(PAPER, "--simulate", "nodes=8,gpus=8", "--tokens-per-s", "2500,4000").output
    lines = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert lines["node-0"][1:4] == ["4", "4", "16"]  # ranks, engines, reward workers
    assert "8 of 8" in shown
    assert "7 nodes, node-1 ... node-7" in shown
    assert "weights 3.7" in shown  # 8.03e9 x 2 bytes over 4 ranks under ZeRO-3
    # 2048 completions of 4096 tokens on four engines of 2500 tokens a second
    assert "839 s at 2500 tokens/s an engine" in shown


def test_thousands_of_gpus_take_no_time() -> None:
    many = ["learner.num_ranks=512", "rollout.num_engines=256", "rollout.tensor_parallel=2", "reward.num_workers=500"]
    shown = plan(PAPER, *many, "--simulate", "nodes=128,gpus=8")
    assert shown.exit_code == 0
    assert "64 nodes" in shown.output


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    result = plan(PAPER, "learner.num_ranks=8", "rollout.tensor_parallel=2", "--simulate", "nodes=3,gpus=4")
    assert result.exit_code == 2
    expected = "needs 8 learner x 1 + 4 rollout x 2 = 16 GPUs; the cluster has 12 on 3 nodes"
    assert result.stderr == f"dphrl: error: --simulate: this run {expected}\n"


def test_this_machine_when_nothing_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config("demo-math", ["cluster.num_cpus=2"])
    assert "1.75 of 2" in describe_plan(config)
    config = load_config("demo-math", ["cluster.num_cpus=1"])
    assert "does not fit this machine: needs 1 learner x 0.75" in describe_plan(config)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "decided by the nodes of the cluster" in describe_plan(config)


def test_a_suite_has_no_single_plan_to_simulate() -> None:
    result = plan("passk-math", "--simulate", "nodes=1,gpus=8")
    assert result.exit_code == 2
    assert "is a suite" in result.stderr


# ------------------------------------------------------------ memory

SHAPE = ModelShape(1e9, 10, hidden_size=1000, num_kv_heads=2, head_size=50, num_heads=20, intermediate_size=3000)
LLAMA_8B = KNOWN_SHAPES["meta-llama/Llama-3.1-8B-Instruct"]


def of_learner(make_config: Any, dtype: str = "bfloat16", **learner: Any) -> dict[str, float]:
    config = make_config(learner={"micro_batch_tokens": 1000, **learner})
    return dict(learner_memory(config, SHAPE, dtype).parts)


def test_learner_memory_by_zero_stage(make_config: Any) -> None:
    one = of_learner(make_config, num_ranks=1)
    # 2 bytes a weight, 4 a gradient, two moments and a float32 copy of 4 each.
    assert (one["weights"], one["gradients"], one["optimizer"]) == (2e9, 4e9, 12e9)
    assert one["activations"] == 1000 * 1000 * 10 * 16 * 2
    first, second, third = (of_learner(make_config, num_ranks=4, zero_stage=stage) for stage in (1, 2, 3))
    assert (first["weights"], first["gradients"], first["optimizer"]) == (2e9, 4e9, 3e9)
    assert (second["weights"], second["gradients"], second["optimizer"]) == (2e9, 1e9, 3e9)
    assert (third["weights"], third["gradients"], third["optimizer"]) == (0.5e9, 1e9, 3e9)


def test_float32_needs_no_second_copy_and_checkpointing_few_activations(make_config: Any) -> None:
    assert of_learner(make_config, "float32")["optimizer"] == 8e9
    kept = of_learner(make_config)["activations"]
    assert of_learner(make_config, gradient_checkpointing=True)["activations"] < kept / 5


def test_a_resident_reference_model_is_counted(make_config: Any) -> None:
    config = make_config(algorithm={"divergence": "reverse_kl", "estimator": "rollout", "eta": 0.1})
    assert learner_memory(config, SHAPE, "bfloat16").parts["reference model"] == 2e9
    assert "reference model" not in of_learner(make_config)


def test_engine_memory_and_its_cache(make_config: Any) -> None:
    config = make_config(rollout={"tensor_parallel": 2, "gpu_memory_utilization": 0.5})
    parts = engine_memory(config, SHAPE, "bfloat16", 10e9).parts
    assert parts == {"weights": 1e9, "KV cache": 4e9}
    # keys and values: 2 x 10 layers x 2 heads x 50, 2 bytes each, for every token; the cache lies on two GPUs
    per_sequence = 2 * 10 * 2 * 50 * 2 * config.max_sequence_tokens
    assert cached_sequences(config, SHAPE, "bfloat16", 4e9) == int(8e9 // per_sequence)


def test_what_is_too_large_is_said() -> None:
    shown = plan(PAPER, "learner.zero_stage=1", "--simulate", "nodes=1,gpus=8,gpu_gib=24").output
    assert "TOO LARGE: more ranks" in shown
    shown = plan(PAPER, "--simulate", "nodes=1,gpus=8,gpu_gib=16").output
    assert "TOO LARGE: raise rollout.tensor_parallel" in shown
    assert "TOO LARGE" not in plan(PAPER, "--simulate", "nodes=1,gpus=8").output


def test_colocated_engine_and_rank_are_added_up() -> None:
    settings = ["cluster.colocate=true", "learner.num_ranks=8", "rollout.num_engines=8"]
    shown = plan(PAPER, *settings, "--simulate", "nodes=1,gpus=8")
    (line,) = [line for line in shown.output.splitlines() if line.startswith("both, colocated")]
    assert "TOO LARGE" in line
    shown = plan(PAPER, *settings, "rollout.gpu_memory_utilization=0.4", "--simulate", "nodes=1,gpus=8")
    (line,) = [line for line in shown.output.splitlines() if line.startswith("both, colocated")]
    assert "TOO LARGE" not in line


def test_shapes_from_a_models_own_configuration(tiny_dir: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_dir)
    shape = model_shape(tiny_dir)
    assert shape is not None
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)
    known = KNOWN_SHAPES["tiny-factor"]
    assert (shape.num_layers, shape.hidden_size) == (known.num_layers, known.hidden_size)
    assert known.num_parameters == pytest.approx(shape.num_parameters, rel=0.05)


def test_the_count_of_a_published_model() -> None:
    llama = SimpleNamespace(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape_of(llama).num_parameters == pytest.approx(8.03e9, rel=0.001)


def test_a_model_that_is_not_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = plan(PAPER, "model.path=someone/unknown-7b", "--simulate", "nodes=1,gpus=8")
    assert shown.exit_code == 0
    assert "memory      unknown: the configuration of someone/unknown-7b is not on this machine" in shown.output


# ------------------------------------------------------------ time


def test_step_time_adds_up_or_overlaps(make_config: Any) -> None:
    sizes = {"num_prompts": 10, "num_samples": 4, "num_engines": 2}
    speed = Speed(engine_tokens_per_s=50, rank_tokens_per_s=100, completion_tokens=20, prompt_tokens=5, sync_s=0.5)
    config = make_config(rollout=sizes, algorithm={"divergence": "none"}, learner={"num_ranks": 2})
    time = step_time(config, speed)
    assert (time.rollout_s, time.learn_s) == (40 * 20 / 100, 40 * 25 / 200)
    assert time.step_s == time.rollout_s + time.learn_s + 0.5
    overlapped = step_time(make_config(rollout={**sizes, "max_staleness": 1}, algorithm={"divergence": "none"}), speed)
    assert overlapped.step_s == max(overlapped.rollout_s, overlapped.learn_s) + 0.5


def test_speed_of_a_run_is_read_from_its_metrics(make_config: Any, tmp_path: Path) -> None:
    config = make_config(rollout={"num_engines": 2}, learner={"num_ranks": 2})
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    step = {
        "rollout/num_tokens": 400.0, "rollout/completion_tokens_mean": 20.0, "learner/num_tokens": 30 * 24.0,
        "divergence/num_rows": 10.0, "time/rollout_s": 2.0, "time/learn_s": 3.0, "time/sync_s": 0.5,
    }  # fmt: skip
    slow = {**step, "time/rollout_s": 1000.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (slow, step, step, step)))
    speed = measured_speed(tmp_path)
    assert speed == Speed(
        engine_tokens_per_s=100, rank_tokens_per_s=120, completion_tokens=20, prompt_tokens=4, sync_s=0.5
    )


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_a_folder_without_steps_is_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = plan("demo-math", "--measured", str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"dphrl: error: --measured {tmp_path}: ")


@pytest.mark.parametrize("text", ["5", "a,b", "0,5", "5,-1", "nan,1"])
def test_speeds_that_make_no_sense(make_config: Any, text: str) -> None:
    with pytest.raises(InputError, match="give two positive numbers"):
        given_speed(make_config(), text)


def test_gib_is_what_the_table_divides_by() -> None:
    assert GIB == 2**30
