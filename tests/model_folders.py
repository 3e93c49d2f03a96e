"""Small models as users have them: tokenizers of several families under any class name, heads stored in any way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["What is 12 + 30?\nThe answer is 42.", "def f(x):\n\treturn  x * 2\n\n", "héllo ≤ 3½ 日本語"] * 20
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How families cut a text before they merge bytes: in any words, with each digit alone, and by the patterns of Qwen 2
# and of Llama 3, which differ in how many digits stay together.
BYTE_RULES: dict[str, list[Any]] = {
    "bytes": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS + r"\p{N}" + _REST), "isolated")],
    "llama3": [pre_tokenizers.Split(Regex(_WORDS + r"\p{N}{1,3}" + _REST), "isolated")],
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build_tokenizer(family: str) -> Tokenizer:
    """A tokenizer of one of BYTE_RULES, or `metaspace`, which writes a blank as a symbol of its own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    alphabet: list[str] = []
    if family == "metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        rules = BYTE_RULES[family]
        if len(rules) == 1 and family != "bytes":
            rules = [*rules, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(rules), decoders.ByteLevel()
        if family == "qwen2":
            backend.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def write_tokenizer(
    folder: Path, family: str, tokenizer_class: str | None, model_type: str = "llama", **settings: Any
) -> Tokenizer:
    """Write a tokenizer with the ChatML template to `folder`, under a class's name; a setting of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = build_tokenizer(family)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": tokenizer_class,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "chat_template.jinja").write_text(CHATML)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return backend


def write_head(source: str | Path, folder: Path, head: str, *, tied: bool = True, suffix: str = "safetensors") -> Path:
    """A copy of a tied model whose checkpoint stores its head in another way, and whose configuration says `tied`.

    head: none (as it was), copy (the embedding once more), own (other values), only (in place of the embedding).
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    embedding = weights[EMBEDDING]
    if head == "only":
        del weights[EMBEDDING]
    if head != "none":
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        weights[HEAD] = embedding + 0.1 * noise if head == "own" else embedding.clone()
    if suffix == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
