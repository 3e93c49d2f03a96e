"""What a model does on an embedded task: how good it is at each strategy, and how well it sees which one fits.

    python -m dphrl.tiny.describe factor-even                        # the model that comes with the package
    python -m dphrl.tiny.describe cue --model runs/X/checkpoints/step_90/hf

Pass@1 is selection (how often the chosen strategy fits the prompt) times precision (how often its answer is right where
it fits). A comparison of algorithms is fair to every strategy only if the base model is about as precise with each,
and rehearsal can keep a strategy only if the right answers on near-perfect prompts contain it. This command shows both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dphrl.tiny import sql_task
from dphrl.tiny.embedded import ensure_tiny_model
from dphrl.tiny.recipe import RECIPES
from dphrl.tiny.task import FACTOR_TASKS, FactorTask, grade

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Completions decoded at once: more are no faster on a CPU and take more memory.
_BATCH_SIZE = 2048
# An answer has 17 tokens in the factoring tasks and up to 36 in SQL; what is longer is wrong anyway.
_MAX_NEW_TOKENS = 40

Judge = Callable[[str], tuple[str | None, bool]]


@dataclass(frozen=True)
class Case:
    """A prompt, the strategies that fit it, and a reader of completions: (strategy or None, right)."""

    question: str
    fitting: frozenset[str]
    judge: Judge


@dataclass(frozen=True)
class Row:
    """One strategy. All are shares from 0 to 1; None where nothing was counted.

    fits: of the prompts. chosen: of the samples. selection: of the samples that chose it, those on prompts it fits.
    precision: of these, those that are right. rehearsed: of the near-perfect prompts, those with a right answer by it.
    """

    fits: float
    chosen: float
    selection: float | None
    precision: float | None
    rehearsed: float | None


@dataclass(frozen=True)
class Description:
    """rows: by strategy. blind_selection: what selection would be if the same choices were made without a look at the
    prompt. selection, pass_at_1: of the samples. num_near_perfect: prompts of which at least `threshold` samples are
    right."""

    rows: dict[str, Row]
    selection: float
    blind_selection: float
    pass_at_1: float
    num_prompts: int
    num_near_perfect: int


def describe(
    strategies: Sequence[str],
    fitting: Sequence[frozenset[str]],
    outcomes: Sequence[Sequence[tuple[str | None, bool]]],
    threshold: int,
) -> Description:
    """Count what samples did. fitting: of each prompt, the strategies that fit it. outcomes: of each prompt, the
    strategy of each sample and whether it is right. threshold: right samples of a near-perfect prompt."""
    samples = [(fits, *sample) for fits, found in zip(fitting, outcomes, strict=True) for sample in found]
    near_perfect = [found for found in outcomes if sum(right for _, right in found) >= threshold]
    rows = {}
    for name in strategies:
        chosen = [(name in fits, right) for fits, strategy, right in samples if strategy == name]
        fit = [right for fits, right in chosen if fits]
        rows[name] = Row(
            fits=sum(name in fits for fits in fitting) / len(fitting),
            chosen=len(chosen) / len(samples),
            selection=_share(len(fit), len(chosen)),
            precision=_share(sum(fit), len(fit)),
            rehearsed=_share(sum((name, True) in found for found in near_perfect), len(near_perfect)),
        )
    return Description(
        rows=rows,
        selection=sum(strategy in fits for fits, strategy, _ in samples) / len(samples),
        blind_selection=sum(row.fits * row.chosen for row in rows.values()),
        pass_at_1=sum(right for *_, right in samples) / len(samples),
        num_prompts=len(fitting),
        num_near_perfect=len(near_perfect),
    )


def as_text(found: Description) -> str:
    """The description as a table."""
    lines = ["strategy          fits  chosen  selection  precision  in near-perfect prompts"]
    for name, row in found.rows.items():
        cells = f"{row.fits:.3f}   {row.chosen:.3f}      {_cell(row.selection)}      {_cell(row.precision)}"
        lines.append(f"{name:<15}  {cells}  {_cell(row.rehearsed):>23}")
    share = found.num_near_perfect / found.num_prompts
    lines += [
        f"selection {found.selection:.3f} ({found.blind_selection:.3f} without a look at the prompt)",
        f"Pass@1 {found.pass_at_1:.3f}",
        f"near-perfect prompts: {found.num_near_perfect} of {found.num_prompts} ({share:.3f})",
    ]
    return "\n".join(lines)


def make_cases(task: str, num_problems: int, seed: int) -> tuple[Sequence[str], list[Case]]:
    """The strategies of a task, and prompts to train on. Raises ValueError when there are not so many."""
    if task in FACTOR_TASKS:
        variant = FACTOR_TASKS[task]
        problems = variant.make_problems("train", num_problems, seed)
        return [str(p) for p in variant.divisors], [_factor_case(variant, p.question, p.answer) for p in problems]
    questions = [sql_task.question_of(problem) for problem in sql_task.make_problems("train", num_problems, seed)]
    return sql_task.SHAPES, [Case(q.text, q.working_shapes(), _sql_judge(q)) for q in questions]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], num_samples: int, seed: int
) -> list[list[str]]:
    """`num_samples` completions of each question, in order, from the model's own distribution.

    The global random state is left as it was.
    """
    import torch

    per_batch = max(1, _BATCH_SIZE // num_samples)
    completions: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, len(questions), per_batch):
            messages = [[{"role": "user", "content": text}] for text in questions[start : start + per_batch]]
            prompts = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
            )
            output_BT = model.generate(
                **prompts,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=num_samples,
                max_new_tokens=_MAX_NEW_TOKENS,
            )
            new_BT = output_BT[:, prompts["input_ids"].shape[1] :]
            completions += tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    return [completions[row : row + num_samples] for row in range(0, len(completions), num_samples)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the description of a model on a task. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dphrl.tiny.describe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--model", help="a Hugging Face directory; default: the model that comes with the package")
    parser.add_argument("--problems", type=int, default=2000, help="prompts to train on")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--threshold", type=int, default=7, help="right samples of a near-perfect prompt")
    parser.add_argument("--seed", type=int, default=0, help="draws the prompts and the samples")
    chosen = parser.parse_args(arguments)
    if min(chosen.problems, chosen.samples, chosen.threshold) < 1:
        parser.error("--problems, --samples and --threshold must be 1 or more")
    try:
        strategies, cases = make_cases(chosen.task, chosen.problems, chosen.seed)
    except ValueError as error:
        parser.error(f"--problems: {error}")
    if chosen.model and not (Path(chosen.model) / "config.json").is_file():
        parser.error(f"--model: {chosen.model} holds no config.json; name a Hugging Face directory")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = chosen.model or ensure_tiny_model(recipe=RECIPES[chosen.task])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = sample(model, tokenizer, [case.question for case in cases], chosen.samples, chosen.seed)
    outcomes = [[case.judge(text) for text in found] for case, found in zip(cases, texts, strict=True)]
    print(as_text(describe(strategies, [case.fitting for case in cases], outcomes, chosen.threshold)))
    return 0


def _factor_case(task: FactorTask, question: str, answer: str) -> Case:
    names = {str(p) for p in task.divisors}

    def judge(text: str) -> tuple[str | None, bool]:
        first = text.partition(" ")[0]
        return (first if first in names else None), grade(text, answer)[0] == "correct"

    number = int(answer.rpartition(":")[2])
    return Case(question, frozenset(map(str, task.fitting(number))), judge)


def _sql_judge(question: sql_task.Question) -> Judge:
    gold = question.rows(question.gold_sql)
    return lambda sql: (sql_task.shape_of(sql), question.rows_or_none(sql) == gold)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _cell(share: float | None) -> str:
    return "    -" if share is None else f"{share:.3f}"


if __name__ == "__main__":
    sys.exit(main())
