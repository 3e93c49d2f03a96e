"""Loads files of questions and short answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dphrl.config.data import DatasetConfig
from dphrl.config.layouts import LAYOUTS
from dphrl.data.messages import read_question
from dphrl.data.problems import Fault, Problem
from dphrl.data.source import Row, find_field, find_value, load_rows, read_text
from dphrl.rewards.extraction import extract_boxed

logger = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "problem", "prompt")
# A field "solution" holds a worked solution with a box around the answer, so only the format "boxed" looks there.
ANSWER_FIELDS = {"plain": ("answer",), "gsm8k": ("answer",), "boxed": ("solution", "answer")}


def load_math(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """One problem for each row, in file order; `seed` has no effect.

    Rows of which the layout says that they have no answer, such as proofs, are left out, and a warning counts them. A
    row without a gold has a fault or an empty answer. Raises ValueError, with file and line, for a row without a
    question, or with an answer that is neither text nor a number.
    """
    question_fields, answer_fields = _known_fields(dataset)
    rows = load_rows(dataset, [*question_fields, *answer_fields])
    question_field = find_field(rows, dataset, "prompt_field", question_fields)
    answer_field = find_field(rows, dataset, "answer_field", answer_fields)
    answer_format = _answer_format(answer_field, dataset)
    problems = []
    for index, row in _rows_with_answer(rows, answer_field, dataset):
        text, earlier = read_question(row, question_field, dataset)
        answer, fault = _gold_answer(row, answer_field, answer_format, dataset)
        problems.append(
            Problem(
                *(f"{dataset.name}-{index}", text, answer, dataset.name),
                location=row.location,
                earlier=earlier,
                fault=fault,
            )
        )
    return problems


def _known_fields(dataset: DatasetConfig) -> tuple[Sequence[str], Sequence[str]]:
    """Where questions and answers may be, unless the data set's own settings name the fields."""
    if dataset.layout is None:
        return QUESTION_FIELDS, ANSWER_FIELDS[dataset.answer_format or "plain"]
    layout = LAYOUTS[dataset.layout]
    fitting = [field for field, answer_format in layout.answers if dataset.answer_format in (None, answer_format)]
    return (layout.prompt,), fitting or layout.answer_fields


def _answer_format(answer_field: str, dataset: DatasetConfig) -> str:
    of_layout = dict(LAYOUTS[dataset.layout].answers) if dataset.layout else {}
    return dataset.answer_format or of_layout.get(answer_field, "plain")


def _rows_with_answer(rows: Sequence[Row], answer_field: str, dataset: DatasetConfig) -> list[tuple[int, Row]]:
    no_answer = LAYOUTS[dataset.layout].no_answer if dataset.layout else frozenset()
    kept = [
        (index, row)
        for index, row in enumerate(rows)
        if not no_answer or str(find_value(row.fields, answer_field)).strip().casefold() not in no_answer
    ]
    if len(kept) < len(rows):
        said = " or ".join(sorted(no_answer))
        logger.warning(
            "Data set %s: %d of %d rows left out, their answer is %s",
            dataset.name,
            len(rows) - len(kept),
            len(rows),
            said,
        )
    if not kept:
        raise ValueError(f"data set {dataset.name}: none of its {len(rows)} rows has an answer ({answer_field!r})")
    return kept


def _gold_answer(row: Row, answer_field: str, answer_format: str, dataset: DatasetConfig) -> tuple[str, Fault | None]:
    """The gold, or the whole field and why the gold is not in it."""
    value = find_value(row.fields, answer_field)
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value == []:
        return "", None
    # NaN, which pandas writes for an empty cell in a column of numbers, is the one value that differs from itself.
    text = "nan" if value != value else read_text(row, answer_field, dataset, "answer_field", structs=True)
    if answer_format == "plain" or not text:
        return text, None
    if answer_format == "gsm8k":
        _, mark, answer = text.rpartition("####")
        answer = answer.replace(",", "").strip()
        return (answer, None) if mark else (text, _unmarked("####", answer_field))
    content = extract_boxed(text)
    return (text, _unmarked(r"\boxed{}", answer_field)) if content is None else (content.strip(), None)


def _unmarked(mark: str, answer_field: str) -> Fault:
    return Fault(f"no {mark} in {answer_field!r}", "set answer_format: plain, or mend the rows")
