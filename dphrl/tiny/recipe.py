"""The recipe of an embedded model: every number that decides its warm start, and a fingerprint of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from dphrl.tiny import model as tiny_model
from dphrl.tiny import sql_task
from dphrl.tiny import task as factor_task

# Part of the cache key. Raise it with any change of this package that changes the weights or files it writes
# but no number in the recipe; otherwise users keep an old model.
SOURCE_VERSION = 3


@dataclass(frozen=True)
class Task:
    """What a warm start needs to know of a task."""

    vocabulary: tuple[str, ...]
    make_demonstrations: Callable[..., list[tuple[str, str]]]
    fingerprint_parts: Callable[[], list[object]]


_SQL = Task(sql_task.VOCABULARY, sql_task.make_demonstrations, sql_task.fingerprint_parts)
_FACTORING = {
    name: Task(factor_task.VOCABULARY, task.make_demonstrations, task.fingerprint_parts)
    for name, task in factor_task.FACTOR_TASKS.items()
}
TASKS = {"factor": _FACTORING.pop("factor"), "sql": _SQL, **_FACTORING}


@dataclass(frozen=True)
class WarmStartRecipe:
    """Every number that decides the warm-started weights; recipes that differ have separate cache entries.

    task: a name of `TASKS`. batch_size is in demonstrations. lr is AdamW's peak: reached after num_warmup_steps, then
    decayed linearly to zero.
    """

    task: str = "factor"
    num_steps: int = 295
    batch_size: int = 96
    lr: float = 3e-3
    num_warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    slip_rate: float = factor_task.SLIP_RATE
    out_of_domain_share: float = factor_task.OUT_OF_DOMAIN_SHARE
    seed: int = 0
    shape: tiny_model.TinyShape = field(default_factory=tiny_model.TinyShape)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is unknown: choose one of {', '.join(TASKS)}")

    def fingerprint(self) -> str:
        """12 hex digits over this recipe, the task's and the tokenizer's constants and `SOURCE_VERSION`."""
        covered = {
            "recipe": asdict(self),
            "task": TASKS[self.task].fingerprint_parts(),
            "special_tokens": tiny_model.SPECIAL_TOKENS,
            "chat_template": tiny_model.CHAT_TEMPLATE,
            "max_tokens": tiny_model.MAX_TOKENS,
            "source_version": SOURCE_VERSION,
        }
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:12]


FACTOR_RECIPE = WarmStartRecipe()
# A token of a query carries less information than a token of a division, so fewer steps reach the same precision.
SQL_RECIPE = WarmStartRecipe(
    task="sql",
    num_steps=240,
    slip_rate=sql_task.SLIP_RATE,
    out_of_domain_share=sql_task.OUT_OF_DOMAIN_SHARE,
)
# As long as it takes to divide equally well by each of the divisors: four times out of five, as the demonstrations do.
# After 700 steps the order of the demonstrations still decides whether the model can divide by 11.
EVEN_RECIPE = WarmStartRecipe(task="factor-even", num_steps=1000)
# Three demonstrations of four name the divisor: they teach to divide and nothing about which divisor fits. With a
# quarter, as in the other tasks, the model knows most of 8's cue before RL begins (selection .89 instead of .70).
CUE_RECIPE = WarmStartRecipe(task="cue", num_steps=700, out_of_domain_share=0.75)

RECIPES = {recipe.task: recipe for recipe in (FACTOR_RECIPE, SQL_RECIPE, EVEN_RECIPE, CUE_RECIPE)}
