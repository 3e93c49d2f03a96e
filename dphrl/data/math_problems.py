"""Problems with a gold answer: the embedded task, and files of questions and answers."""

from __future__ import annotations

from dataclasses import dataclass

from dphrl.config_data import DatasetConfig
from dphrl.data.source import Row, load_rows


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its gold answer.

    problem_id: "<data set>-<row>", unique within a data set because rows are numbered (from 0).
    answer: never empty; only the reward interprets it.
    """

    problem_id: str
    text: str
    answer: str
    dataset: str


def load_problems(dataset: DatasetConfig, seed: int) -> list[Problem]:
    """All problems of a data set, in file order. `seed` draws the tiny task's numbers, nothing else.

    Raises ValueError, with file and line, for a row that has no question or no answer.
    """
    return _LOADERS[dataset.kind](dataset, seed)


def _load_tiny(dataset: DatasetConfig, seed: int) -> list[Problem]:
    from dphrl.tiny.task import MAX_PROBLEMS, SPLITS, make_problems

    if dataset.split not in SPLITS:
        raise ValueError(
            f"data set {dataset.name}: split {dataset.split!r} is unknown to the tiny task; set split to "
            f"{', '.join(SPLITS)}"
        )
    count = MAX_PROBLEMS[dataset.split] if dataset.limit is None else dataset.limit
    try:
        problems = make_problems(dataset.split, count, seed)
    except ValueError as error:
        raise ValueError(f"data set {dataset.name}: {error}; set its limit") from error
    return [
        Problem(f"{dataset.name}-{row}", problem.question, problem.answer, dataset.name)
        for row, problem in enumerate(problems)
    ]


def _load_math(dataset: DatasetConfig, seed: int) -> list[Problem]:
    problems = []
    for index, row in enumerate(load_rows(dataset)):
        text = _as_text(row.fields[dataset.prompt_field])
        if not text:
            raise ValueError(f"{row.location}: the question ({dataset.prompt_field!r}) is empty; remove the row")
        problems.append(Problem(f"{dataset.name}-{index}", text, _gold_answer(row, dataset), dataset.name))
    return problems


def _gold_answer(row: Row, dataset: DatasetConfig) -> str:
    answer = _as_text(row.fields[dataset.answer_field])
    if dataset.answer_format == "gsm8k":
        _, mark, answer = answer.rpartition("####")
        if not mark:
            raise ValueError(
                f"{row.location}: no '####' in {dataset.answer_field!r}; set answer_format of data set "
                f"{dataset.name} to plain, or mend the row"
            )
        answer = answer.replace(",", "").strip()
    if not answer:
        raise ValueError(f"{row.location}: the answer ({dataset.answer_field!r}) is empty; remove the row")
    return answer


def _as_text(value: object) -> str:
    if value is None:
        return ""
    # JSON has one number type: a data set that writes the answer 145 as 145.0 means the integer.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


_LOADERS = {"tiny": _load_tiny, "math": _load_math}
