"""A checkpoint's Hugging Face directory: trained weights, and all else as the model came."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dphrl import scratch
from dphrl.config.loading import InputError
from dphrl.inline import InlineLearner
from dphrl.learner.export import check_exportable, export_model
from dphrl.learner.loading import load_policy
from tests.checkpoints import save
from tests.model_folders import EMBEDDING, HEAD, write_head, write_tokenizer

# A model is shipped with these: transformers reads it, and refuses to save it.
UNUSED_TEMPERATURE = '{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}\n'


@pytest.fixture
def source(tiny_dir: str, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that transformers replaces, and files that it would write in another way."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_dir, folder)
    write_tokenizer(folder, "bytes", "LlamaTokenizerFast")
    (folder / "generation_config.json").write_text(UNUSED_TEMPERATURE)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "helper.py").write_text("X = 1\n")
    (folder / "README.md").write_text("about the weights as they were")
    return folder


def load(folder: Path, make_config: Any) -> Any:
    return load_policy(str(folder), make_config().model, temperature=1.0).lm


def test_all_but_weights_and_configuration_is_copied_byte_for_byte(source: Path, make_config: Any) -> None:
    learner = InlineLearner(make_config(), str(source))
    with torch.no_grad():
        learner.policy.lm.get_input_embeddings().weight.add_(1.0)  # type: ignore[operator]
    asyncio.run(save(learner, source.parent))
    exported = source.parent / "hf"
    copied = {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "helper.py"),
        *("generation_config.json", "additional_chat_templates/tool.jinja"),
    }
    for name in copied:
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert files == copied | {"config.json", "model.safetensors"}
    ours, theirs = load_file(exported / "model.safetensors"), load_file(source / "model.safetensors")
    assert torch.equal(ours[EMBEDDING], theirs[EMBEDDING] + 1.0)
    assert learner.policy.lm.generation_config.eos_token_id == 2, "sampling goes on as before"


def test_where_there_is_no_generation_configuration_none_is_made_up(source: Path, make_config: Any) -> None:
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 3]}
    (source / "config.json").write_text(json.dumps(config))
    target = source.parent / "hf"
    export_model(load(source, make_config), source, target)
    assert not (target / "generation_config.json").exists()
    assert load(target, make_config).generation_config.eos_token_id == [2, 3]


def test_weights_may_come_from_elsewhere(source: Path, make_config: Any) -> None:
    lm = load(source, make_config)
    state = {name: torch.ones_like(parameter) for name, parameter in lm.named_parameters()}
    export_model(lm, source, source.parent / "hf", state)
    assert all(bool((tensor == 1).all()) for tensor in load_file(source.parent / "hf" / "model.safetensors").values())


def test_what_cannot_be_exported_is_said_before_the_first_step(
    source: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scratch, "PLACE", tmp_path)
    lm = load(source, make_config)
    check_exportable(lm, source)

    def refuse(*args: Any, **settings: Any) -> None:
        raise ValueError("not\nserializable")

    monkeypatch.setattr(lm, "save_pretrained", refuse)
    with pytest.raises(InputError, match=r"could not be saved after training \(not serializable\)"):
        check_exportable(lm, source)
    assert list(tmp_path.iterdir()) == [source], "a learner rank has no other time to remove what it tried"
    assert lm.generation_config.top_p == 0.6
    monkeypatch.setattr(type(lm), "save_pretrained", refuse)
    with pytest.raises(InputError, match="could not be saved after training"):
        InlineLearner(make_config(), str(source))


# ------------------------------------------------------------ output heads


@pytest.mark.parametrize(
    ("head", "tied", "suffix", "stored"),
    [
        # (how the checkpoint stores the head, what config.json says, file type, tensors of the export)
        ("none", True, "safetensors", {EMBEDDING}),
        ("copy", True, "safetensors", {EMBEDDING}),
        ("copy", True, "bin", {EMBEDDING}),
        ("own", True, "safetensors", {EMBEDDING, HEAD}),
        ("own", False, "safetensors", {EMBEDDING, HEAD}),
        ("own", False, "bin", {EMBEDDING, HEAD}),
        ("copy", False, "safetensors", {EMBEDDING, HEAD}),
    ],
)
def test_an_export_says_what_it_holds(
    head: str, tied: bool, suffix: str, stored: set[str], tiny_dir: str, make_config: Any, tmp_path: Path
) -> None:
    source, target = write_head(tiny_dir, tmp_path / "source", head, tied=tied, suffix=suffix), tmp_path / "hf"
    lm = load(source, make_config)
    expected = lm.get_output_embeddings().weight.detach().clone()
    export_model(lm, source, target)
    assert {EMBEDDING, HEAD} & set(load_file(target / "model.safetensors")) == stored
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is (HEAD not in stored)
    assert torch.equal(load(target, make_config).get_output_embeddings().weight, expected)


@pytest.mark.parametrize(
    ("head", "tied", "suffix", "message"),
    [
        ("none", False, "safetensors", r"lacks 1 of .*lm_head\.weight.* set tie_word_embeddings to true"),
        ("only", True, "safetensors", r"as the output head only.*rename the tensor to model\.embed_tokens\.weight"),
        ("own", True, "bin", r"differs from its embedding.*set tie_word_embeddings to false"),
    ],
)
def test_a_head_that_engines_would_load_otherwise_is_refused(
    head: str, tied: bool, suffix: str, message: str, tiny_dir: str, make_config: Any, tmp_path: Path
) -> None:
    source = write_head(tiny_dir, tmp_path / "source", head, tied=tied, suffix=suffix)
    with pytest.raises(InputError, match=rf"^model\.path: .*{message}"):
        load(source, make_config)


def test_weights_that_are_missing_are_named(tiny_dir: str, make_config: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = write_head(tiny_dir, tmp_path / "source", "none")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights, such as model\.norm\.weight, .* random$"):
        load(source, make_config)
