"""Adapters on the tiny model: what is trained, what is sent and stored, and what a new one changes (nothing)."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dphrl.config.changes import compare_settings
from dphrl.config.loading import InputError, load_config
from dphrl.fingerprint import fingerprint
from dphrl.inline import InlineLearner
from dphrl.learner.export import check_exportable
from dphrl.learner.loading import load_policy
from dphrl.learner.lora import (
    adapter_weights,
    adapters_off,
    add_adapters,
    check_lora,
    plain_weights,
    target_layers,
    trained_by_name,
    trained_parameters,
)
from dphrl.learner.state import StoredState
from dphrl.types import RowKind, TrainBatch, TrainRow
from tests.checkpoints import save

SEQUENCE = [((1, 2, 5, 6, 7, 8), 2)]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def row(length: int, kind: RowKind = RowKind.POLICY) -> TrainRow:
    return TrainRow(kind, (1, 2, *range(5, 5 + length)), 2, (-1.0,) * length, 0.01, 1.0)


def batch_of(learner: InlineLearner) -> TrainBatch:
    return TrainBatch(0, learner.policy_version, ((row(4), row(6, RowKind.REFERENCE)),), 1e-2)


def with_lora(make_config: Any, lora: dict[str, Any] | None = None, **changes: Any) -> Any:
    return make_config(model={"lora": lora or {"rank": 4}}, **changes)


@pytest.fixture
def learner(make_config: Any, tiny_dir: str) -> InlineLearner:
    return InlineLearner(with_lora(make_config), tiny_dir)


@pytest.fixture(scope="module")
def base(tiny_dir: str) -> dict[str, torch.Tensor]:
    return load_file(Path(tiny_dir) / "model.safetensors")


# ------------------------------------------------------------ the start


def test_a_new_adapter_changes_no_bit(learner: InlineLearner, make_config: Any, tiny_dir: str) -> None:
    plain = InlineLearner(make_config(), tiny_dir)
    assert asyncio.run(learner.score(SEQUENCE)) == asyncio.run(plain.score(SEQUENCE))
    # u = 1: the divergence of the first step is none at all.
    stored = asyncio.run(learner.score(SEQUENCE))[0]
    rehearsed = TrainRow(RowKind.REFERENCE, SEQUENCE[0][0], 2, stored, 0.25)
    metrics = asyncio.run(learner.update(TrainBatch(0, 0, ((rehearsed,),), 1e-3)))
    assert metrics["divergence/loss"] == 0.0


def test_a_buffer_serves_runs_with_and_without_adapters(make_config: Any, tiny_dir: str) -> None:
    prints = [fingerprint(config, tiny_dir, (), "float32") for config in (make_config(), with_lora(make_config))]
    assert prints[0] == prints[1]


def test_an_adapters_start_is_a_function_of_the_seed(make_config: Any, tiny_dir: str) -> None:
    def start(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        lm = load_policy(tiny_dir, make_config().model, temperature=1.0).lm
        before = torch.get_rng_state()
        add_adapters(lm, with_lora(make_config).model.lora, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
        return dict(adapter_weights(lm))

    one, same, other = start(0, 1), start(0, 2), start(1, 1)
    assert len(one) == 2 * len(LAYERS) * 2, "A and B of each layer of two blocks"
    for name, value in one.items():
        assert torch.equal(value, same[name])
        assert bool((value == 0).all()) == ("lora_B" in name)
        assert torch.equal(value, other[name]) == ("lora_B" in name)


# ------------------------------------------------------------ training


def test_only_adapters_are_trained(learner: InlineLearner, base: dict[str, torch.Tensor]) -> None:
    trained = trained_parameters(learner.policy)
    assert {id(p) for p in trained} == {id(p) for _, p in adapter_weights(learner.policy.lm)}
    for _ in range(2):  # A moves from the second step on, because B starts at zero
        asyncio.run(learner.update(batch_of(learner)))
    assert set(learner.engine.optimizer.state) == set(trained), "frozen weights have no moments"
    assert all(p.grad is None for p in learner.policy.parameters())
    for weight in plain_weights(learner.policy.lm):
        assert torch.equal(weight.base, base[weight.name]), weight.name
        assert torch.equal(weight.value(), base[weight.name]) == (weight.adapter is None), weight.name
    fresh = InlineLearner(learner.config, learner.model_dir)
    for (name, ours), (_, new) in zip(
        adapter_weights(learner.policy.lm), adapter_weights(fresh.policy.lm), strict=True
    ):
        assert not torch.equal(ours, new), name


def test_named_layers_alone_get_adapters(make_config: Any, tiny_dir: str) -> None:
    lora = {"target": ["q_proj", "layers.1.mlp.down_proj"], "rank": 2, "alpha": 1}
    one = InlineLearner(with_lora(make_config, lora), tiny_dir)
    adapted = {weight.name: weight.adapter for weight in plain_weights(one.policy.lm) if weight.adapter}
    assert set(adapted) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert {scale for _, _, scale in adapted.values()} == {0.5}


def test_recomputed_activations_give_adapters_the_same_gradients(
    learner: InlineLearner, make_config: Any, tiny_dir: str
) -> None:
    other = InlineLearner(with_lora(make_config, learner={"gradient_checkpointing": True}), tiny_dir)
    for one in (learner, other):
        for _ in range(2):
            asyncio.run(one.update(batch_of(one)))
    for (name, ours), (_, theirs) in zip(
        adapter_weights(learner.policy.lm), adapter_weights(other.policy.lm), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_the_resident_reference_is_the_policy_without_adapters(make_config: Any, tiny_dir: str) -> None:
    """Estimators that need a reference model train as with a second copy, and hold none."""
    algorithm = {"estimator": "rollout", "divergence": "reverse_kl"}
    config = with_lora(make_config, algorithm=algorithm)
    learner = InlineLearner(config, tiny_dir)
    assert learner.engine.reference is None
    asked: list[torch.Tensor] = []
    own = learner.engine.reference_forward

    def reference_forward(batch: Any) -> torch.Tensor:
        asked.append(own(batch))
        copy = load_policy(tiny_dir, make_config().model, temperature=1.0)
        assert torch.equal(asked[-1], copy(batch)[0])
        return asked[-1]

    learner.engine.reference_forward = reference_forward  # type: ignore[method-assign]
    for _ in range(2):
        metrics = asyncio.run(learner.update(TrainBatch(0, 0, ((row(4), row(6)),), 1e-2)))
    assert len(asked) == 2
    assert abs(metrics["divergence/loss"]) > 1e-4, "the policy itself has its adapters on"


def test_adapters_are_on_again_whatever_happens(learner: InlineLearner) -> None:
    asyncio.run(learner.update(batch_of(learner)))
    trained = asyncio.run(learner.score(SEQUENCE))

    def off() -> Any:
        with adapters_off(learner.policy):
            found = asyncio.run(learner.score(SEQUENCE))
            raise RuntimeError(found)

    with pytest.raises(RuntimeError):
        off()
    assert asyncio.run(learner.score(SEQUENCE)) == trained


# ------------------------------------------------------------ what engines and exports get


def test_plain_weights_are_base_and_adapter(learner: InlineLearner, base: dict[str, torch.Tensor]) -> None:
    for _ in range(2):
        asyncio.run(learner.update(batch_of(learner)))
    adapters = dict(adapter_weights(learner.policy.lm))
    weights = {weight.name: weight.value() for weight in plain_weights(learner.policy.lm)}
    assert weights.keys() == base.keys(), "checkpoint names, tied weights once"
    for name, value in weights.items():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name].double()
        if f"{part}.lora_A.weight" in adapters:
            a, b = (adapters[f"{part}.lora_{x}.weight"].double() for x in "AB")
            expected = expected + 32.0 / 4 * (b @ a)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
    merged = load_policy(learner.model_dir, learner.config.model.model_copy(update={"lora": None}), temperature=1.0)
    merged.lm.load_state_dict(weights, strict=False)
    ids = torch.tensor([SEQUENCE[0][0]])
    with torch.no_grad():
        torch.testing.assert_close(merged.lm(ids).logits, learner.policy.lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_merged_in_float32(make_config: Any, tiny_dir: str) -> None:
    lm: Any = load_policy(tiny_dir, with_lora(make_config).model, temperature=1.0).lm.to(torch.bfloat16)
    add_adapters(lm, with_lora(make_config).model.lora, 0)
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}
    for name, parameter in adapter_weights(lm):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for weight in plain_weights(lm):
        if weight.adapter:
            a, b, scale = weight.adapter
            expected = (weight.base.float() + scale * (b.float() @ a.float())).bfloat16()
            assert weight.value().dtype == torch.bfloat16
            # A product that was rounded before it was added would differ at one in ten of the weights.
            assert float((weight.value() != expected).float().mean()) < 0.01


def test_a_checkpoint_holds_adapters_and_whole_models_beside(
    learner: InlineLearner, tiny_dir: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    asyncio.run(learner.update(batch_of(learner)))
    asyncio.run(save(learner, tmp_path))
    with StoredState(tmp_path / "state") as stored:
        stored.check({name: parameter.numel() for name, parameter in trained_by_name(learner.policy)})
    assert len(trained_by_name(learner.policy)) == len(dict(adapter_weights(learner.policy.lm)))
    (state,) = (tmp_path / "state").iterdir()
    assert state.stat().st_size < 0.6 * (tmp_path / "hf" / "model.safetensors").stat().st_size
    ids = torch.tensor([SEQUENCE[0][0]])
    with torch.no_grad():
        ours = learner.policy.lm(ids).logits
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        assert exported.config.tie_word_embeddings
        torch.testing.assert_close(exported(ids).logits, ours, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert torch.equal(adapted(ids).logits, ours)
    assert adapted.peft_config["default"].base_model_name_or_path == tiny_dir


def test_a_resumed_learner_repeats_a_step_to_the_bit(learner: InlineLearner, tiny_dir: str, tmp_path: Path) -> None:
    asyncio.run(learner.update(batch_of(learner)))
    asyncio.run(save(learner, tmp_path))
    other = InlineLearner(learner.config, tiny_dir)
    asyncio.run(other.load(tmp_path, 1))
    metrics = [asyncio.run(one.update(batch_of(one))) for one in (learner, other)]
    assert metrics[0] == metrics[1]
    for ours, theirs in zip(learner.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_layout_tells_adapters_apart(make_config: Any, tiny_dir: str) -> None:
    layouts = [
        InlineLearner(config, tiny_dir).layout
        for config in (
            make_config(),
            with_lora(make_config),
            with_lora(make_config, {"rank": 8}),
            with_lora(make_config, {"rank": 4, "target": ["q_proj"]}),
        )
    ]
    assert layouts == [
        "inline",
        "inline, LoRA of rank 4 on every linear layer",
        "inline, LoRA of rank 8 on every linear layer",
        "inline, LoRA of rank 4 on q_proj",
    ]


def test_other_adapters_than_the_checkpoints_are_a_changed_setting(make_config: Any) -> None:
    whole, adapted = make_config(), with_lora(make_config, {"rank": 16})
    stored = whole.model_dump(mode="json")
    (changed,) = compare_settings(stored, adapted).changed
    assert changed.startswith("model.lora: null -> ")
    del stored["model"]["lora"]  # as an older version wrote it
    assert compare_settings(stored, adapted).changed
    assert not compare_settings(stored, whole).changed
    assert compare_settings(adapted.model_dump(mode="json"), with_lora(make_config, {"rank": 8})).changed == (
        "model.lora.rank: 16 -> 8",
    )


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target": ["q_prj"]}, rf"model\.lora\.target: .* no linear layer q_prj; it has {', '.join(LAYERS)}$"),
        ({"target": ["proj"]}, "no linear layer proj"),
        ({"target": ["q_proj", "input_layernorm"]}, "no linear layer input_layernorm"),
        ({"target": ["lm_head"]}, "lm_head is the model's output head. Models tie the two"),
        ({"target": ["embed_tokens"]}, "embed_tokens is the model's embedding"),
        ({"target": ["model.embed_tokens"]}, "embed_tokens is the model's embedding"),
        ({"rank": 129, "target": ["up_proj"]}, r"rank=129: .*up_proj has a rank above 128"),
        ({"rank": 129}, r"model\.lora\.rank=129: .*q_proj has a rank above 128; lower it"),
    ],
)
def test_adapters_that_the_model_cannot_have_are_one_line_before_anything_starts(
    lora: dict[str, Any], message: str, make_config: Any, tiny_dir: str
) -> None:
    config = with_lora(make_config, lora)
    with pytest.raises(InputError, match=message) as caught:
        check_lora(config.model, tiny_dir)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        InlineLearner(config, tiny_dir)


def test_a_run_asks_before_anything_starts(make_config: Any, tiny_dir: str) -> None:
    from dphrl.prepare import prepare
    from dphrl.tracking.console import Console

    with pytest.raises(InputError, match=r"^model\.lora\.target: the model has no linear layer nope"):
        prepare(with_lora(make_config, {"target": ["nope"]}), Console())


def test_a_model_without_linear_layers_is_refused(make_config: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    lm = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layer"):
        target_layers(lm, with_lora(make_config).model.lora)


def test_without_peft_one_line_says_how_to_get_it(
    make_config: Any, tiny_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    for start in (
        lambda: check_lora(with_lora(make_config).model, tiny_dir),
        lambda: InlineLearner(with_lora(make_config), tiny_dir),
    ):
        with pytest.raises(InputError, match=r"^model\.lora: needs the package peft; pip install 'dphrl\[lora\]'$"):
            start()
    InlineLearner(make_config(), tiny_dir)  # and nobody else needs it


def test_an_adapter_that_cannot_be_saved_is_said_before_the_first_step(
    learner: InlineLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = learner.policy.lm
    check_exportable(lm, learner.model_dir)

    def refuse(*args: Any, **settings: Any) -> None:
        raise ValueError("not serializable")

    monkeypatch.setattr(type(lm.peft_config["default"]), "save_pretrained", refuse)  # type: ignore[index, union-attr]
    with pytest.raises(InputError, match=r"could not be saved after training \(not serializable\)"):
        check_exportable(lm, learner.model_dir)


def test_adapters_are_switched_on_by_one_override() -> None:
    assert load_config("demo-math").model.lora is None
    assert load_config("demo-math", ["model.lora=null"]).model.lora is None
    lora = load_config("demo-math", ["model.lora.rank=8"]).model.lora
    assert (lora.rank, lora.alpha, lora.target) == (8, 32.0, ())  # type: ignore[union-attr]
    assert load_config("demo-math", ["model.lora.target=[q_proj]"]).model.lora.target == ("q_proj",)  # type: ignore[union-attr]
    for bad in ("rank=0", "alpha=0", "target=q_proj", "target=['']", "depth=1"):
        with pytest.raises(InputError, match=r"model\.lora"):
            load_config("demo-math", [f"model.lora.{bad}"])
