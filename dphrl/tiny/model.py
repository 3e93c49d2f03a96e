"""The tiny models' tokenizer and architecture, built from nothing: no download, no data file.

One token is one word of the task's vocabulary, so that a division step or a column name is one token and a small
model can learn the task within a minute. The architecture is plain Llama with tied embeddings: whatever serves or
trains Llama-3.2-1B (vLLM, transformers, DeepSpeed) handles this model through the same code path. It is not Qwen2:
for that model type transformers 5 replaces any saved tokenizer by Qwen2's byte-level one, without a warning, and
every word would decode differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dphrl.tiny import task as factor_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, ASSISTANT_TOKEN = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "<assistant>",
)
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, ASSISTANT_TOKEN)
# A FACTOR or DIVIDE exchange is at most 27 tokens, a question and its SQL 53; the rest leaves room for a policy that
# starts to ramble.
MAX_TOKENS = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT_TOKEN + "' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT_TOKEN + "' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the network; head_dim is hidden_size / num_heads (32 by default)."""

    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 2
    num_heads: int = 4


def build_tokenizer(words: Sequence[str] = factor_task.VOCABULARY) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `words` with a chat template; text is tokens separated by single spaces.

    Decoding ids without special tokens and encoding the text again gives the same ids. Any other word becomes
    ``<unk>``. No token is added on encoding: the chat template places ``<bos>``, and
    a completion ends with ``<eos>``.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNK_TOKEN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        additional_special_tokens=[ASSISTANT_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        # Prompts of different lengths are batched for generation, which continues at the right edge.
        padding_side="left",
        # The clean-up of English spacing would turn " ?" into "?" and break the round trip.
        clean_up_tokenization_spaces=False,
    )


def build_model(shape: TinyShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A randomly initialised fp32 model on the CPU; the same seed gives the same weights.

    The global random state is left as it was. Raises ValueError when the hidden size cannot be
    split into heads of an even size.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if shape.hidden_size % (2 * shape.num_heads):
        raise ValueError(f"hidden_size {shape.hidden_size} is not a multiple of 2 x num_heads {shape.num_heads}")
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        # The small base and the biases let a head attend by position alone ("the digit under this one"), which long
        # division needs. With the usual base of 10,000, or without the biases, the same warm start ends at a third of
        # the Pass@1, or less.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attention_bias=True,
        dtype="float32",
        **special_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # top_k 0 and top_p 1 state that sampling is from the model's own distribution. Without them, a program that reads
    # this file would take the library's default, top_k 50, which truncates the distribution.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special_ids)
    return model
