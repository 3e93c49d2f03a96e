"""What is trained on and how it is graded: the data's and the reward's part of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from dphrl.config_algorithm import NonNegativeInt, PositiveFloat, PositiveInt, Section


class DatasetConfig(Section):
    # How results name it: eval tables, sample files.
    name: str
    # tiny: the embedded procedural task; math: rows of question and answer.
    kind: Literal["tiny", "math"] = "math"
    # A .jsonl or .parquet file or a hub data set; $VARIABLES are expanded. Unused by the tiny task.
    path: str = ""
    split: str = "train"
    prompt_field: str = "question"
    answer_field: str = "answer"
    # gsm8k: the gold answer is what follows "####"; plain: the field is the answer.
    answer_format: Literal["plain", "gsm8k"] = "plain"
    # Take this many rows (tiny: make this many); null takes all.
    limit: PositiveInt | None = None


class DataConfig(Section):
    train: DatasetConfig
    # The first is the in-domain one that the final table leads with.
    evaluation: tuple[DatasetConfig, ...] = ()
    system_prompt: str = ""
    # How a question becomes the user's message; must contain {question}.
    prompt_template: str = "{question}"
    # Longer prompts are dropped and counted: a truncated problem has no right answer.
    max_prompt_tokens: PositiveInt = 1024

    @model_validator(mode="after")
    def _template_has_question(self) -> Self:
        if "{question}" not in self.prompt_template:
            raise ValueError(f"prompt_template: {self.prompt_template!r} lacks {{question}}; add it")
        names = [dataset.name for dataset in self.evaluation]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation: names {names} repeat; give each data set its own name")
        return self


class RewardConfig(Section):
    # math_answer grades \boxed{} answers for equivalence; factorization grades the embedded task.
    name: Literal["math_answer", "factorization"] = "math_answer"
    # Where math_answer looks: boxed only (training default: it teaches the format), or auto as `dphrl score` does.
    extraction: Literal["boxed", "auto"] = "boxed"
    timeout_s: PositiveFloat = 10.0
    num_workers: PositiveInt = 1
    # Below 1 because a worker sleeps while engines decode; Ray packs by this number, it does not enforce it.
    cpus_per_worker: PositiveFloat = 0.25
    # An infrastructure error (a dead worker) is tried again this often, then excluded from the advantage.
    num_retries: NonNegativeInt = 2
