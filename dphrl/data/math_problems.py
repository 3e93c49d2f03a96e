"""Loads files of questions and short answers."""

from __future__ import annotations

from dphrl.config.data import DatasetConfig
from dphrl.data.problems import Problem
from dphrl.data.source import Row, as_text, find_field, load_rows
from dphrl.rewards.extraction import extract_boxed

QUESTION_FIELDS = ("question", "problem", "prompt")
# A field "solution" holds a worked solution with a box around the answer, so only the format "boxed" looks there.
ANSWER_FIELDS = {"plain": ("answer",), "gsm8k": ("answer",), "boxed": ("solution", "answer")}


def load_math(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """One problem for each row, in file order; `seed` has no effect.

    Raises ValueError, with file and line, for a row without a question or an answer.
    """
    rows = load_rows(dataset)
    question_field = find_field(rows, dataset, "prompt_field", QUESTION_FIELDS)
    answer_field = find_field(rows, dataset, "answer_field", ANSWER_FIELDS[dataset.answer_format])
    problems = []
    for index, row in enumerate(rows):
        text = as_text(row.fields[question_field])
        if not text:
            raise ValueError(f"{row.location}: the question ({question_field!r}) is empty; remove the row")
        answer = _gold_answer(row, answer_field, dataset)
        problems.append(Problem(f"{dataset.name}-{index}", text, answer, dataset.name, location=row.location))
    return problems


def _gold_answer(row: Row, answer_field: str, dataset: DatasetConfig) -> str:
    answer = as_text(row.fields[answer_field])
    if dataset.answer_format == "gsm8k":
        _, mark, answer = answer.rpartition("####")
        if not mark:
            raise ValueError(_unmarked(row, "'####'", answer_field, dataset))
        answer = answer.replace(",", "").strip()
    elif dataset.answer_format == "boxed":
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
