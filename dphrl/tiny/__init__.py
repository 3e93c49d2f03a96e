"""The embedded default: a task with several right answers per prompt and a small model that half knows it.

    from dphrl.tiny import ensure_tiny_model, grade, make_problems

    model_dir = ensure_tiny_model()                  # under a minute, once; then cached; a plain HF directory
    problems = make_problems("train", 3000, seed=0)  # also: held_out, out_of_domain
    status, detail = grade(completion, problems[0].answer)

It needs no download and no GPU, and the loss of diversity under plain RL shows on it within minutes.
Importing this package loads neither torch nor transformers; building the model does.
"""

from dphrl.tiny.model import TinyShape, build_model, build_tokenizer
from dphrl.tiny.task import (
    DIVISORS,
    SPLITS,
    TinyProblem,
    grade,
    is_held_out,
    make_demonstrations,
    make_problems,
)
from dphrl.tiny.warm_start import WarmStartRecipe, ensure_tiny_model, warm_start

__all__ = [
    "DIVISORS",
    "SPLITS",
    "TinyProblem",
    "TinyShape",
    "WarmStartRecipe",
    "build_model",
    "build_tokenizer",
    "ensure_tiny_model",
    "grade",
    "is_held_out",
    "make_demonstrations",
    "make_problems",
    "warm_start",
]
