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
    assert (cluster.nodes[0].accelerator, cluster.nodes[0].host_gib, cluster.disk_gib) == (None, None, None)
    cluster = parse_cluster(
        ["gpus=8,accelerator=H100,host_gib=1024,disk_gib=500", "gpus=8,accelerator=L4,disk_gib=300"]
    )
    assert [(node.accelerator, node.host_gib) for node in cluster.nodes] == [("H100", 1024), ("L4", None)]
    assert cluster.disk_gib == 300  # the smallest counts


@pytest.mark.parametrize(
    "text",
    [
        "nodes=x",
        "gpu=8",
        "nodes=0",
        "nodes=1.5",
        "gpus=-1",
        "",
        "nodes=1,gpu_gib=0",
        "accelerator=",
        "host_gib=0",
        "disk_gib=-1",
    ],
)
def test_a_cluster_that_makes_no_sense_is_one_line(text: str) -> None:
    result = plan(PAPER, "--simulate", text)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"dphrl: error: --simulate {text}:")
    assert len(result.stderr.splitlines()) == 1


def test_a_plan_on_a_cluster_one_does_not_have() -> None:
    shown = plan(PAPER, "--simulate", "nodes=8,gpus=8", "--tokens-per-s", "2500,4000").output
    placed = next(line for line in shown.splitlines() if line.startswith("node-0"))
    assert placed.split()[1:4] == ["4", "4", "16"]  # ranks, engines, reward workers
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


def test_too_few_gpus_of_a_type_are_refused_with_the_arithmetic() -> None:
    mixed = ["--simulate", "nodes=2,gpus=2,accelerator=H100", "--simulate", "nodes=1,gpus=8,accelerator=L4"]
    result = plan(PAPER, "learner.accelerator=H100", "learner.num_ranks=8", *mixed)
    assert result.exit_code == 2
    expected = "needs 8 learner x 1 = 8 GPUs of type H100; the cluster has 4 (2 nodes x 2), and 8 of type L4"
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


def test_shared_prompts_need_a_mask_of_pairs(make_config: Any) -> None:
    def mask(**changes: Any) -> float:
        sections = {"rollout": {"num_samples": 8, "max_tokens": 50}, "data": {"max_prompt_tokens": 100}}
        learner = {"micro_batch_tokens": 1000, **changes.pop("learner", {})}
        config = make_config(**sections, **changes, learner=learner)
        return learner_memory(config, SHAPE, "bfloat16").parts["mask"]

    assert mask() == 1000 * (100 + 8 * 50) * 3
    assert mask(learner={"micro_batch_tokens": 300}) == 300 * 300 * 3, "no sequence is longer than a micro-batch"
    assert mask(learner={"share_prefix": "never"}) == 0
    assert mask(model={"attention": "flex_attention"}) == mask(model={"attention": "eager"}) == 0


def test_float32_has_masters_too_and_checkpointing_few_activations(make_config: Any) -> None:
    assert of_learner(make_config, "float32")["optimizer"] == 12e9
    kept = of_learner(make_config)["activations"]
    assert of_learner(make_config, gradient_checkpointing=True)["activations"] < kept / 5


def test_a_resident_reference_model_is_counted(make_config: Any) -> None:
    resident = {"algorithm": {"divergence": "reverse_kl", "estimator": "rollout", "eta": 0.1}}
    assert learner_memory(make_config(**resident), SHAPE, "bfloat16").parts["reference model"] == 2e9
    sharded = make_config(**resident, learner={"num_ranks": 4, "zero_stage": 3})
    assert learner_memory(sharded, SHAPE, "bfloat16").parts["reference model"] == 0.5e9
    assert "reference model" not in of_learner(make_config)
    # Without its adapters the policy is its own reference.
    adapters = make_config(**resident, model={"lora": {"rank": 8}})
    assert "reference model" not in learner_memory(adapters, SHAPE, "bfloat16").parts


def test_an_offloaded_optimizer_is_in_host_memory_not_on_the_gpu(make_config: Any) -> None:
    kept, moved = (of_learner(make_config, num_ranks=4, offload=offload) for offload in ("none", "optimizer"))
    assert (kept["optimizer"], moved["optimizer"]) == (3e9, 0)
    assert kept["weights"] == moved["weights"]
    assert kept["gradients"] == moved["gradients"]


def test_adapters_are_all_that_has_gradients_and_an_optimizer(make_config: Any) -> None:
    config = make_config(model={"lora": {"rank": 16}}, learner={"num_ranks": 4, "zero_stage": 3})
    parts = learner_memory(config, LLAMA_8B, "bfloat16").parts
    # For rank 16 on every linear layer of this model, peft counts 41,943,040 parameters.
    trained = 41_943_040
    assert LLAMA_8B.num_trained(config.model.lora) == trained
    assert parts["weights"] == 8.03e9 * 2 / 4
    assert (parts["gradients"], parts["optimizer"]) == (trained * 4 / 4, trained * 12 / 4)
    named = make_config(model={"lora": {"rank": 16, "target": ["q_proj", "v_proj"]}})
    assert LLAMA_8B.num_trained(named.model.lora) == 32 * 16 * (4096 + 4096 + 4096 + 1024)


# (what, settings, the state of one checkpoint and its model in 10^9 bytes, how many there are at once)
DISKS: list[tuple[str, dict[str, Any], float, float, int]] = [
    ("as in the paper's preset", {"zero_stage": 3}, 96.36, 16.06, 3),
    ("the same at every ZeRO stage", {"zero_stage": 2}, 96.36, 16.06, 3),
    ("one at the end", {"every_steps": 0, "every_minutes": 0}, 96.36, 16.06, 1),
    ("nobody knows how many by the clock", {"every_steps": 0}, 96.36, 16.06, 3),
    ("two in the whole run", {"every_steps": 60, "every_minutes": 0}, 96.36, 16.06, 2),
    ("five kept", {"keep": 5}, 96.36, 16.06, 6),
    ("the best of those evaluated, too", {"evaluated": 10}, 96.36, 16.06, 4),
    ("adapters and whole exports", {"lora": {"rank": 16}}, 0.503, 16.06, 3),
    ("offloading writes the same", {"offload": "optimizer"}, 96.36, 16.06, 3),
]


@pytest.mark.parametrize(("what", "changes", "state", "export", "number"), DISKS, ids=[case[0] for case in DISKS])
def test_disk_of_an_8b_run(
    make_config: Any, what: str, changes: dict[str, Any], state: float, export: float, number: int
) -> None:
    changes = {"every_steps": 10, "every_minutes": 30, "keep": 2, "lora": None, "evaluated": 0, **changes}
    config = make_config(
        checkpoint={name: changes.pop(name) for name in ("every_steps", "every_minutes", "keep")},
        evaluation={"every_steps": changes.pop("evaluated")},
        model={"lora": changes.pop("lora")},
        learner={"num_steps": 100, **changes},
        reference={"max_bytes": 1000},
    )
    need = disk_need(config, LLAMA_8B, "bfloat16")
    assert (need.checkpoint, need.export) == pytest.approx((state * 1e9, export * 1e9), rel=1e-3)
    assert (need.number, need.buffer) == (number, 1000)
    assert need.total == number * (need.checkpoint + need.export) + 1000


def test_the_disk_of_the_paper_is_420_gib(make_config: Any) -> None:
    shown = plan(PAPER, "--simulate", "nodes=1,gpus=8,disk_gib=400").output
    (line,) = [line for line in shown.splitlines() if "checkpoints x" in line]
    assert "4 checkpoints x (89.7 state + 15.0 model)" in line
    assert "422.8 of 400 free" in line  # with 4 GiB for the buffer
    assert "TOO LARGE: a lower checkpoint.keep" in line
    roomy = plan(PAPER, "--simulate", "nodes=1,gpus=8,disk_gib=425").output
    assert "TOO LARGE" not in roomy


def test_a_run_is_warned_of_a_disk_that_its_checkpoints_would_fill(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(run_dir=str(tmp_path / "not" / "there" / "yet"), checkpoint={"every_minutes": 0})
    need = disk_need(config, LLAMA_8B, "bfloat16")
    checkpoints = int(need.total - need.buffer)
    for free, warned in ((checkpoints, False), (checkpoints - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        warning = disk_warning(config, LLAMA_8B, "bfloat16")
        assert (warning is not None) == warned
    assert warning is not None
    assert "1 checkpoint of 104.7 GiB = 104.7 GiB" in warning
    assert disk_warning(config, None, "bfloat16") is None


# (what, settings, bytes in 10^9 while loading, while training) on one node of eight GPUs with four ranks and four
# engines of an 8B model, 16.06 in bfloat16.
HOSTS: list[tuple[str, dict[str, Any], dict[str, float], dict[str, float]]] = [
    ("nothing put away", {}, {"learner ranks": 16.06, "engines": 20.0}, {}),
    (
        "whole copies below ZeRO-3, weights by way of the object store",
        {"learner": {"zero_stage": 2}, "sync": {"backend": "object_store"}},
        {"learner ranks": 64.24, "engines": 20.0},
        {"object store": 16.06},
    ),
    (
        "offloaded optimizer: 12 bytes a parameter over four ranks that are all here",
        {"learner": {"offload": "optimizer"}},
        {"learner ranks": 16.06, "engines": 20.0},
        {"offloaded optimizer": 96.36},
    ),
    (
        "shared GPUs: gradients and optimizer there by turns, the engines' weights while a checkpoint is written",
        {"cluster": {"colocate": True}},
        {"learner ranks": 16.06, "engines": 20.0},
        {"learner's state": 128.48, "sleeping engines": 64.24},
    ),
    (
        "shared GPUs, adapters",
        {"cluster": {"colocate": True}, "model": {"lora": {"rank": 16}}},
        {"learner ranks": 16.06, "engines": 20.0},
        {"learner's state": 0.671, "sleeping engines": 64.24},
    ),
]


@pytest.mark.parametrize(("what", "changes", "loading", "training"), HOSTS, ids=[case[0] for case in HOSTS])
def test_host_memory_of_a_node_with_an_8b_run(
    make_config: Any, what: str, changes: dict[str, Any], loading: dict[str, float], training: dict[str, float]
) -> None:
    learner = {"num_ranks": 4, "zero_stage": 3, **changes.get("learner", {})}
    config = make_config(**{**changes, "learner": learner}, rollout={"num_engines": 4})
    placed = plan_placement(config, [Node("n0", 96, 8)])
    needs = host_memory(config, LLAMA_8B, "bfloat16", placed)
    for phase, expected in (("while loading", loading), ("while training", training)):
        # A checkpoint's copy: 12 bytes for each of 8.03 billion parameters, or of the adapters', and the model.
        copied = {"checkpoint": 16.56 if "model" in changes else 112.42} if phase == "while training" else {}
        assert needs[phase].parts == pytest.approx({k: v * 1e9 for k, v in (expected | copied).items()}, rel=1e-3)


def test_on_cpus_everything_is_in_host_memory(make_config: Any) -> None:
    config = make_config(rollout={"num_engines": 2, "kv_cache_gib": 3}, learner={"micro_batch_tokens": 1000})
    (phase, memory), *others = host_memory(config, SHAPE, "float32", plan_placement(config, [Node("n0", 8)])).items()
    assert (phase, others) == ("while training", [])
    # Weights 4, gradients 4, masters and moments 12 bytes a parameter; activations and a mask besides.
    mask = 1000 * (16 + 4 * 24) * 5
    assert memory.parts["learner ranks"] == 20e9 + 1000 * 1000 * 10 * 16 * 4 + mask
    assert memory.parts["engines"] == 2 * (4e9 + 3 * GIB)
    assert memory.parts["object store"] == 4e9
    assert memory.parts["checkpoint"] == 16e9


def test_nodes_that_are_too_small_are_said() -> None:
    shown = plan(PAPER, "--simulate", "nodes=1,gpus=8,host_gib=35").output
    (loading,) = [line for line in shown.splitlines() if "while loading" in line]
    assert "33.6 of 35" in loading
    assert "TOO LARGE: more nodes" in loading
    assert "TOO LARGE" not in plan(PAPER, "--simulate", "nodes=1,gpus=8,host_gib=200").output


def test_this_machines_memory_and_disk_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.planning.describe.memory_limits", lambda: [64 * GIB, 10 * GIB])
    monkeypatch.setattr("cluster.planning.describe.free_disk", lambda folder: 7 * GIB)
    shown = describe_plan(load_config("demo-math", ["cluster.num_cpus=2", "rollout.kv_cache_gib=9"]))
    assert "of 10 " in shown
    assert "TOO LARGE: more nodes" in shown
    assert "4.0 of 7 free" in shown


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


SHARED = ["cluster.colocate=true", "learner.num_ranks=8", "rollout.num_engines=8"]


def test_a_shared_gpu_is_added_up_for_both_turns() -> None:
    shown = plan(PAPER, *SHARED, "--simulate", "nodes=1,gpus=8").output
    lines = {line[:16]: line for line in shown.splitlines() if line.startswith("shared, ")}
    # 0.85 x 80; 16.06e9 bytes over eight ranks; 24,576 tokens x 4096 x 16 values of 2 bytes, and
    # 2 GiB for the head.
    assert "76.4 of 80" in lines["shared, decoding"]
    assert "engine 68.0 + learner's weights 1.9 + scoring 5.0 + learner's context 1.5" in lines["shared, decoding"]
    assert (
        "weights 1.9 + gradients 3.7 + optimizer 11.2 + activations 9.0 + mask 1.7 + sleeping"
        in lines["shared, updating"]
    )
    assert "TOO LARGE" not in shown
    updating = plan(PAPER, *SHARED, "learner.zero_stage=1", "rollout.gpu_memory_utilization=0.5",
                    "--simulate", "nodes=1,gpus=8,gpu_gib=60").output  # fmt: skip
    (line,) = [line for line in updating.splitlines() if line.startswith("shared, updating")]
    assert "TOO LARGE: more ranks" in line


def test_a_share_that_leaves_the_learner_no_room_is_refused_with_the_arithmetic(make_config: Any) -> None:
    result = plan(PAPER, *SHARED, "rollout.gpu_memory_utilization=0.95", "--simulate", "nodes=1,gpus=8")
    assert result.exit_code == 2
    assert result.stderr == (
        "dphrl: error: --simulate: cluster.colocate: rollout.gpu_memory_utilization=0.95 of 80 GiB = 76.0 for an "
        "engine, and beside it 1.9 learner's weights + 5.0 scoring + 1.5 learner's context = 84.4 GiB do not fit on a "
        "GPU of 80; set rollout.gpu_memory_utilization to 0.89 or less\n"
    )
    assert plan(PAPER, *SHARED, "rollout.gpu_memory_utilization=0.89", "--simulate", "nodes=1,gpus=8").exit_code == 0
    small = plan(PAPER, *SHARED, "learner.zero_stage=2", "--simulate", "nodes=1,gpus=8,gpu_gib=24")
    assert "no share leaves room for the engine's own weights; set learner.zero_stage=3" in small.stderr


def test_a_share_that_just_fits(make_config: Any) -> None:
    config = make_config(cluster={"colocate": True}, rollout={"gpu_memory_utilization": 0.5})
    size = while_decoding(config, SHAPE, "bfloat16", 0.0).total * 2
    assert colocation_obstacle(config, SHAPE, "bfloat16", size) is None
    assert colocation_obstacle(config, SHAPE, "bfloat16", size - 1e6) is not None


def test_a_model_unlike_llama_has_no_shape(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)) is None, "so its plan says less, and its run starts"


def test_targets_count_by_their_last_name(make_config: Any) -> None:
    short, long = (make_config(model={"lora": {"target": [name]}}) for name in ("q_proj", "self_attn.q_proj"))
    assert LLAMA_8B.num_trained(long.model.lora) == LLAMA_8B.num_trained(short.model.lora) > 0


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
        "divergence/num_rows": 15.0, "learner/num_rows_left_out": 5.0,
        "time/rollout_s": 2.0, "time/learn_s": 3.0, "time/sync_s": 0.5,
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
