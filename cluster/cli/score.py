"""The command that grades a file of completions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.cli.support import exit_status


def add_score_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        name="score",
        short_help="Grade completions in a file.",
        help="""Grade completions offline, with the graders that training uses.

IN.jsonl holds one object a line. math: {"completion", "answer"}. sql: {"completion", "db" (path of a .sqlite file),
"gold_sql", "convention": "bird" or "spider"}. "-" reads standard input. Other names of the first two are options.

The result has one line per row, in order: {"index", "score", "status", "detail"}; score is 1, 0, or null when
grading itself failed. Rows that are no such object are named on standard error, the others are graded, and the
exit status is 2.

Thoughts are cut before the answer is looked for: what stands between marks such as <think> and </think>, and what
comes before a closing mark that nothing opened.

\b
Examples:
  dphrl score math completions.jsonl -o scores.jsonl
  dphrl score math outputs.jsonl --completion-field prediction --answer-field gold
  dphrl score math completions.jsonl --thinking-mark "<plan> </plan>" --in-thought "<plan>"
  dphrl score sql completions.jsonl --workers 8 --timeout-s 30 > scores.jsonl""",
    )(score)


def score(
    kind: Annotated[Literal["math", "sql"], typer.Argument(metavar="math|sql", help="What the completions are.")],
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Completions; - for standard input.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the results go; standard output if not given.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that grade, each with a sandbox.")] = 1,
    timeout_s: Annotated[float, typer.Option("--timeout-s", min=0.01, help="For one completion.")] = 10.0,
    extraction: Annotated[
        Literal["auto", "boxed"], typer.Option("--extraction", help="Where a math answer is looked for.")
    ] = "auto",
    completion_field: Annotated[
        str, typer.Option("--completion-field", metavar="NAME", help="The row's field that holds the completion.")
    ] = "completion",
    answer_field: Annotated[
        str, typer.Option("--answer-field", metavar="NAME", help="math: the row's field that holds the gold answer.")
    ] = "answer",
    thinking_mark: Annotated[
        list[str] | None,
        typer.Option("--thinking-mark", metavar='"OPEN CLOSE"', help="Marks around thoughts, besides the usual ones."),
    ] = None,
    in_thought: Annotated[
        str,
        typer.Option(
            "--in-thought",
            metavar="MARK",
            help="The mark, such as <think>, with which every prompt opened a thought. A completion that does not "
            "close it has no answer.",
        ),
    ] = "",
) -> None:
    with exit_status("the rows graded so far are written") as run:
        if not math.isfinite(timeout_s):
            raise run.refuse(f"--timeout-s {timeout_s}: a grading without an end is none; give seconds")
        if kind == "sql" and extraction == "boxed":
            raise run.refuse("--extraction boxed is for math; leave it out")
        if kind == "sql" and answer_field != "answer":
            raise run.refuse("--answer-field is for math; rows of sql hold gold_sql")
        from dphrl.config.data import RewardConfig
        from dphrl.config.marks import THINKING_MARKS
        from dphrl.rewards.score_file import RowFields, score_file

        marks = list(THINKING_MARKS)
        for pair in thinking_mark or ():
            opening, _, closing = pair.strip().partition(" ")
            if not closing.strip() or opening.lower() == closing.strip().lower():
                raise run.refuse(f'--thinking-mark {pair!r}: write two different marks, such as "<plan> </plan>"')
            marks.append((opening, closing.strip()))
        if in_thought and in_thought.lower() not in {opening.lower() for opening, _ in marks}:
            known = " ".join(opening for opening, _ in marks)
            raise run.refuse(
                f"--in-thought {in_thought!r} opens no thought; give one of {known}, or add --thinking-mark"
            )
        reward = RewardConfig(
            name={"math": "math_answer", "sql": "sql_execution"}[kind],
            extraction=extraction,
            thinking_marks=tuple(marks),
            timeout_s=timeout_s,
        )
        fields = RowFields(completion_field, answer_field)
        score_file(source, output, reward, workers, opening=in_thought, fields=fields)
