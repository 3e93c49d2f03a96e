"""Data sets that many people have, by name: which of their fields holds what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LayoutName = Literal["gsm8k", "math", "verl", "dapo", "numina", "openr1", "spider", "bird"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of a data set as it is distributed; a dotted name leads into a struct.

    prompt: holds the question, as text or as chat messages.
    answers: each a field and the format of the answer in it. The first whose field the rows have is taken.
    signature: the fields by which a file of this layout is known.
    mark: what the answer's field holds besides, where the fields do not tell it from other files.
    no_answer: what the answer's field holds in rows that have no answer, such as proofs.
    """

    kind: str
    prompt: str
    answers: tuple[tuple[str, str], ...]
    signature: frozenset[str]
    mark: str = ""
    no_answer: frozenset[str] = frozenset()
    convention: str = "bird"

    @property
    def answer_fields(self) -> tuple[str, ...]:
        return tuple(field for field, _ in self.answers)


_VERL_ANSWER = (("reward_model.ground_truth", "plain"),)
_NO_ANSWER = frozenset({"proof", "notfound"})

# From the most particular to the most general: `resembles` takes the first that fits.
LAYOUTS: Mapping[str, Layout] = {
    "dapo": Layout(
        "math", "prompt", (*_VERL_ANSWER, ("solution", "plain")), frozenset({"prompt", "solution", "source_prompt"})
    ),
    "verl": Layout("math", "prompt", _VERL_ANSWER, frozenset({"prompt", "reward_model"})),
    "openr1": Layout(
        "math", "problem", (("answer", "plain"),), frozenset({"problem", "generations"}), no_answer=_NO_ANSWER
    ),
    "numina": Layout(
        "math",
        "problem",
        (("answer", "plain"), ("solution", "boxed")),
        frozenset({"problem", "solution", "source"}),
        no_answer=_NO_ANSWER,
    ),
    # MATH-500 adds a field with the answer alone.
    "math": Layout("math", "problem", (("answer", "plain"), ("solution", "boxed")), frozenset({"problem", "solution"})),
    "bird": Layout("text_to_sql", "question", (("SQL", "plain"),), frozenset({"question", "SQL", "db_id"})),
    "spider": Layout(
        "text_to_sql",
        "question",
        (("query", "plain"),),
        frozenset({"question", "query", "db_id"}),
        convention="spider",
    ),
    "gsm8k": Layout("math", "question", (("answer", "gsm8k"),), frozenset({"question", "answer"}), mark="####"),
}


def resembles(row: Mapping[str, object]) -> str | None:
    """The name of the layout that the fields of a row look like, None if of no one."""
    for name, layout in LAYOUTS.items():
        if layout.signature <= row.keys() and layout.mark in str(row.get(layout.answers[0][0])):
            return name
    return None
