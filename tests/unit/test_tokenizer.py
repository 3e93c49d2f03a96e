"""A tokenizer is what its own file says, whatever class a configuration names for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dphrl.tokenizer import PROBE, first_difference, load_tokenizer
from tests.model_folders import CHATML, write_tokenizer

TEXT = "<|im_start|>user\nWhat is 12 + 30?  1000\n\n\tx<|im_end|>\n"
# (family, class in tokenizer_config.json, model type in config.json, whether AutoTokenizer follows the file)
AS_FOUND = [
    ("bytes", "LlamaTokenizerFast", "llama", False),
    ("bytes", "LlamaTokenizer", "qwen3", False),
    ("bytes", "PreTrainedTokenizerFast", "qwen2", False),
    ("bytes", None, "qwen2", False),
    ("bytes", "Qwen2Tokenizer", "llama", False),
    ("digits", "LlamaTokenizerFast", "llama", False),
    ("llama3", "LlamaTokenizerFast", "llama", False),
    ("llama3", "PreTrainedTokenizerFast", "qwen2", False),
    ("metaspace", "LlamaTokenizerFast", "llama", False),
    ("metaspace", "GPT2TokenizerFast", "gpt2", False),
    ("metaspace", "Qwen2Tokenizer", "qwen2", False),
    ("qwen2", "LlamaTokenizerFast", "llama", False),
    ("qwen2", "Qwen2Tokenizer", "qwen2", True),
    ("bytes", "PreTrainedTokenizerFast", "llama", True),
    ("llama3", "PreTrainedTokenizerFast", "llama", True),
    ("metaspace", "PreTrainedTokenizerFast", "llama", True),
    ("bytes", "GPT2TokenizerFast", "gpt2", True),
]


def is_warned(caplog: pytest.LogCaptureFixture) -> bool:
    return any("in another way than the model's own tokenizer.json" in message for message in caplog.messages)


@pytest.mark.parametrize(("family", "tokenizer_class", "model_type", "follows"), AS_FOUND)
def test_a_tokenizer_follows_its_own_file(
    family: str,
    tokenizer_class: str | None,
    model_type: str,
    follows: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = write_tokenizer(tmp_path, family, tokenizer_class, model_type)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    for text in (TEXT, PROBE):
        token_ids = own.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == token_ids
        assert tokenizer.decode(token_ids) == own.decode(token_ids, skip_special_tokens=False)
        assert tokenizer.decode(token_ids, skip_special_tokens=True) == own.decode(token_ids)
    assert len(tokenizer) == own.get_vocab_size(), "no token is added: the model has no embedding for it"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == CHATML
    assert is_warned(caplog) is not follows


def test_a_difference_is_found_in_what_is_encoded_and_in_what_is_decoded(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(tmp_path)
    assert first_difference(tokenizer, own) is None
    other = write_tokenizer(tmp_path / "other", "bytes", "PreTrainedTokenizerFast")
    other.pre_tokenizer = write_tokenizer(tmp_path / "digits", "digits", None).pre_tokenizer
    assert first_difference(tokenizer, other) == PROBE
    other = write_tokenizer(tmp_path / "again", "bytes", "PreTrainedTokenizerFast")
    other.decoder = write_tokenizer(tmp_path / "blanks", "metaspace", None).decoder
    assert first_difference(tokenizer, other) == PROBE


def test_a_special_token_that_only_the_class_names_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "bytes", "GPT2Tokenizer", "gpt2", eos_token=None, pad_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|endoftext|>", "padding needs some token"
    # A Llama tokenizer ends texts by </s>, of which this vocabulary has none.
    own = write_tokenizer(tmp_path / "llama", "bytes", "LlamaTokenizer", eos_token=None)
    tokenizer = load_tokenizer(tmp_path / "llama")
    assert tokenizer.eos_token is None
    assert len(tokenizer) == own.get_vocab_size()


def test_decoding_keeps_the_blanks_that_were_sampled(tokenizer: Any, tiny_dir: str, tmp_path: Path) -> None:
    from tests.model_folders import write_head

    folder = write_head(tiny_dir, tmp_path / "model", "none")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["model"]["vocab"] |= {",": 24, ".": 25}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    assert load_tokenizer(folder).decode([24, 25]) == ", ."


def test_truncation_and_padding_in_the_file_shorten_no_prompt(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast")
    whole = own.encode(TEXT, add_special_tokens=False).ids
    own.enable_truncation(8)
    own.enable_padding(length=200)
    own.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXT, add_special_tokens=False) == whole


def test_a_pad_token_that_has_no_embedding_pads_nothing(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast", pad_token="[PAD]", unk_token="<unk>")
    assert load_tokenizer(tmp_path).pad_token_id == own.token_to_id("<|im_end|>")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        # The token takes the blanks around it along, or is read as text.
        ({"added_tokens_decoder": {"3": {"content": "<|im_end|>", "lstrip": True, "special": True}}}, "<unk>a"),
        ({"split_special_tokens": True}, "<unk>a"),
    ],
)
def test_special_tokens_that_contradict_the_file_are_refused(
    settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast", **settings)
    with pytest.raises(ValueError, match="make the special tokens of the two files the same") as caught:
        load_tokenizer(tmp_path)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<s>", "add_bos_token": True, "unk_token": "[UNK]"},
        {"eos_token": "</s>"},
        {"additional_special_tokens": ["<s>", "is"]},
        {"extra_special_tokens": {"think": "<s>"}},
        {"added_tokens_decoder": {"900": {"content": "<s>", "special": True}}},
    ],
)
def test_tokens_that_the_configuration_alone_names_are_left_out(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast", **settings)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == own.get_vocab_size()
    for text in ("<s>x</s> What is [UNK]?", TEXT):
        assert tokenizer.encode(text) == own.encode(text).ids
        assert tokenizer.decode(own.encode(text).ids, skip_special_tokens=True) == own.decode(own.encode(text).ids)
    assert set(tokenizer.all_special_tokens) <= own.get_vocab().keys()
    assert tokenizer.eos_token == (None if "eos_token" in settings else "<|im_end|>")
    named = {
        f"the {name} of tokenizer_config.json, {token}," for name, token in settings.items() if name[1:] == "os_token"
    }
    assert all(any(words in message for message in caplog.messages) for words in named)


def test_a_token_that_the_file_does_not_call_special_stays_in_decoded_text(tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast", additional_special_tokens=["<answer>"])
    own.add_tokens(["<answer>"])
    own.save(str(tmp_path / "tokenizer.json"))
    token_ids = own.encode("<answer>7").ids
    assert load_tokenizer(tmp_path).decode(token_ids, skip_special_tokens=True) == "<answer>7"


def test_an_end_that_is_a_word_of_the_vocabulary_is_special_all_the_same(tmp_path: Path) -> None:
    for number, settings in enumerate(({}, {"bos_token": "<s>"})):
        folder = tmp_path / str(number)
        own = write_tokenizer(folder, "bytes", "PreTrainedTokenizerFast", eos_token="answer", **settings)
        backend = json.loads((folder / "tokenizer.json").read_text())
        backend["model"]["vocab"] |= {"answer": own.get_vocab_size()}
        (folder / "tokenizer.json").write_text(json.dumps(backend))
        tokenizer = load_tokenizer(folder)
        assert len(tokenizer) == own.get_vocab_size() + 1
        assert tokenizer.decode([*own.encode("x").ids, tokenizer.eos_token_id], skip_special_tokens=True) == "x"


def test_a_class_that_cannot_encode_at_all_is_one_that_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_tokenizer(tmp_path, "bytes", "BertTokenizerFast")
    assert load_tokenizer(tmp_path).encode(TEXT) == own.encode(TEXT).ids
    assert is_warned(caplog)


@pytest.mark.parametrize("text", ["{", '{"added_tokens": []}', '{"added_tokens": [], "model": {"type": "Nothing"}}'])
def test_a_broken_file_is_one_line(text: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "bytes", "PreTrainedTokenizerFast")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.path: no tokenizer could be loaded from") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_file_the_class_decides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = write_tokenizer(tmp_path, "qwen2", "Qwen2Tokenizer", "qwen2")
    own.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    text = "What is 12 + 30?\n\n\tx"
    assert tokenizer.encode(text) == own.encode(text).ids
    assert not is_warned(caplog)


def test_a_tokenizer_that_is_code_of_its_own_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    write_tokenizer(folder, "bytes", "Upper", auto_map={"AutoTokenizer": [None, "tokenization_upper.Upper"]})
    (folder / "tokenization_upper.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Upper(PreTrainedTokenizerFast):\n"
        "    def encode(self, text, **settings):\n"
        "        return super().encode(text.upper(), **settings)\n"
    )
    own = write_tokenizer(tmp_path / "plain", "bytes", None)
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert tokenizer.encode("is x") == own.encode("IS X").ids != own.encode("is x").ids
    with pytest.raises(ValueError, match=r"set model\.trust_remote_code: true if you vouch for that"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "llama"])
def test_a_model_without_tokenizer_files_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        ValueError, match=r"model\.path: .*(holds no vocabulary|no tokenizer could be loaded)"
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
