"""What is trained on and how it is graded: the data's and the reward's part of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dphrl.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


def _values_by_field(filters: dict[str, Any]) -> dict[str, Any]:
    for field, wanted in filters.items():
        for value in wanted if isinstance(wanted, list | tuple) else [wanted]:
            if isinstance(value, dict | list | tuple):
                raise ValueError(f"{field}: expected a value or a list of values (got {wanted!r})")
    return {field: tuple(wanted) if isinstance(wanted, list) else wanted for field, wanted in filters.items()}


# A field's name to the value it should have, or to a list of such values.
RowFilter = Annotated[dict[str, Any], AfterValidator(_values_by_field)]

DEFAULT_TEMPLATE = "{question}"
# The last sentence asks for reasoning first: a policy that may think before it writes leaves more to reinforce.
DEFAULT_SQL_TEMPLATE = """\
Write one SQLite query that answers the question about the database below.

Database schema:
{schema}

Question: {question}
External knowledge: {evidence}

Return exactly the columns the question asks for, in the order in which it names them, and nothing else.
Think step by step, then give the query in a ```sql block."""


class DatasetConfig(Section):
    # How results name it: eval tables, sample files.
    name: str
    # tiny, tiny_sql, arithmetic: the embedded procedural tasks; math: rows of question and answer; text_to_sql: rows
    # of question, database and gold query (Spider's and BIRD's files as they are distributed, or your own).
    kind: Literal["tiny", "tiny_sql", "arithmetic", "math", "text_to_sql"] = "math"
    # A .jsonl, .json (an array) or .parquet file or a hub data set; $VARIABLES are expanded. Unused by the tiny task.
    path: str = ""
    split: str = "train"
    # The row's fields; null takes the first usual name that the first row has, such as question and answer, problem
    # and solution, or for text_to_sql question and gold_sql, query or SQL.
    prompt_field: str | None = None
    answer_field: str | None = None
    # gsm8k: the gold answer is what follows "####"; boxed: the last \boxed{} of a worked solution; plain: the field
    # is the answer.
    answer_format: Literal["plain", "gsm8k", "boxed"] = "plain"
    # Only rows whose field has this value (or one of a list); several fields must all agree.
    where: RowFilter = Field(default_factory=dict)
    # Not the rows of which any field named here has this value (or one of a list).
    exclude_where: RowFilter = Field(default_factory=dict)
    # Draw the order of rows by this seed instead of the file's, which is often sorted; null keeps the file's.
    shuffle_seed: NonNegativeInt | None = None
    # Take this many rows, after where and exclude_where (tiny: make this many); null takes all.
    limit: PositiveInt | None = None

    # The rest is text_to_sql's. Folder of <db>/<db>.sqlite or <db>.sqlite; null: the usual one beside the file
    # (database, dev_databases, train_databases, dbs).
    databases: str | None = None
    database_field: str | None = None
    evidence_field: str | None = None
    # How results are compared. bird: as sets of rows; spider: as bags, columns in any order, rows in order where
    # the gold query orders them.
    convention: Literal["bird", "spider"] = "bird"
    # Rows of every table that the prompt shows: what values look like decides many a WHERE.
    num_sample_rows: NonNegativeInt = 3
    # A longer schema is trimmed by relevance to the question; null leaves that to data.max_prompt_tokens.
    max_schema_tokens: PositiveInt | None = None
    # A gold query that does not run, or has no database: stop and name the rows, or drop and count them.
    invalid_gold: Literal["error", "drop"] = "error"


class DataConfig(Section):
    train: DatasetConfig
    # The first is the in-domain one that the final table leads with.
    evaluation: tuple[DatasetConfig, ...] = ()
    system_prompt: str = ""
    # How a question becomes the user's message; must contain {question}, for text_to_sql {schema} too, and may contain
    # {evidence}: a line with that alone goes where a row has none. null: the bare question, or a plain instruction
    # for text_to_sql.
    prompt_template: str | None = None
    # Longer prompts are dropped and counted: a truncated problem has no right answer. A schema is trimmed to fit first.
    max_prompt_tokens: PositiveInt = 1024

    def template_for(self, kind: str) -> str:
        if self.prompt_template is not None:
            return self.prompt_template
        return DEFAULT_SQL_TEMPLATE if kind == "text_to_sql" else DEFAULT_TEMPLATE

    @model_validator(mode="after")
    def _template_fits_the_data(self) -> Self:
        template = self.prompt_template
        if template is not None:
            if "{question}" not in template:
                raise ValueError(f"prompt_template: {template!r} lacks {{question}}; add it")
            for dataset in (self.train, *self.evaluation):
                self._check_schema(template, dataset)
        names = [dataset.name for dataset in self.evaluation]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation: names {names} repeat; give each data set its own name")
        return self

    def _check_schema(self, template: str, dataset: DatasetConfig) -> None:
        if dataset.kind == "text_to_sql" and "{schema}" not in template:
            raise ValueError(
                f"prompt_template: {template!r} lacks {{schema}}, which {dataset.name} (text_to_sql) needs; add it, "
                "or set prompt_template: null"
            )
        if dataset.kind != "text_to_sql" and ("{schema}" in template or "{evidence}" in template):
            raise ValueError(
                f"prompt_template: {template!r} asks for a schema or evidence, which {dataset.name} ({dataset.kind}) "
                "has not; set prompt_template: null, which suits every kind"
            )


# Which reward reads the answers of a kind of data.
REWARD_OF_KIND = {
    "tiny": "factorization",
    "tiny_sql": "sql_execution",
    "arithmetic": "math_answer",
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
