"""What a completion says: its own turn without its thoughts, and what it puts into tags. Mathematics and SQL share it.

Every search takes time linear in the text, because completions of several megabytes are graded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Pairs of the mark that opens a thought and the one that closes it.
Marks = tuple[tuple[str, str], ...]

# The detail of a verdict on a completion that is nothing but thoughts.
UNFINISHED = "the thinking never ends, so there is no answer"
# A model that writes on after its turn invents the next speaker; what that speaker says is not the model's answer.
_CHAT_MARKER = re.compile(
    r"<(?:\|(?:im_start|im_end|endoftext|eot_id|eom_id|eot|start_header_id|end_of_text|return|user)\|>|/s>"
    r"|(?:end|start)_of_turn>|turn\|>|\uff5c(?:end\u2581of\u2581sentence|User)\uff5c>)"
)
# This one also stands between the channels of one turn, so it ends only what is said.
_MESSAGE_END = "<|end|>"
# A mark between quotes or braces, or before the word "tag", is mentioned, not used.
_QUOTES = {"`": "`", '"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "{": "}"}
_CALLED_A_TAG = re.compile(r"[ ](?:tag|token|marker|block|section)s?\b")
_FENCES = ("```", "~~~")
_CLOSES = re.compile(r"</|<\|end_")
# No template writes more than this after the mark that opens a thought.
_MAX_AFTER_OPENING = 20


def spoken(text: str, marks: Marks) -> str | None:
    """The completion's own turn without its thoughts; None when its thinking never ends.

    The turn ends at a chat marker. A thought goes from a mark that opens it to the next mark that closes it, whatever
    stands between them. What comes before a closing mark that nothing opened is a thought too, because many chat
    templates write the opening mark into the prompt. A mark that is only mentioned (in quotes, before the word "tag",
    or never closed inside a block of code) opens and closes nothing. Letter case of the marks does not matter.

    A completion that neither opens nor closes a thought is taken as it is. If the prompt opened one, put the mark in
    front of the text: `opened_by` finds it.
    """
    marker = _CHAT_MARKER.search(text) if "<" in text else None
    text = text[: marker.start()] if marker else text
    said = _without_thoughts(text, _compiled(marks))
    return said.partition(_MESSAGE_END)[0] if said else said


def _without_thoughts(text: str, known: _Known) -> str | None:
    if not known.occur_in(text):
        return text
    # Plain numbers and texts are kept, because the garbage collector would visit a million match objects many times.
    marks = known.all_marks.finditer(text)
    found = [(*mark.span(), mark[0].lower()) for mark in marks if not _is_mentioned(text, mark)]
    last_position = {name: position for position, _, name in found}
    parts: list[str] = []
    start, closing, code = 0, "", _Code(text)
    for position, end, name in found:
        if closing:
            if name == closing:
                start, closing = end, ""
        elif name in known.closing_of:
            if last_position.get(known.closing_of[name], -1) > position:
                closing = known.closing_of[name]
                parts.append(text[start:position])
            elif not code.surrounds(start, position):
                return None
        else:
            parts.clear()
            start = end
    # A new line keeps what stood before a thought apart from what stands after it.
    return "\n".join([*parts, text[start:]])


def opened_by(prompt: str, marks: Marks) -> str:
    """The opening mark with which a prompt ends, as the chat templates of many thinking models do; "" without one."""
    end = prompt[-_MAX_AFTER_OPENING - max((len(mark) for mark, _ in marks), default=0) :].rstrip().lower()
    return next((mark for mark, _ in marks if end.endswith(mark.lower())), "")


def decoder(tokenizer: Any, marks: Marks) -> Callable[[Sequence[int]], str]:
    """From token ids to the text of a completion: without special tokens, but with those that belong to a mark.

    In some vocabularies the marks of thoughts are special tokens. If they were left out, nothing in the text would tell
    a thought from the answer.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    every = [mark for pair in marks for mark in pair]
    kept = {i: token.content for i, token in added if token.special and any(token.content in mark for mark in every)}

    def decode(token_ids: Sequence[int]) -> str:
        texts, start = [], 0
        for position, token in enumerate(token_ids if kept else ()):
            if token in kept:
                texts += [tokenizer.decode(token_ids[start:position], skip_special_tokens=True), kept[token]]
                start = position + 1
        return "".join([*texts, tokenizer.decode(token_ids[start:], skip_special_tokens=True)])

    return decode


def tagged(text: str, names: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """(end, content) of each <name>...</name> that is not blank, the last one first.

    names: a pattern that matches one tag, an opening or a closing one. A tag that is not closed extends to the next tag
    or the end of the text: an engine that stops at the closing tag leaves it out.
    """
    end = len(text)
    found = names.finditer(text) if "<" in text else ()
    tags = [(*tag.span(), _CLOSES.match(tag[0]) is not None) for tag in found if not _is_mentioned(text, tag)]
    for tag_start, tag_end, closes in reversed(tags):
        if not closes and (content := text[tag_end:end].strip()):
            yield end, content
        end = tag_start


def _is_mentioned(text: str, mark: re.Match[str]) -> bool:
    start, end = mark.span()
    quote = _QUOTES.get(text[start - 1 : start])
    is_quoted = quote is not None and text.startswith(quote, end) and not text.endswith(_FENCES, 0, start)
    return is_quoted or _CALLED_A_TAG.match(text, end) is not None


class _Code:
    """Whether a position of a text is inside a fenced block of code; positions are asked for in ascending order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._start = self._counted = 0
        self._num_fences = [0] * len(_FENCES)

    def surrounds(self, start: int, position: int) -> bool:
        """start: where the present stretch of text without thoughts begins; a fence before it counts no more."""
        if start != self._start:
            self._start = self._counted = start
            self._num_fences = [0] * len(_FENCES)
        for index, fence in enumerate(_FENCES):
            self._num_fences[index] += self._text.count(fence, self._counted, position)
        self._counted = position
        return any(number % 2 for number in self._num_fences)


@dataclass(frozen=True)
class _Known:
    """The marks of one configuration, made ready. closing_of: lower-case opening mark -> lower-case closing mark."""

    closing_of: dict[str, str]
    all_marks: re.Pattern[str]
    by_first_letter: tuple[tuple[str, re.Pattern[str]], ...]

    def occur_in(self, text: str) -> bool:
        # Most texts hold no mark. To look for a first letter by itself is many times as fast as to look for all marks.
        return any(first in text and pattern.search(text) is not None for first, pattern in self.by_first_letter)


@lru_cache(maxsize=16)
def _compiled(marks: Marks) -> _Known:
    # The longest goes first, in case one mark is the beginning of another.
    every = sorted({mark for pair in marks for mark in pair}, key=len, reverse=True)
    by_first_letter = []
    for first in sorted({letter for mark in every for letter in (mark[0].lower(), mark[0].upper())}):
        rests = "|".join(re.escape(mark[1:]) for mark in every if mark[0].lower() == first.lower())
        by_first_letter.append((first, re.compile(f"{re.escape(first)}(?i:{rests})", re.ASCII)))
    union = "|".join(pattern.pattern for _, pattern in by_first_letter) or r"(?!)"
    return _Known(
        {opening.lower(): closing.lower() for opening, closing in marks},
        re.compile(union, re.ASCII),
        tuple(by_first_letter),
    )
