"""Weights that stay mapped from their file, and what is said where they cannot."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dphrl.config.loading import InputError
from dphrl.config.model import ModelConfig
from dphrl.learner.loading import load_policy
from dphrl.model_files import tensor_sizes

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
BFLOAT16 = ModelConfig(dtype="bfloat16")


def save(folder: Path, lm: Any) -> str:
    torch.manual_seed(0)
    lm.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return save(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)))


def load(path: str, config: ModelConfig = BFLOAT16, *, keep_stored_dtype: bool = True) -> Any:
    return load_policy(path, config, temperature=1.0, keep_stored_dtype=keep_stored_dtype).lm


def mapped_file(tensor: torch.Tensor) -> str:
    """The file whose mapping `tensor` lies in; "" where it is memory of the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *rest = line.split()
        start, end = (int(one, 16) for one in place.split("-"))
        if start <= tensor.data_ptr() < end:
            return rest[4] if len(rest) > 4 else ""
    return ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_is_copied_whatever_the_run_s_number_type(llama: str, dtype: Any) -> None:
    lm = load(llama, ModelConfig(dtype=dtype))
    for name, parameter in lm.named_parameters():
        assert parameter.dtype == torch.float32
        assert mapped_file(parameter).endswith("model.safetensors"), name
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_asked_for_at_once_the_weights_have_the_run_s_number_type(llama: str) -> None:
    assert {one.dtype for one in load(llama, keep_stored_dtype=False).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_all_but_the_weights_is_as_in_the_run_s_number_type(tmp_path: Path, kind: str) -> None:
    """Gemma's scale of its embeddings follows the model's number type, angles of rotary embeddings do not."""
    lm: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    if kind == "gemma":
        lm = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=16))
    path = save(tmp_path / kind, lm)
    ours, theirs = load(path), load(path, keep_stored_dtype=False)
    expected = dict(theirs.named_buffers())
    assert expected.keys() == dict(ours.named_buffers()).keys()
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == expected[name].dtype, name
        assert torch.equal(buffer, expected[name]), name
    assert ours.config.to_dict() == theirs.config.to_dict()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name).bfloat16(), parameter), name


def test_missing_weights_are_told_on_this_way_too(llama: str) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(llama, "model.safetensors")
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights, such as model\.norm\.weight"):
        load(llama)


def test_files_that_cannot_be_mapped_are_copied_and_the_log_says_so(
    llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = LlamaForCausalLM.from_pretrained(llama)
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    Path(llama, "model.safetensors").unlink()
    torch.save(state, Path(llama, "pytorch_model.bin"))
    with caplog.at_level(logging.WARNING, "dphrl"):
        read = load(llama)
    assert {one.dtype for one in read.parameters()} == {torch.bfloat16}
    assert "every rank holds a whole copy in host memory while it loads: it has no .safetensors files" in caplog.text


def test_a_model_that_keeps_float32_weights_is_left_to_transformers(
    llama: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    with caplog.at_level(logging.WARNING, "dphrl"):
        lm = load(llama)
    assert lm.model.norm.weight.dtype == torch.float32
    assert lm.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert "keeps some weights in float32" in caplog.text


def test_merged_experts_are_honoured_and_the_log_says_what_they_cost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "experts", MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=2)))
    with caplog.at_level(logging.WARNING, "dphrl"):
        ours = load(path)
    assert "put together from other tensors" in caplog.text
    for name, parameter in load(path, keep_stored_dtype=False).named_parameters():
        assert torch.equal(ours.get_parameter(name).bfloat16(), parameter), name


def test_the_bytes_of_each_number_type_are_those_of_all_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    assert tensor_sizes(tmp_path) == {"F32": 32, "BF16": 4}
