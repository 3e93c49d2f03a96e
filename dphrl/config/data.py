"""What is trained on and how it is graded: the data's and the reward's part of the configuration."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dphrl.config.layouts import LAYOUTS, LayoutName
from dphrl.config.marks import THINKING_MARKS
from dphrl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ProcessCount,
    Section,
    Seed,
)

# Made by a procedure, so a layout of rows cannot be meant for them.
EMBEDDED_KINDS = ("tiny", "tiny_even", "tiny_cue", "tiny_sql", "arithmetic")
# Settings of a data set that only mean something where there are files.
_OF_FILES = ("path", "prompt_field", "answer_field", "where", "exclude_where")
# Arguments by which prompts are made; to set them would change what a prompt is.
_OWN_ARGUMENTS = (
    *("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
)


def _values_by_field(filters: dict[str, Any]) -> dict[str, Any]:
    for field, wanted in filters.items():
        for value in wanted if isinstance(wanted, list | tuple) else [wanted]:
            if isinstance(value, dict | list | tuple):
                raise ValueError(f"{field}: expected a value or a list of values (got {wanted!r})")
    return {field: tuple(wanted) if isinstance(wanted, list) else wanted for field, wanted in filters.items()}


# A field's name to the value it should have, or to a list of such values.
RowFilter = Annotated[dict[str, Any], AfterValidator(_values_by_field)]


def _free_of_own_arguments(variables: dict[str, Any]) -> dict[str, Any]:
    if taken := [name for name in variables if name in _OWN_ARGUMENTS]:
        raise ValueError(f"{taken[0]} is set by dphrl itself; remove it")
    return variables


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_free_of_own_arguments)]

# "error" is how a data set's own setting called its default before data.invalid_gold was there.
OwnInvalidGold = Annotated[
    Literal["refuse", "drop"] | None, BeforeValidator(lambda value: None if value == "error" else value)
]

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
    name: str
    """How results name the data set: evaluation tables, files of samples."""
    kind: Literal["tiny", "tiny_even", "tiny_cue", "tiny_sql", "arithmetic", "math", "text_to_sql"] = "math"
    """What the rows are. tiny, its variants tiny_even and tiny_cue, tiny_sql and arithmetic are embedded tasks, made by
    a procedure; math is rows of question and answer; text_to_sql is rows of question, database and gold query (Spider's
    and BIRD's files as they are distributed, or your own)."""
    layout: LayoutName | None = None
    """Reads a data set as it is distributed: sets kind, prompt_field, answer_field, answer_format and convention.
    gsm8k, math (also MATH-500), verl (prompts as chat messages, answers in reward_model.ground_truth), dapo
    (DAPO-Math-17k), numina (NuminaMath), openr1 (OpenR1-Math), spider or bird. A setting of your own beside it wins.
    null leaves all to the other settings."""
    path: str = ""
    """A file, a folder or a pattern of files (data/*.jsonl.gz), or a hub data set as org/name or org/name:subset.
    Files are .jsonl, .json, .csv or .tsv, plain or compressed (.gz, .zst), .parquet or .arrow. A folder is a hub data
    set that was downloaded, what save_to_disk wrote, or just files. $VARIABLES are expanded. The embedded tasks need
    none."""
    split: str = "train"
    """The split of a hub data set or a folder, or of an embedded task (train, held_out or out_of_domain). A file has
    none."""
    prompt_field: str | None = None
    """The row's field that holds the question, as text or as chat messages (a list of role and content that ends with
    the user's turn). A dotted name leads into a struct: extra_info.question, prompt.0.content. null takes the layout's,
    else the first of question, problem and prompt that the first row has."""
    answer_field: str | None = None
    """The row's field that holds the answer; a dotted name leads into a struct. null takes the layout's, else the first
    usual name that the first row has: answer, before it solution if answer_format is boxed; for text_to_sql gold_sql,
    query, SQL or sql."""
    answer_format: Literal["plain", "gsm8k", "boxed"] | None = None
    """Where the gold answer is in its field. plain: it is the whole field; gsm8k: it is what follows "####"; boxed:
    it is the last \\boxed{} of a worked solution. null is the layout's, else plain."""
    where: RowFilter = Field(default_factory=dict)
    """Only rows whose field has this value, or one of a list of values; a dotted name leads into a struct. Several
    fields must all agree; empty takes every row. A number also stands for a text that spells it."""
    exclude_where: RowFilter = Field(default_factory=dict)
    """Not the rows of which any field named here has this value, or one of a list of values. Empty excludes none."""
    shuffle_seed: Seed | None = None
    """The seed that decides the order of rows, because a file is often sorted. null keeps the file's order. With
    limit, a random part of the file is taken, for which all of it is read."""
    limit: PositiveInt | None = None
    """Take this many rows, after where and exclude_where; of an embedded task, make this many. null takes all."""
    databases: str | None = None
    """text_to_sql: the folder that holds <db>/<db>.sqlite or <db>.sqlite. null takes the usual one beside the file
    (database, dev_databases, train_databases, dbs)."""
    database_field: str | None = None
    """text_to_sql: the row's field that names its database. null takes db_id or db."""
    evidence_field: str | None = None
    """text_to_sql: the row's field with a hint for the question, BIRD's external knowledge. null takes evidence or
    external_knowledge, where there is one."""
    convention: Literal["bird", "spider"] = "bird"
    """text_to_sql: how results are compared. bird: as sets of rows; spider: as bags, columns in any order, and rows
    in order where the gold query orders them."""
    num_sample_rows: NonNegativeInt = 3
    """text_to_sql: rows of every table that the prompt shows, because what values look like decides many a WHERE. 0
    shows none; more make prompts longer."""
    max_schema_tokens: PositiveInt | None = None
    """text_to_sql: a schema of more tokens is trimmed by relevance to the question. null leaves that to
    data.max_prompt_tokens."""
    invalid_gold: OwnInvalidGold = None
    """As data.invalid_gold, for this data set alone. null takes that."""
    duplicates: Literal["drop", "keep"] | None = None
    """As data.duplicates, for this data set alone. null takes that for data.train, and keep for data.evaluation."""

    @model_validator(mode="before")
    @classmethod
    def _layout_decides(cls, given: Any) -> Any:
        name = given.get("layout") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in LAYOUTS:
            return given
        layout = LAYOUTS[name]
        if given.get("kind") in (None, *EMBEDDED_KINDS):
            given = given | {"kind": layout.kind}
        return {"convention": layout.convention} | given

    @model_validator(mode="after")
    def _kind_fits_the_layout(self) -> Self:
        if self.layout is not None and self.kind != LAYOUTS[self.layout].kind:
            raise ValueError(
                f"kind: {self.kind} does not go with layout: {self.layout}; leave kind out, or set it to "
                f"{LAYOUTS[self.layout].kind}"
            )
        return self

    @model_validator(mode="after")
    def _embedded_tasks_read_no_file(self) -> Self:
        given = [name for name in _OF_FILES if getattr(self, name)]
        if given and self.kind in EMBEDDED_KINDS:
            raise ValueError(
                f"{given[0]}: kind: {self.kind} makes its problems itself and reads no file; set kind: math or "
                f"text_to_sql, or remove {given[0]}"
            )
        return self


class DataConfig(Section):
    train: DatasetConfig
    """The data set that is trained on."""
    evaluation: tuple[DatasetConfig, ...] = ()
    """The data sets that are evaluated on, each with the same settings as data.train. The first is the in-domain one,
    which the final table leads with. Empty evaluates nothing."""
    system_prompt: str = ""
    """The system message of every prompt. Empty sends none. A row whose chat messages bring their own keeps that."""
    prompt_template: str | None = None
    """How a question becomes the user's message; of chat messages, the last one is the question. It must contain
    {question}, and for text_to_sql {schema} too. It may contain {evidence}: a line with that alone goes where a row has
    none. null is the bare question, or for text_to_sql a plain instruction."""
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    """Variables for the model's chat template, such as {enable_thinking: false} for Qwen3. A variable that the template
    never reads is said."""
    invalid_gold: Literal["refuse", "drop"] = "refuse"
    """What happens to rows without a gold to grade against: it is missing, a worked solution or a sentence, no
    expression, a query that does not run or has no database, or it contradicts another row of the same question.
    refuse stops and names the rows; drop leaves them out and counts them."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to rows of data.train with the question and the gold of an earlier row: drop leaves them out, keep
    trains on them too. Either way they are counted. Evaluation sets keep theirs, because without them rates could not
    be compared with those of others."""
    max_prompt_tokens: PositiveInt = 1024
    """The longest prompt, in tokens. Longer ones are dropped and counted, because a truncated problem has no right
    answer; a schema is trimmed to fit first. Memory of the learner grows with it."""

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
    "tiny_even": "factorization",
    "tiny_cue": "factorization",
    "tiny_sql": "sql_execution",
    "arithmetic": "math_answer",
    "math": "math_answer",
    "text_to_sql": "sql_execution",
}


def _usable_marks(marks: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    for opening, closing in marks:
        if not opening.strip() or not closing.strip() or opening.lower() == closing.lower():
            raise ValueError(f"expected two different marks that are not blank (got {opening!r} and {closing!r})")
    return marks


ThinkingMarks = Annotated[tuple[tuple[str, str], ...], AfterValidator(_usable_marks)]


class RewardConfig(Section):
    name: str = "auto"
    """What grades completions. auto is what the kind of data.train needs: math_answer grades answers for equivalence,
    sql_execution queries by their result, and factorization the embedded maths task. Your own is
    "package.module:name" of a function, coroutine function, class or Ray remote function that takes (completion,
    answer) and returns a bool, a number or a RewardResult."""
    params: dict[str, Any] = Field(default_factory=dict)
    """For your own reward: keyword arguments of the class, or further ones of the function."""
    extraction: Literal["boxed", "auto"] = "boxed"
    """Where math_answer looks for the answer. boxed: in \\boxed{} only, which teaches the format; auto: wherever
    `dphrl score` would find one."""
    thinking_marks: ThinkingMarks = THINKING_MARKS
    """What stands before and after a thought, as pairs; letter case does not matter. math_answer and sql_execution cut
    thoughts before they look for the answer, and a thought that never ends leaves none. The default has what public
    models write, such as <think> and </think>. Empty cuts nothing."""
    shaping: Literal["none", "column_overlap"] = "none"
    """What a wrong query trains with. none: 0; column_overlap: the share of the gold query's columns that it returns.
    Accuracy never sees it."""
    timeout_s: PositiveFloat = 10.0
    """Seconds to grade one completion; what runs longer is killed."""
    num_workers: ProcessCount = 1
    """Processes that grade side by side. Raise it when grading takes longer than sampling."""
    cpus_per_worker: PositiveFloat = 0.25
    """Ray's CPU share for a worker: below 1 because a worker sleeps while engines decode. Ray packs by this number
    and does not enforce it."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of a worker, for a reward that runs a model; a part of one is shared by as many workers as fit (0.4 is half
    a GPU each). It needs a cluster with GPUs. With 0 a worker sees no GPU."""
    num_retries: NonNegativeInt = 2
    """How often a grading is tried again after an infrastructure error, such as a dead worker. Then the completion is
    left out of the advantage."""

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> Self:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g}: above 1 Ray gives whole GPUs only; set it to "
                f"{math.ceil(self.gpus_per_worker)}, or to a part of one"
            )
        return self

    @property
    def is_custom(self) -> bool:
        return ":" in self.name

    def check_name(self) -> None:
        """Raises ValueError for a name that is neither one of ours nor of the form module:name."""
        known = dict.fromkeys(REWARD_OF_KIND.values())
        if self.name not in known and not self.is_custom:
            raise ValueError(
                f"reward.name={self.name!r} is unknown; choose one of {', '.join(known)}, or name your own as "
                "package.module:name"
            )

    def for_kind(self, kind: str) -> RewardConfig:
        """This with `auto` resolved for data of `kind`. Raises ValueError for a reward that cannot grade it."""
        needed = REWARD_OF_KIND[kind]
        if self.name == "auto":
            return RewardConfig.model_validate(self.model_dump() | {"name": needed})
        self.check_name()
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
