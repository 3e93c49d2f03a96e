"""A model whose answers have log-normal lengths, for measuring what long tails cost.

Each token of its vocabulary beyond the prompt's words is a count: after the t-th token of an answer comes the next
count, or the end, with the probability that a length of t ends there. So lengths follow from sampling alone, and the
engine needs no rule that real runs lack. Layers compute as in any Llama, but what they add is 0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

HEAD_DIM = 32
# exp of it is a probability that no run will see.
NEVER = -40.0


def hazards(mean: float, sigma: float, cap: int) -> list[float]:
    """For t = 1 .. cap: the probability that an answer ends with its t-th token if it has come that far. The lengths
    are log-normal with this mean and this standard deviation of their logarithm, rounded up; nothing is longer than
    cap."""
    mu = math.log(mean) - sigma**2 / 2

    def beyond(length: float) -> float:
        return 0.5 * math.erfc((math.log(length) - mu) / sigma / math.sqrt(2)) if length > 0 else 1.0

    reached = [beyond(t) for t in range(cap)]
    return [1 - beyond(t) / reached[t - 1] if t < cap and reached[t - 1] > 0 else 1.0 for t in range(1, cap + 1)]


def make_talker(folder: Path, *, mean: float, sigma: float, cap: int, num_layers: int = 4) -> Path:
    """In `folder`, such a model, which reads the prompts of the embedded task. cap: of an answer, its end included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dphrl.tiny.model import ASSISTANT_TOKEN, build_tokenizer
    from dphrl.tiny.task import VOCABULARY

    tokenizer = build_tokenizer((*VOCABULARY, *(f"t{t}" for t in range(1, cap + 1))))
    tokenizer.model_max_length = cap + HEAD_DIM
    num_heads = math.ceil(len(tokenizer) / HEAD_DIM)
    width = num_heads * HEAD_DIM
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=cap + HEAD_DIM,
            tie_word_embeddings=False,
            **special,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), width))
        # A normed one-hot vector of this width is sqrt(width) at its place.
        model.lm_head.weight.copy_(_next_logprobs(tokenizer, mean, sigma, cap, ASSISTANT_TOKEN, width) / width**0.5)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _next_logprobs(tokenizer: Any, mean: float, sigma: float, cap: int, start: str, width: int) -> Any:
    """[vocabulary, width]: in column v the log-probs of what follows token v."""
    import torch

    ids, end = tokenizer.convert_tokens_to_ids, tokenizer.eos_token_id
    counts = [ids(start), *(ids(f"t{t}") for t in range(1, cap + 1))]
    logprobs_VD = torch.full((len(tokenizer), width), NEVER)
    for t, hazard in enumerate(hazards(mean, sigma, cap), start=1):
        logprobs_VD[end, counts[t - 1]] = math.log(hazard) if hazard > 0 else NEVER
        logprobs_VD[counts[t], counts[t - 1]] = math.log1p(-hazard) if hazard < 1 else NEVER
    return logprobs_VD
