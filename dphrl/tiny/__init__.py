"""The embedded defaults: tasks with several right answers per prompt, and small models that know them only in part.

    from dphrl.tiny import ensure_tiny_model, grade, make_problems

    model_dir = ensure_tiny_model()                  # a plain HF directory in a cache
    problems = make_problems("train", 3000, seed=0)  # also: held_out, out_of_domain
    status, detail = grade(completion, problems[0].answer)

Variants of the same task, and the models that half know them, go by the names of `FACTOR_TASKS`:

    model_dir = ensure_tiny_model(recipe=RECIPES["factor-even"])
    problems = FACTOR_TASKS["factor-even"].make_problems("train", 3000, seed=0)

The same for text-to-SQL, graded by the reward `sql_execution` in databases that the package builds:

    model_dir = ensure_tiny_model(recipe=SQL_RECIPE)
    problems = sql_task.make_problems("train", 3000, seed=0)  # question, database, gold_sql
    files = ensure_databases()                                # {"league": Path, "company": Path}

They need no download and no GPU, and the loss of diversity under plain RL shows on them within minutes.
Importing this package loads neither torch nor transformers; building a model does.
"""

from dphrl.tiny import sql_task
from dphrl.tiny.embedded import ensure_tiny_model
from dphrl.tiny.model import TinyShape, build_model, build_tokenizer
from dphrl.tiny.recipe import FACTOR_RECIPE, RECIPES, SQL_RECIPE, WarmStartRecipe
from dphrl.tiny.sql_database import ensure_databases
from dphrl.tiny.task import (
    DIVISORS,
    FACTOR,
    FACTOR_TASKS,
    SPLITS,
    FactorTask,
    TinyProblem,
    grade,
    is_held_out,
)
from dphrl.tiny.warm_start import warm_start

make_problems = FACTOR.make_problems
make_demonstrations = FACTOR.make_demonstrations

__all__ = [
    "DIVISORS",
    "FACTOR",
    "FACTOR_RECIPE",
    "FACTOR_TASKS",
    "RECIPES",
    "SPLITS",
    "SQL_RECIPE",
    "FactorTask",
    "TinyProblem",
    "TinyShape",
    "WarmStartRecipe",
    "build_model",
    "build_tokenizer",
    "ensure_databases",
    "ensure_tiny_model",
    "grade",
    "is_held_out",
    "make_demonstrations",
    "make_problems",
    "sql_task",
    "warm_start",
]
