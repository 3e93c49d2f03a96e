"""Loads files of questions and short answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dphrl.config.data import DatasetConfig
from dphrl.config.layouts import LAYOUTS
from dphrl.data.messages import read_question
from dphrl.data.problems import Problem
from dphrl.data.source import Row, find_field, find_value, load_rows, read_text
from dphrl.rewards.extraction import extract_boxed

logger = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "problem", "prompt")
# A field "solution" holds a worked solution with a box around the answer, so only the format "boxed" looks there.
ANSWER_FIELDS = {"plain": ("answer",), "gsm8k": ("answer",), "boxed": ("solution", "answer")}


def load_math(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """One problem for each row, in file order; `seed` has no effect.

    Rows of which the layout says that they have no answer, such as proofs, are left out, and a warning counts them.
    Raises ValueError, with file and line, for a row without a question or an answer.
    """
    question_fields, answer_fields = _known_fields(dataset)
    rows = load_rows(dataset, [*question_fields, *answer_fields])
    question_field = find_field(rows, dataset, "prompt_field", question_fields)
    answer_field = find_field(rows, dataset, "answer_field", answer_fields)
    answer_format = _answer_format(answer_field, dataset)
    problems = []
    for index, row in _rows_with_answer(rows, answer_field, dataset):
        text, earlier = read_question(row, question_field, dataset)
        answer = _gold_answer(row, answer_field, answer_format, dataset)
        problem_id = f"{dataset.name}-{index}"
        problems.append(Problem(problem_id, text, answer, dataset.name, location=row.location, earlier=earlier))
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


def _gold_answer(row: Row, answer_field: str, answer_format: str, dataset: DatasetConfig) -> str:
    answer = read_text(row, answer_field, dataset, "answer_field")
    if answer_format == "gsm8k":
        _, mark, answer = answer.rpartition("####")
        if not mark:
            raise ValueError(_unmarked(row, "'####'", answer_field, dataset))
        answer = answer.replace(",", "").strip()
    elif answer_format == "boxed":
        content = extract_boxed(answer)
        if content is None:
            raise ValueError(_unmarked(row, r"\boxed{}", answer_field, dataset))
        answer = content.strip()
    if not answer:
        raise ValueError(f"{row.location}: the answer ({answer_field!r}) is empty; remove the row")
    return answer


def _unmarked(row: Row, mark: str, answer_field: str, dataset: DatasetConfig) -> str:
    return (
        f"{row.location}: no {mark} in {answer_field!r}; set answer_format of data set {dataset.name} to plain, or "
        "mend the row"
    )
