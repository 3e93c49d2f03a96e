"""Padded rows without a mask, packed rows that must not see each other, and kernels that are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from dphrl.config.loading import InputError
from dphrl.config.model import ModelConfig
from dphrl.learner import attention as module
from dphrl.learner.attention import (
    check_kernel,
    check_kernel_device,
    check_rows_apart,
    needs_padding_mask,
    use_packing,
)
from dphrl.learner.batching import collate
from dphrl.learner.policy import PolicyModel
from dphrl.types import RowKind, TrainRow

SHAPE: dict[str, Any] = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    # Two of the three layers see eight positions back.
    "qwen2, sliding": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gpt2": GPT2Config(
        vocab_size=80, n_embd=32, n_layer=3, n_head=4, n_positions=128, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    ),
}
OPT = OPTConfig(
    vocab_size=80, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, word_embed_proj_dim=32,
)  # fmt: skip


def make_lm(config: Any, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    # Initial weights are so small that attention is nearly uniform, and little that is wrong would show.
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return lm.to(dtype).eval()


def make_rows(*lengths: int) -> list[TrainRow]:
    generator = torch.Generator().manual_seed(1)
    return [
        TrainRow(
            RowKind.POLICY, tuple(torch.randint(1, 80, (n,), generator=generator).tolist()), 2, (0.0,) * (n - 2), 1.0
        )
        for n in lengths
    ]


def run(policy: PolicyModel, rows: list[TrainRow], *, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all rows, and the gradient of a sum of them in which every token counts differently."""
    policy.zero_grad()
    logprobs, entropy = policy(collate(rows, packed=packed))
    (logprobs * torch.linspace(-1, 1, len(logprobs)) + 0.1 * entropy).sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_need_no_mask(name: str, dtype: torch.dtype, attention: str) -> None:
    policy = PolicyModel(make_lm(CONFIGS[name], attention, dtype), temperature=1.0)
    assert not policy.needs_padding_mask
    rows = make_rows(5, 31, 60, 64)
    logprobs, gradient = run(policy, rows)
    policy.needs_padding_mask = True
    expected, expected_gradient = run(policy, rows)
    # A reference buffer scored with a mask stays valid: u = 1 exactly, where both are computed in float32.
    if dtype is torch.float32:
        assert torch.equal(logprobs, expected)
    assert (logprobs - expected).abs().max() <= (0 if dtype is torch.float32 else 0.05)
    tolerance = 2e-6 if dtype is torch.float32 else 2e-2
    assert torch.linalg.norm(gradient - expected_gradient) <= tolerance * torch.linalg.norm(expected_gradient)


def test_no_mask_reaches_a_causal_model_and_one_reaches_others() -> None:
    seen: list[Any] = []
    for config in (CONFIGS["llama"], JambaConfig(**SHAPE, use_mamba_kernels=False, num_experts=1)):
        policy = PolicyModel(make_lm(config), temperature=1.0)
        policy.lm.base_model.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        policy(collate(make_rows(5, 9), packed=False))
    assert seen[0] is None
    assert seen[1].tolist() == [[1] * 5 + [0] * 4, [1] * 9]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BertConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=4), "bidirectional"),
        (JambaConfig(**SHAPE, use_mamba_kernels=False, num_experts=1), "recurrent layers"),
        (LlamaConfig(**SHAPE, is_causal=False), "made bidirectional by its configuration"),
        (
            Qwen2Config(**SHAPE, layer_types=["full_attention", "sliding_attention", "linear_attention"]),
            "of a new kind",
        ),
    ],
)
def test_models_that_are_not_causal_attention_alone_keep_their_mask(config: Any, why: str) -> None:
    assert needs_padding_mask(AutoModelForCausalLM.from_config(config)), why


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_do_not_see_each_other(name: str, attention: str) -> None:
    policy = PolicyModel(make_lm(CONFIGS[name], attention), temperature=1.0)
    rows = make_rows(5, 31, 40)
    padded, gradient = run(policy, rows)
    packed, packed_gradient = run(policy, rows, packed=True)
    assert (packed - padded).abs().max() <= 2e-5
    assert torch.linalg.norm(packed_gradient - gradient) <= 1e-5 * torch.linalg.norm(gradient)
    check_rows_apart(policy, torch.device("cpu"))


def test_flex_attention_masks_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch has only its forward pass. It is not compiled here, which would take a minute."""
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(integration, "WrappedFlexAttention", lambda training: lambda: integration.flex_attention)
    config = LlamaConfig(**SHAPE)
    rows = make_rows(5, 31, 40)
    with torch.no_grad():
        expected, _ = PolicyModel(make_lm(config), temperature=1.0)(collate(rows, packed=False))
        policy = PolicyModel(make_lm(config, "flex_attention"), temperature=1.0)
        packed, _ = policy(collate(rows, packed=True))
        padded, _ = policy(collate(rows, packed=False))
    assert (packed - expected).abs().max() <= 2e-5
    assert (padded - expected).abs().max() <= 2e-5
    check_rows_apart(policy, torch.device("cpu"))


@pytest.mark.parametrize(
    "config",
    [
        OPT,
        FalconConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        JambaConfig(**SHAPE, use_mamba_kernels=False, num_experts=1),
    ],
    ids=["opt", "falcon", "jamba"],
)
def test_models_in_which_packed_rows_see_each_other_are_refused(config: Any) -> None:
    policy = PolicyModel(make_lm(config), temperature=1.0)
    with pytest.raises(InputError, match=r"packed rows see each other .*; set learner.packing: padded"):
        check_rows_apart(policy, torch.device("cpu"))


def test_auto_packs_with_the_kernels_that_make_it_cheaper() -> None:
    assert use_packing("auto", "flash_attention_2")
    assert use_packing("auto", "flex_attention")
    assert not use_packing("auto", "sdpa")
    assert use_packing("packed", "sdpa")
    assert not use_packing("padded", "flex_attention")


def test_kernels_that_are_not_there_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    flash, flex = ModelConfig(attention="flash_attention_2"), ModelConfig(attention="flex_attention")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model.attention: flash_attention_2 needs the package flash-attn.*dphrl\[fl"):
        check_kernel(flash, LlamaConfig(**SHAPE))
    check_kernel(flex, LlamaConfig(**SHAPE))
    monkeypatch.setattr(module, "find_spec", lambda name: SimpleNamespace())
    check_kernel(flash, LlamaConfig(**SHAPE))
    with pytest.raises(InputError, match="transformers has no flex_attention for BloomForCausalLM"):
        check_kernel(flex, BloomConfig())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for kernel, why in (("flash_attention_2", "CUDA code"), ("flex_attention", "no backward pass")):
        with pytest.raises(InputError, match=f"model.attention: {kernel} needs a GPU here .*{why}.*sdpa"):
            check_kernel_device(kernel, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_kernel_device("flash_attention_2", "bfloat16")
    check_kernel_device("flex_attention", "float32")
    with pytest.raises(InputError, match="no float32 kernel"):
        check_kernel_device("flash_attention_2", "float32")


def test_inline_mode_refuses_to_pack_rows_that_see_each_other(make_config: Any, tokenizer: Any, tmp_path: Path) -> None:
    from dphrl.inline import InlineLearner

    make_lm(OPT).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"learner.packing: in this model packed rows see each other"):
        InlineLearner(make_config(learner={"packing": "packed"}), str(tmp_path))


def test_a_cluster_without_gpus_is_refused_before_anything_starts(make_config: Any) -> None:
    from cluster.planning.placement import Node, PlacementError, plan_placement

    config = make_config(model={"attention": "flex_attention"})
    with pytest.raises(PlacementError, match=r"needs a GPU for model.attention: flex_attention .*no node has one"):
        plan_placement(config, [Node("a", 64.0, 0.0)])
    assert plan_placement(config, [Node("a", 64.0, 8.0)])
