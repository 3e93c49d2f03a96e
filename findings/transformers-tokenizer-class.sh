#!/usr/bin/env bash
# transformers 5.19.0 with tokenizers 0.23.3: the name of a class, or of a folder, decides what a tokenizer.json means.
#
# One tokenizer.json, of a ChatML model that merges bytes, is put into folders that differ in nothing but the class in
# tokenizer_config.json, the model type in config.json, and the folder's name.
# One would expect: AutoTokenizer encodes as the library tokenizers does with the same file.
# Seen: where a special class exists, it takes only vocabulary and merges from the file, and brings its own rules for
# cutting a text. With Llama's, every blank, tab and newline is lost, and two tokens are added for which the model has no
# embedding. With Qwen2's, nothing is lost, but the text has other tokens than the model was trained on. Nothing is
# logged. save_pretrained writes the replaced rules into a new tokenizer.json, which is then wrong for every program. The
# generic class reads the file as it is. It is also used for some models by their name: the same files in a folder called
# deepseek-ai/DeepSeek-R1-Distill-Llama-8B are read right, and in a folder of another name they are not.
#
# Why it matters: prompts of a training are not those that the model knows, and the export repeats the damage. dphrl
# loads by the generic class, compares it with tokenizers at the start, and copies the original files into an export.
#
# Needs Python 3.11 and a package index; about a minute.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3
cat >"$work/program.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

KNOWN_FOLDER = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
TEXT = "<|im_start|>user\nWhat is 12 + 30?\t100"
CORPUS = ["What is 12 + 30?\nThe answer is 42.", "def f(x):\n\treturn  x * 100\n\n"] * 50

own = Tokenizer(models.BPE())
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
own.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))
ids = own.encode(TEXT).ids
print(f"RESULT {'tokenizers':40} {len(ids)} ids  {own.decode(ids, skip_special_tokens=False)!r}")


def model(folder, tokenizer_class, model_type):
    Path(folder).mkdir(parents=True)
    own.save(f"{folder}/tokenizer.json")
    config = {"tokenizer_class": tokenizer_class, "eos_token": "<|im_end|>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    Path(folder, "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def line(label, tokenizer):
    found = tokenizer.encode(TEXT, add_special_tokens=False)
    right = "as tokenizers" if found == ids else repr(tokenizer.decode(found))
    added = len(tokenizer) - own.get_vocab_size()
    print(f"RESULT {label:40} {len(found)} ids  {right}{f', {added} tokens added' if added else ''}")
    return found == ids, added


replaced = model("llama", "LlamaTokenizerFast", "llama")
replaced.save_pretrained("saved")
damaged = Tokenizer.from_file("saved/tokenizer.json").encode(TEXT).ids
seen = [
    line("LlamaTokenizerFast, llama", replaced),
    line("  the same after save_pretrained", AutoTokenizer.from_pretrained("saved")),
    line("PreTrainedTokenizerFast, qwen2", model("qwen", "PreTrainedTokenizerFast", "qwen2")),
    line("PreTrainedTokenizerFast, llama", model("generic", "PreTrainedTokenizerFast", "llama")),
    line("LlamaTokenizerFast, llama, other folder", model(KNOWN_FOLDER, "LlamaTokenizerFast", "llama")),
]
print(f"RESULT {'tokenizers, the saved tokenizer.json':40} {len(damaged)} ids")
sys.exit(0 if seen == [(False, 2), (False, 2), (False, 0), (True, 0), (True, 0)] and damaged != ids else 1)
PY
cd "$work"
"$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   tokenizers                               14 ids  '<|im_start|>user\nWhat is 12 + 30?\t100'
#   LlamaTokenizerFast, llama                13 ids  '<|im_start|>userWhatis12+30?100', 2 tokens added
#     the same after save_pretrained         13 ids  '<|im_start|>userWhatis12+30?100', 2 tokens added
#   PreTrainedTokenizerFast, qwen2           19 ids  '<|im_start|>user\nWhat is 12 + 30?\t100'
#   PreTrainedTokenizerFast, llama           14 ids  as tokenizers
#   LlamaTokenizerFast, llama, other folder  14 ids  as tokenizers
#   tokenizers, the saved tokenizer.json     13 ids
