#!/usr/bin/env bash
# transformers 5.19.0 with torch 2.13.0: generate() mixes a model's own generation settings into the ones that it is given.
#
# A small model, whose generation_config.json has what that of Qwen2.5-Instruct has (repetition_penalty, top_p, top_k and
# temperature) and in one case min_p, generates from a GenerationConfig that asks for plain sampling: do_sample,
# temperature 1, top_k 0, top_p 1.
# One would expect: the given configuration is the whole of it, so the first sampled token follows softmax(logits).
# Seen: each setting that the given configuration leaves open is taken from the model's own. The processed scores of the
# first token are those with the repetition penalty, or with min_p's cut. Nothing is logged. A penalty applies to greedy
# decoding too. Settings that are given, such as top_p, are kept. With the model's generation_config replaced by an empty
# one, the scores are the log-probabilities of the model.
#
# Why it matters: a policy gradient is computed for the distribution that was sampled. Completions that were sampled under
# a penalty come from another one, and the ratio of the two is no longer 1 at the start. Rewards and the split into solved
# and unsolved prompts are of the penalised model. vLLM with explicit SamplingParams does not do it, so the same model has
# two Pass@k. dphrl's inline mode empties the model's generation configuration, but for its end tokens.
#
# Needs Python 3.11 and a package index; some minutes.
# Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.19.0 torch==2.13.0
cat >"$work/program.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

QWEN = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": 2}
PROMPT = torch.tensor([[1, 5, 9, 3, 7, 11]])
shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).save_pretrained("model")


def off_by(label, own, emptied=False, **asked):
    """How far the scores that generate() samples from are from the model's, in log-probability."""
    Path("model/generation_config.json").write_text(json.dumps(own))
    model = AutoModelForCausalLM.from_pretrained("model")
    if emptied:
        model.generation_config = GenerationConfig()
    given = GenerationConfig(
        max_new_tokens=1, eos_token_id=2, pad_token_id=0, output_scores=True, return_dict_in_generate=True, **asked
    )
    scores = model.generate(PROMPT, generation_config=given, attention_mask=torch.ones_like(PROMPT)).scores[0]
    with torch.no_grad():
        logits = model(PROMPT).logits[:, -1]
    gap = (scores.log_softmax(-1) - logits.log_softmax(-1)).abs()
    num_cut = int(torch.isinf(gap).sum())
    largest = float(gap[~torch.isinf(gap)].max())
    print(f"RESULT {label:44} off by up to {largest:.3f}, {num_cut} of 64 tokens cut away")
    return largest > 1e-3, num_cut > 0


PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
seen = [
    off_by("no settings of its own", {"eos_token_id": 2}, **PLAIN),
    off_by("those of Qwen2.5-Instruct", QWEN, **PLAIN),
    off_by("those of Qwen2.5-Instruct, greedy", QWEN, do_sample=False),
    off_by("min_p", {"eos_token_id": 2, "min_p": 0.1}, **PLAIN),
    off_by("those of Qwen2.5-Instruct, emptied in memory", QWEN, emptied=True, **PLAIN),
]
expected = [(False, False), (True, False), (True, False), (True, True), (False, False)]
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
#   no settings of its own                       off by up to 0.000, 0 of 64 tokens cut away
#   those of Qwen2.5-Instruct                    off by up to 0.324, 0 of 64 tokens cut away
#   those of Qwen2.5-Instruct, greedy            off by up to 0.324, 0 of 64 tokens cut away
#   min_p                                        off by up to 0.217, 59 of 64 tokens cut away
#   those of Qwen2.5-Instruct, emptied in memory off by up to 0.000, 0 of 64 tokens cut away
