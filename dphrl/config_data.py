"""What is trained on and how it is graded: the data's and the reward's part of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

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


# Which reward reads the answers of a kind of data.
REWARD_OF_KIND = {
    "tiny": "factorization",
    "tiny_sql": "sql_execution",
    "math": "math_answer",
    "text_to_sql": "sql_execution",
}


class RewardConfig(Section):
    # auto: what the kind of data.train needs. math_answer grades answers for equivalence, sql_execution queries by
    # their result; factorization grades the embedded maths task. Your own: "package.module:name" of a function,
    # coroutine function, class or Ray remote function that takes (completion, answer) and returns a bool, a number or
    # a RewardResult.
    name: str = "auto"
    # Of your own reward: keyword arguments of the class, or further ones of the function.
    params: dict[str, Any] = Field(default_factory=dict)
    # Where math_answer looks: boxed only (training default: it teaches the format), or auto as `dphrl score` does.
    extraction: Literal["boxed", "auto"] = "boxed"
    # column_overlap: a wrong query trains with the share of the gold's columns it returns; accuracy never sees it.
    shaping: Literal["none", "column_overlap"] = "none"
    # For one completion; what runs longer is killed.
    timeout_s: PositiveFloat = 10.0
    # Address space of a child process that grades; a completion that needs more is a resource_limit.
    memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2 * 2**30
    num_workers: PositiveInt = 1
    # Below 1 because a worker sleeps while engines decode; Ray packs by this number, it does not enforce it.
    cpus_per_worker: PositiveFloat = 0.25
    # An infrastructure error (a dead worker) is tried again this often, then excluded from the advantage.
    num_retries: NonNegativeInt = 2

    @property
    def is_custom(self) -> bool:
        return ":" in self.name

    def for_kind(self, kind: str) -> RewardConfig:
        """This with `auto` resolved for data of `kind`. Raises ValueError for a reward that cannot grade it."""
        needed = REWARD_OF_KIND[kind]
        if self.name == "auto":
            return RewardConfig.model_validate(self.model_dump() | {"name": needed})
        if self.name != needed and not self.is_custom:
            raise ValueError(
                f"reward.name={self.name} cannot grade data of kind {kind}; set reward.name: {needed}, or name your "
                "own (module:name)"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_the_reward(self) -> Self:
        if self.params and not self.is_custom:
            raise ValueError(f"params: {self.name} takes none; remove them, or name your own reward (module:name)")
        if self.shaping != "none" and self.name not in ("auto", "sql_execution"):
            raise ValueError(f"shaping={self.shaping} is for sql_execution, not {self.name}; set shaping: none")
        return self
