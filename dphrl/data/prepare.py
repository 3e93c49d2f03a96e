"""Data for the paper's recipes: what can be downloaded becomes the files that the presets name below $DPHRL_DATA.

    python -m dphrl.data.prepare math   --to DIR                   # from the Hugging Face hub
    python -m dphrl.data.prepare math   --to DIR --from FOLDER     # FOLDER/aime24.parquet and the like, else the hub
    python -m dphrl.data.prepare bird   --to DIR --from train.zip dev.zip
    python -m dphrl.data.prepare spider --to DIR --from spider_data.zip

| file                         | source                                         | licence                            |
|------------------------------|------------------------------------------------|------------------------------------|
| math/train.jsonl             | EleutherAI/hendrycks_math, its training part   | MIT                                |
| math/math500.jsonl           | HuggingFaceH4/MATH-500                         | no word on its card; PRM800K's MIT |
| math/college_math_ccby.jsonl | di-zhang-fdu/College_Math_Test                 | a row's own; only CC BY is kept    |
| math/olympiad.jsonl          | Hothan/OlympiadBench, English maths, text only | Apache-2.0                         |
| math/aime24.jsonl            | HuggingFaceH4/aime_2024                        | no word on its card                |
| math/amc23.jsonl             | math-ai/amc23                                  | no word on its card                |
| bird/train/, bird/dev/       | the BIRD benchmark's two archives              | CC BY-SA 4.0                       |
| spider/                      | the Spider task's archive                      | CC BY-SA 4.0                       |

The paper's own mathematics training data is not published with its code; MATH stands in for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dphrl.config.data import DatasetConfig
from dphrl.data.source import Row, as_text, load_rows
from dphrl.data.sql_archives import BIRD, SPIDER, unpack_benchmark
from dphrl.rewards.extraction import extract_boxed
from dphrl.types import JsonDict

# Turns a row, as its source distributes it, into the row to write; None leaves the row out.
Convert = Callable[[Row], JsonDict | None]

_QUESTION_FIELDS = ("question", "problem", "prompt")
_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")
# Only plain CC BY: licences with further conditions, such as CC BY-NC-SA, do not match.
_CC_BY = re.compile(r"\bCC BY\b(?!\s*-|\s*(?:NC|SA|ND)\b)")


# ------------------------------------------------------------ one row


def plain_row(row: Row) -> JsonDict | None:
    """The row's question and answer."""
    return {"question": _text(row, *_QUESTION_FIELDS), "answer": _text(row, "answer")}


def math500_row(row: Row) -> JsonDict | None:
    """The row's problem and answer."""
    # The presets expect the field names of the original file.
    return {"problem": _text(row, *_QUESTION_FIELDS), "answer": _text(row, "answer")}


def worked_row(row: Row) -> JsonDict | None:
    """With the row's own answer, or else the content of the box in its worked solution; None if there is neither."""
    answer = as_text(row.fields.get("answer")) or (extract_boxed(_text(row, "solution")) or "").strip()
    return {"question": _text(row, *_QUESTION_FIELDS), "answer": answer} if answer else None


def college_row(row: Row) -> JsonDict | None:
    """Every textbook has its own licence: rows from plain CC BY textbooks are kept, with their attribution."""
    licence = _text(row, "license")
    if not _CC_BY.search(licence):
        return None
    return {**(plain_row(row) or {}), "data_source": _text(row, "data_source"), "license": licence}


def olympiad_row(row: Row) -> JsonDict | None:
    """Several answers become one list, in which the order does not count. Rows that an exact grader cannot judge are
    left out: those without an answer, and those whose answer is right within a tolerance."""
    stated = row.fields.get("final_answer") or ()
    answers = [text for answer in ([stated] if isinstance(stated, str) else stated) if (text := as_text(answer))]
    if not answers or as_text(row.fields.get("error")):
        return None
    question = "\n\n".join(filter(None, (as_text(row.fields.get("context")), _text(row, *_QUESTION_FIELDS))))
    return {"question": question, "answer": ", ".join(answers)}


def _text(row: Row, *names: str) -> str:
    found = next((text for name in names if (text := as_text(row.fields.get(name)))), None)
    if found is None:
        raise ValueError(f"{row.location}: no {' or '.join(names)}; it has {', '.join(row.fields)}; mend the source")
    return found


# ------------------------------------------------------------ one file


@dataclass(frozen=True)
class MathSet:
    """A file math/NAME.jsonl and the source of its rows. subsets: of the data set on the hub, "" if it has only one."""

    name: str
    hub: str
    split: str
    convert: Convert
    subsets: tuple[str, ...] = ("",)


TEST_SETS = (
    MathSet("math500", "HuggingFaceH4/MATH-500", "test", math500_row),
    MathSet("college_math_ccby", "di-zhang-fdu/College_Math_Test", "test", college_row),
    MathSet("olympiad", "Hothan/OlympiadBench", "train", olympiad_row, ("OE_TO_maths_en_COMP",)),
    MathSet("aime24", "HuggingFaceH4/aime_2024", "train", plain_row),
    MathSet("amc23", "math-ai/amc23", "test", plain_row),
)
_SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
TRAIN_SET = MathSet("train", "EleutherAI/hendrycks_math", "train", worked_row, tuple(_SUBJECTS.split()))


def prepare_math(to: Path, folder: Path | None) -> tuple[list[str], list[str]]:
    """Write every math/*.jsonl below `to`, each from its file in `folder`, or from the hub if there is no such file.

    Returns two lists of lines: what was written, and what went wrong. If one set cannot be loaded, the others are
    still written.
    """
    done, failed = [], []
    # The training set comes last, because it must not hold a problem of any test set that is there.
    for math_set in (*TEST_SETS, TRAIN_SET):
        try:
            rows, num_left_out = convert_rows(_rows_of(math_set, folder), math_set.convert)
            said = f"{num_left_out} left out"
            if math_set is TRAIN_SET:
                held_out = _questions_of_test_sets(to)
                rows, num_repeated, num_held_out = fit_to_train_on(rows, held_out)
                compared = ", ".join(dict.fromkeys(held_out.values())) or "none, which are not there"
                said += f", {num_repeated} repeated, {num_held_out} that a test set has (compared: {compared})"
            if not rows:
                raise ValueError(f"{math_set.name}: none of its rows can be used, {said}; check the source")
        except ValueError as error:
            failed.append(str(error))
            continue
        _write_jsonl(to / "math" / f"{math_set.name}.jsonl", rows)
        done.append(f"math/{math_set.name}.jsonl: {len(rows)} problems, {said}")
    return done, failed


def convert_rows(rows: Iterable[Row], convert: Convert) -> tuple[list[JsonDict], int]:
    """The rows to write, and the number of rows left out.

    Repeated rows stay: without them, rates on a test set could not be compared with rates that others measure.

    Raises ValueError, with file and line, for a row that lacks a field.
    """
    converted = [convert(row) for row in rows]
    kept = [row for row in converted if row is not None]
    return kept, len(converted) - len(kept)


def fit_to_train_on(rows: Sequence[JsonDict], held_out: Iterable[str]) -> tuple[list[JsonDict], int, int]:
    """The rows without repetitions and without those whose question is in `held_out`, then how many rows were
    repetitions, then how many were held out."""
    barred = set(held_out)
    kept: dict[str, JsonDict] = {}
    num_held_out = 0
    for row in rows:
        key = _question_key(row)
        if key in barred:
            num_held_out += 1
        else:
            kept.setdefault(key, row)
    return [*kept.values()], len(rows) - num_held_out - len(kept), num_held_out


def _rows_of(math_set: MathSet, folder: Path | None) -> Iterator[Row]:
    candidates = [folder / f"{math_set.name}{suffix}" for suffix in _LOCAL_SUFFIXES] if folder else []
    local = next((path for path in candidates if path.is_file()), None)
    paths = [str(local)] if local else [f"{math_set.hub}:{subset}".rstrip(":") for subset in math_set.subsets]
    for path in paths:
        yield from load_rows(DatasetConfig(name=math_set.name, path=path, split=math_set.split))


def _questions_of_test_sets(to: Path) -> dict[str, str]:
    """From the key of every question in a test set that is there, to the name of that set."""
    found: dict[str, str] = {}
    for math_set in TEST_SETS:
        file = to / "math" / f"{math_set.name}.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            found |= {_question_key(json.loads(line)): math_set.name for line in lines}
    return found


def _question_key(row: JsonDict) -> str:
    # Copies of one problem may differ in spaces and capitals.
    return "".join(str(row.get("question") or row["problem"]).split()).casefold()


def _write_jsonl(path: Path, rows: Iterable[JsonDict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


# ------------------------------------------------------------ the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dphrl.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=("math", "bird", "spider"), help="which data")
    parser.add_argument("--to", metavar="DIR", help="the folder that DPHRL_DATA names (default: $DPHRL_DATA)")
    parser.add_argument(
        "--from", nargs="+", dest="sources", default=[], metavar="PATH", help="archives you downloaded; math: a folder"
    )
    return parser


def _run(name: str, to: Path, sources: Sequence[Path]) -> tuple[list[str], list[str]]:
    if missing := [str(path) for path in sources if not path.exists()]:
        raise ValueError(f"--from {missing[0]}: does not exist; correct the path")
    if name != "math":
        return unpack_benchmark({"bird": BIRD, "spider": SPIDER}[name], sources, to), []
    if len(sources) > 1 or not all(path.is_dir() for path in sources):
        raise ValueError(f"--from {sources[0]}: must be one folder for math, of files such as aime24.parquet")
    return prepare_math(to, sources[0] if sources else None)


def main(arguments: Sequence[str]) -> int:
    """`python -m dphrl.data.prepare`. Returns the exit status: 0, or 2 after one line for each thing that is wrong."""
    options = _parser().parse_args(arguments)
    to = options.to or os.environ.get("DPHRL_DATA")
    done: list[str] = []
    try:
        if not to:
            raise ValueError("--to: give the folder for the data, or set DPHRL_DATA")
        done, failed = _run(options.name, Path(to).expanduser(), [Path(path).expanduser() for path in options.sources])
    except (ValueError, OSError) as error:
        failed = [str(error)]
    for line in done:
        print(line)
    for line in failed:
        print(f"prepare: error: {' '.join(line.split())}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
