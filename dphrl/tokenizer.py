"""A model's own tokenizer: what its tokenizer.json says, whatever class the model's configuration names for it.

Where tokenizer_config.json or the model's type names a special class, transformers 5 takes only vocabulary and merges
from tokenizer.json, and replaces the file's rules for splitting text by those of the class. A ChatML model marked
LlamaTokenizerFast then loses every blank and newline of its prompts, without a warning. The generic class reads the
whole file. Everything here uses it, and the library tokenizers itself says whether the result is right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dphrl.model_files import find_file

logger = logging.getLogger(__name__)

# The rules of some family read each of these in their own way: runs of blanks, tabs and line ends, digits one by one or
# in threes, contractions, letters with a combining accent (which NFC joins), full-width digits, scripts without blanks,
# and the symbol that stands for a blank.
PROBE = (
    " What  is 1234567 + 30?\n\n\n\tif x:\r\n        return 'a  b'   # isn't IT'S\n \n"
    "e\u0301 é ½ ² ﬁ \uff11\uff12 日本語 привет \u00a0\u200b 🙂 \u2581_ <|x|> [y] \\frac{1}{2} 3.14 -7e5 !!??  "
)
# As many added tokens as are tried between words; a tokenizer can have thousands of them.
_MAX_PROBED_TOKENS = 64


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a resolved model, with a pad token; it encodes and decodes as the model's tokenizer.json does.

    A model without tokenizer.json, or whose tokenizer is code of its own, gets what AutoTokenizer makes of its files:
    there is nothing to compare it with. Logs a warning when AutoTokenizer, and so other programs, would encode
    otherwise. Raises ValueError when there is no tokenizer to load, or none that follows the file.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        file = find_file(path, "tokenizer.json")
        own = Tokenizer.from_file(str(file)) if file and _is_librarys(tokenizer) else None
        faithful = tokenizer if own is None else PreTrainedTokenizerFast.from_pretrained(str(path))
    # tokenizers raises bare Exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason = "it is code of the model's own; set model.trust_remote_code: true if you vouch for that"
        raise ValueError(f"model.path: no tokenizer could be loaded from {str(path)!r}: {reason}") from error
    if own is None and not tokenizer.encode(PROBE, add_special_tokens=False):
        # Without any file, some classes of transformers make a tokenizer of no tokens, and every prompt would be empty.
        raise ValueError(
            f"model.path: {str(path)!r} holds no vocabulary, so that any text has no tokens; put the files of the "
            "model's tokenizer there, such as tokenizer.json and tokenizer_config.json"
        )
    if own is not None:
        # For the file itself, length and padding are the caller's affair, as they are for transformers.
        own.no_truncation()
        own.no_padding()
        _adopt_special_tokens(faithful, tokenizer, own)
        _drop_tokens_without_place(faithful, own, path)
        # transformers may remove blanks before punctuation when it decodes. A reward must see what was sampled.
        faithful.clean_up_tokenization_spaces = False
        _check(path, tokenizer, faithful, own)
    if faithful.pad_token_id is None or (own is not None and own.token_to_id(faithful.pad_token) is None):
        # Generation needs an id to pad a batch with, for which the model has an embedding: a token that only the
        # configuration names has none. The attention mask, not this id, says which positions count.
        faithful.pad_token = faithful.eos_token
    return faithful


def first_difference(tokenizer: Any, own: Any) -> str | None:
    """The first of the probe texts that `tokenizer` (of transformers) encodes or decodes differently from `own` (of
    tokenizers); None when they agree on all."""
    return next((text for text in _probes(tokenizer, own) if not _agree_on(text, tokenizer, own)), None)


def _agree_on(text: str, tokenizer: Any, own: Any) -> bool:
    try:
        for special in (True, False):
            token_ids = own.encode(text, add_special_tokens=special).ids
            if list(tokenizer.encode(text, add_special_tokens=special)) != token_ids:
                return False
        return bool(tokenizer.decode(token_ids) == own.decode(token_ids, skip_special_tokens=False))
    # A class may put a model into the tokenizer that the vocabulary is none of. tokenizers raises bare Exceptions.
    except Exception as error:
        logger.debug("%s fails on a probe: %s", type(tokenizer).__name__, error)
        return False


def _probes(tokenizer: Any, own: Any) -> Iterator[str]:
    yield PROBE
    added = [token.content for _, token in sorted(own.get_added_tokens_decoder().items())][:_MAX_PROBED_TOKENS]
    yield "".join(f"{token}a {token} b\n{token}\n" for token in added)
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": PROBE}]
        try:
            yield tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # A template may refuse a message for reasons of its own; the real prompts will tell.
        except Exception as error:
            logger.debug("no probe of the chat template: %s", error)


def _check(path: Path | str, tokenizer: Any, faithful: Any, own: Any) -> None:
    """Warn when AutoTokenizer's `tokenizer` differs from the file; raise ValueError when `faithful` does."""
    if (text := first_difference(faithful, own)) is not None:
        raise ValueError(
            f"model.path: with the tokenizer_config.json of {str(path)!r}, transformers encodes or decodes "
            f"{text[:40]!r} otherwise than its tokenizer.json says; make the special tokens of the two files the same"
        )
    if first_difference(tokenizer, own) is not None:
        logger.warning(
            "model.path: AutoTokenizer makes a %s of %s, which encodes text in another way than the model's own "
            "tokenizer.json. dphrl follows the file; other programs that load the model or an export of it may not",
            type(tokenizer).__name__,
            path,
        )


def _adopt_special_tokens(faithful: Any, tokenizer: Any, own: Any) -> None:
    """Take over special tokens that only a class names: GPT-2's own files do not say which token ends a text."""
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(tokenizer, name, None)
        if getattr(faithful, name, None) is None and token is not None and own.token_to_id(str(token)) is not None:
            setattr(faithful, name, token)


def _drop_tokens_without_place(faithful: Any, own: Any, path: Path | str) -> None:
    """Take away the tokens that tokenizer_config.json alone names, and the special treatment that it alone gives.

    transformers adds such tokens behind the vocabulary, with ids for which the model need not have an embedding: a
    question that spells one out would end the run. And it leaves tokens out of decoded text that a reward must see.
    """
    of_file = {i: token.special for i, token in own.get_added_tokens_decoder().items()}
    # A vocabulary may hold the token that ends a text as a word like any other. Its name makes it special all the same.
    named = {own.token_to_id(token): token for token in faithful.special_tokens_map.values() if isinstance(token, str)}
    unmarked = {i: token for i, token in named.items() if i is not None and i not in of_file}
    added = faithful.backend_tokenizer.get_added_tokens_decoder()
    if {i: token.special for i, token in added.items()} == of_file | dict.fromkeys(unmarked, True):
        return
    faithful._tokenizer = own.from_str(own.to_str())
    faithful._tokenizer.add_special_tokens([*unmarked.values()])
    for name in faithful.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(faithful, name, None)
        # The caller replaces a pad token.
        if name != "pad_token" and token is not None and own.token_to_id(str(token)) is None:
            logger.warning(
                "model.path: the %s of tokenizer_config.json, %s, is not in tokenizer.json of %s, so it is left out",
                name,
                token,
                path,
            )
            setattr(faithful, name, None)
    extra = [token for token in faithful.extra_special_tokens if own.token_to_id(str(token)) is not None]
    faithful.extra_special_tokens = extra


def _is_librarys(tokenizer: Any) -> bool:
    """Whether its class comes with transformers; a model's own code may differ from tokenizer.json on purpose."""
    return type(tokenizer).__module__.startswith("transformers.")
