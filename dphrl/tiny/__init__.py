"""The embedded defaults: tasks with several right answers per prompt, and small models that know them only in part.

    from dphrl.tiny import ensure_tiny_model, grade, make_problems

    model_dir = ensure_tiny_model()                  # a plain HF directory in a cache
    problems = make_problems("train", 3000, seed=0)  # also: held_out, out_of_domain
    status, detail = grade(completion, problems[0].answer)

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
from dphrl.tiny.recipe import FACTOR_RECIPE, SQL_RECIPE, WarmStartRecipe
from dphrl.tiny.sql_database import ensure_databases
from dphrl.tiny.task import (
    DIVISORS,
    SPLITS,
    TinyProblem,
    grade,
    is_held_out,
    make_demonstrations,
    make_problems,
)
from dphrl.tiny.warm_start import warm_start

__all__ = [
    "DIVISORS",
    "FACTOR_RECIPE",
    "SPLITS",
    "SQL_RECIPE",
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
