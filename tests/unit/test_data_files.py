"""Data files as people have them: for each, what is loaded, or the one line that refuses it."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyarrow import parquet

from dphrl.config.data import DatasetConfig
from dphrl.data.loading import load_problems

# ------------------------------------------------------------ writing files


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _zst(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return packed


def _parquet(*rows: Mapping[str, Any], schema: pa.Schema | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _column(kind: pa.DataType, *answers: object) -> bytes:
    schema = pa.schema([("question", pa.string()), ("answer", kind)])
    return _parquet(*({"question": "q", "answer": answer} for answer in answers), schema=schema)


_MAP = pa.schema([("question", pa.string()), ("truth", pa.map_(pa.string(), pa.string()))])
QA = [{"question": f"q{i}", "answer": str(i)} for i in range(8)]
LOADED = [(f"q{i}", str(i)) for i in range(8)]

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"content": "2+2? Let's think step by step.", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"answer": "so it is\n#### 4", "index": 0, "question": "2+2?", "split": "train"},
}
DAPO = VERL | {
    "data_source": "math_dapo",
    "prompt": [{"content": 'Solve it. The last line is "Answer: $Answer".\n\n2+2?', "role": "user"}],
}
DAPO_PROCESSED = {"prompt": "2+2?", "solution": "4", "data_source": "math_dapo", "source_prompt": DAPO["prompt"]}
NUMINA = {
    "source": "olympiads",
    "problem": "2+2?",
    "solution": r"It is $\boxed{4}$.",
    "answer": "4",
    "problem_is_valid": "Yes",
}
OPENR1 = NUMINA | {"generations": [r"<think>..</think>\boxed{4}"], "correctness_math_verify": [True]}
SPIDER = {
    "db_id": "pets",
    "question": "How many?",
    "query": "SELECT 1",
    "sql": {"select": []},
    "query_toks": ["SELECT"],
}
BIRD = {"db_id": "pets", "question": "How many?", "SQL": "SELECT 1", "evidence": "", "difficulty": "simple"}


def _pets(folder: Path) -> None:
    import sqlite3

    path = folder / "database" / "pets" / "pets.sqlite"
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pet (name)")
    connection.close()


def _saved_to_disk(folder: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(QA)}).save_to_disk(folder / "saved")


def _saved_with_copies(folder: Path) -> None:
    """As it looks after a session that went on working with what it had saved."""
    import datasets

    datasets.Dataset.from_list(QA).save_to_disk(folder / "saved", num_shards=2)
    rows = datasets.load_from_disk(str(folder / "saved"))
    rows.map(lambda row: {"question": "Hint: " + row["question"]}).filter(lambda row: row["answer"] == "1")
    assert len(list((folder / "saved").glob("cache-*.arrow"))) == 2


def _saved_with_splits(folder: Path) -> None:
    import datasets

    parts = {"train": QA[:5], "train_hard": QA[5:7], "level_5": QA[7:]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    splits.save_to_disk(folder / "saved")


def _mixed_column_saved_by_datasets(folder: Path) -> None:
    import datasets

    path = folder / "mixed.jsonl"
    answers = ["007", 12, "null", "2024-01-02", "7e2"]
    path.write_bytes(_lines(*({"question": "q", "answer": answer} for answer in answers)))
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    assert rows["answer"][:3] == [7, 12, None]  # as `datasets` decodes them
    rows.to_parquet(str(folder / "mixed.parquet"))


def _pandas_csv(folder: Path) -> None:
    with open(folder / "verl.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *VERL])
        writer.writerow([0, *map(str, VERL.values())])


class Found(NamedTuple):
    """files: name to content, or a function that writes them into a folder. path: what data.train.path names.
    expected: (question, answer) of every problem, or the line that refuses the data ({} stands for the folder)."""

    name: str
    files: dict[str, bytes] | Callable[[Path], None]
    path: str
    expected: list[tuple[str, str]] | str
    settings: dict[str, Any] = {}  # noqa: RUF012


SQL_ANSWER = '{"db": "%s", "gold_sql": "SELECT 1", "convention": "%s"}'
FOUR = [("2+2?", "4")]

LOADS = [
    Found("jsonl", {"a.jsonl": _lines(*QA)}, "a.jsonl", LOADED),
    Found("jsonl.gz", {"a.jsonl.gz": gzip.compress(_lines(*QA))}, "a.jsonl.gz", LOADED),
    Found(
        "gz of two parts",
        {"a.jsonl.gz": gzip.compress(_lines(*QA[:5])) + gzip.compress(_lines(*QA[5:]))},
        "a.jsonl.gz",
        LOADED,
    ),
    Found("jsonl.zst", {"a.jsonl.zst": _zst(_lines(*QA))}, "a.jsonl.zst", LOADED),
    Found("json.gz", {"a.json.gz": gzip.compress(json.dumps(QA).encode())}, "a.json.gz", LOADED),
    Found(".json that is .jsonl", {"a.json": _lines(*QA)}, "a.json", LOADED),
    Found(".jsonl that is an array", {"a.jsonl": json.dumps(QA, indent=1).encode()}, "a.jsonl", LOADED),
    Found(
        "csv",
        {
            "a.csv": b'\xef\xbb\xbfid,question,answer\r\n1,"one, ""two""\nthree?",007\r\n\r\n'
            b"2,x,null\r\n3,y,2024-01-02\r\n"
        },
        "a.csv",
        [('one, "two"\nthree?', "007"), ("x", "null"), ("y", "2024-01-02")],
    ),
    Found("tsv.zst", {"a.tsv.zst": _zst(b"question\tanswer\none, two?\t1,5\n")}, "a.tsv.zst", [("one, two?", "1,5")]),
    Found(
        "a .csv by number",
        {"a.csv": b"question,answer,level\nq,1,3\nr,2,5\n"},
        "a.csv",
        [("r", "2")],
        {"where": {"level": 5}},
    ),
    Found(
        "a pattern of shards",
        {"x/b-1.jsonl.gz": gzip.compress(_lines(*QA[4:])), "x/b-0.jsonl": _lines(*QA[:4]), "x/c.txt": b"no"},
        "x/b-*.jsonl*",
        LOADED,
    ),
    Found(
        "a hub data set in a folder",
        {
            "data/train-00001-of-00002.parquet": _parquet(*QA[4:]),
            "data/train-00000-of-00002.parquet": _parquet(*QA[:4]),
            "data/test-00000-of-00001.parquet": _parquet({"question": "held out", "answer": "1"}),
            "README.md": b"---\nlicense: mit\n---\n# A data set\n",
        },
        "",
        LOADED,
    ),
    Found(
        "the same, another split",
        {"train.csv": b"question,answer\nq,1\n", "dev.csv": b"question,answer\nr,2\n"},
        "",
        [("r", "2")],
        {"split": "dev"},
    ),
    Found(
        "a subset named by its README",
        {
            "README.md": b"---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n- config_name: hard\n  "
            b"data_files: hard.jsonl\n---\n",
            "main.jsonl": _lines(*QA[:1]),
            "hard.jsonl": _lines(*QA[1:2]),
        },
        ":hard",
        LOADED[1:2],
    ),
    Found("save_to_disk", _saved_to_disk, "saved", LOADED),
    Found("one split of save_to_disk", _saved_to_disk, "saved/train", LOADED),
    Found("save_to_disk with the copies of map and filter", _saved_with_copies, "saved", LOADED),
    Found("save_to_disk with splits of like names", _saved_with_splits, "saved", LOADED[:5]),
    Found("another of its splits", _saved_with_splits, "saved", LOADED[5:7], {"split": "train_hard"}),
    Found("a split of any name", _saved_with_splits, "saved", LOADED[7:], {"split": "level_5"}),
    Found(
        "a problem in each file, as in MATH",
        {
            f"{split}/algebra/{i}.json": json.dumps(
                {"problem": f"q{i}", "solution": rf"\boxed{{{i}}}"}, indent=4
            ).encode()
            for split, i in (("train", 0), ("train", 1), ("test", 2))
        },
        "",
        LOADED[:2],
        {"layout": "math"},
    ),
    Found("columns without a name", {"a.csv": b",question,answer,,\n0,q,1,,\n"}, "a.csv", [("q", "1")]),
    Found(
        "numbers of many digits",
        {"a.jsonl": b'{"question": "q", "answer": 3.14159265358979323846, "n": 1e-999999999999999999}\n'},
        "a.jsonl",
        [("q", "3.14159265358979323846")],
    ),
    Found(
        "a number that a filter names",
        {"a.parquet": _column(pa.decimal128(6, 2), Decimal("0.10"), Decimal("0.20"))},
        "a.parquet",
        [("q", "0.20")],
        {"where": {"answer": 0.2}},
    ),
    Found(
        "nulls where a struct or a list is wanted",
        {"a.jsonl": _lines(VERL, VERL | {"reward_model": None}, VERL | {"reward_model": {"ground_truth": []}})},
        "a.jsonl",
        [(VERL["prompt"][0]["content"], answer) for answer in ("4", "", "")],
        {"layout": "verl"},
    ),
    Found("NaN in a list", {"a.jsonl": _lines({"question": "q", "answer": [math.nan]})}, "a.jsonl", [("q", "nan")]),
    Found(
        "a map",
        {"a.parquet": _parquet({"question": "q", "truth": {"answer": "4"}}, schema=_MAP)},
        "a.parquet",
        [("q", "4")],
        {"answer_field": "truth.answer"},
    ),
    Found(
        "an answer that is a struct as text",
        {"a.jsonl": _lines({"question": "q", "answer": '{"target": 98}'})},
        "a.jsonl",
        [("q", '{"target": 98}')],
    ),
    Found(
        "a column of mixed types saved by datasets",
        _mixed_column_saved_by_datasets,
        "mixed.parquet",
        [("q", answer) for answer in ("007", "12", "null", "2024-01-02", "7e2")],
    ),
    Found(
        "float32",
        {"a.parquet": _column(pa.float32(), 0.1, 3.14, 1e-5, 1e10)},
        "a.parquet",
        [("q", "0.1"), ("q", "3.14"), ("q", "0.00001"), ("q", "10000000000")],
    ),
    Found("float32 in a list", {"a.parquet": _column(pa.list_(pa.float32()), [0.1])}, "a.parquet", [("q", "0.1")]),
    Found("decimals", {"a.parquet": _column(pa.decimal128(6, 2), Decimal("0.10"))}, "a.parquet", [("q", "0.10")]),
    Found("lists of one", {"a.jsonl": _lines({"question": ["q"], "answer": ["1/2"]})}, "a.jsonl", [("q", "1/2")]),
    Found(
        "gsm8k",
        {"a.jsonl": _lines({"question": "q", "answer": "1+1=2\n#### 2"})},
        "a.jsonl",
        [("q", "2")],
        {"layout": "gsm8k"},
    ),
    Found(
        "MATH",
        {
            "a.parquet": _parquet(
                {"problem": "2+2?", "solution": r"so \boxed{4}", "level": "Level 5", "type": "Algebra"}
            )
        },
        "a.parquet",
        FOUR,
        {"layout": "math"},
    ),
    Found(
        "MATH-500",
        {"a.jsonl": _lines({"problem": "2+2?", "solution": r"\boxed{4.}", "answer": "4"})},
        "a.jsonl",
        FOUR,
        {"layout": "math"},
    ),
    Found(
        "verl",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        [("2+2? Let's think step by step.", "4")],
        {"layout": "verl"},
    ),
    Found(
        "verl, the user's own question and answer",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        FOUR,
        {
            "layout": "verl",
            "prompt_field": "extra_info.question",
            "answer_field": "extra_info.answer",
            "answer_format": "gsm8k",
        },
    ),
    Found(
        "verl without its layout",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        [(VERL["prompt"][0]["content"], "4")],
        {"answer_field": "reward_model.ground_truth"},
    ),  # type: ignore[index]
    Found(
        "verl with structs as JSON",
        {
            "a.jsonl": _lines(
                VERL | {"prompt": json.dumps(VERL["prompt"]), "reward_model": json.dumps(VERL["reward_model"])}
            )
        },
        "a.jsonl",
        [("2+2? Let's think step by step.", "4")],
        {"layout": "verl"},
    ),
    Found(
        "verl that pandas wrote as .csv",
        _pandas_csv,
        "verl.csv",
        [("2+2? Let's think step by step.", "4")],
        {"layout": "verl"},
    ),
    Found(
        "dapo", {"a.parquet": _parquet(DAPO)}, "a.parquet", [(DAPO["prompt"][0]["content"], "4")], {"layout": "dapo"}
    ),  # type: ignore[index]
    Found("dapo, processed", {"a.parquet": _parquet(DAPO_PROCESSED)}, "a.parquet", FOUR, {"layout": "dapo"}),
    Found(
        "numina",
        {"a.parquet": _parquet(NUMINA | {"answer": "proof"}, NUMINA, NUMINA | {"answer": "notfound"})},
        "a.parquet",
        FOUR,
        {"layout": "numina"},
    ),
    Found("openr1", {"a.parquet": _parquet(OPENR1)}, "a.parquet", FOUR, {"layout": "openr1"}),
    Found(
        "a path into a list",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        [("2+2? Let's think step by step.", "4")],
        {"layout": "verl", "prompt_field": "prompt.0.content"},
    ),
    Found(
        "a name with a dot",
        {"a.jsonl": _lines({"q.en": "q", "answer": 1})},
        "a.jsonl",
        [("q", "1")],
        {"prompt_field": "q.en"},
    ),
]

REFUSED = [
    Found(
        "truncated gz",
        {"a.jsonl.gz": gzip.compress(_lines(*QA))[:60]},
        "a.jsonl.gz",
        r"a.jsonl.gz cannot be read: Truncated compressed stream; replace it by a whole copy",
    ),
    Found(
        "truncated zst",
        {"a.csv.zst": _zst(b"question,answer\n" + b"q,1\n" * 99)[:20]},
        "a.csv.zst",
        r"a.csv.zst cannot be read: .*; replace it by a whole copy",
    ),
    Found(
        "no gz at all",
        {"a.json.gz": _lines(*QA)},
        "a.json.gz",
        r"a.json.gz cannot be read: .*; replace it by a whole copy",
    ),
    Found(
        "no parquet at all",
        {"a.parquet": b"PAR1"},
        "a.parquet",
        r"a.parquet cannot be read: .*; replace it by a whole copy",
    ),
    Found(
        "a pointer of Git LFS",
        {"a.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n"},
        "a.parquet",
        "a.parquet is a pointer of Git LFS, not the data; run `git lfs pull` in its repository",
    ),
    Found(
        "ragged csv",
        {"a.csv": b'question,answer\nq,1\n"two\nlines",2,3\n'},
        "a.csv",
        "a.csv:3: 3 cells, but the header has 2; quote cells that hold a comma",
    ),
    Found(
        "an open quote",
        {"a.csv": b'question,answer\nq,1\n"r,2\ns,3\n'},
        "a.csv",
        "a.csv:3: not a record: unexpected end of data; mend its quotes",
    ),
    Found(
        "semicolons",
        {"a.csv": b"question;answer\nq;1\n"},
        "a.csv",
        r"a.csv:1: the header 'question;answer' is one column; separate columns by commas .*",
    ),
    Found(
        "a column twice",
        {"a.csv": b"question,answer,answer\nq,1,2\n"},
        "a.csv",
        "a.csv:1: the column 'answer' is there twice; rename one",
    ),
    Found(
        "another encoding",
        {"a.csv": "question,answer\nwie groß?,1\n".encode("latin-1")},
        "a.csv",
        "a.csv:2: not UTF-8: .*; save the file as UTF-8",
    ),
    Found(
        "an empty folder",
        {"x/.keep": b""},
        "x",
        r"data set d: folder {}/x cannot be read as a data set: .*; give its files .*",
    ),
    Found(
        "a folder of something else",
        {"x/train.txt": b"q"},
        "x",
        r"data set d: folder {}/x has {}/x/train.txt for its data, which is of no known kind; convert it .*",
    ),
    Found(
        "no such split",
        {"x/train.csv": b"question,answer\nq,1\n"},
        "x",
        "data set d: {}/x has no split 'test'; it has train; set split",
        {"split": "test"},
    ),
    Found(
        "nothing matches",
        {"x/a.jsonl": b""},
        "x/b*.jsonl",
        r"data set d: no file matches {}/x/b\*.jsonl; correct its path",
    ),
    Found(
        "a URL",
        {},
        "https://example.org/a.jsonl",
        "data set d: https://example.org/a.jsonl is a URL; download the file, or name a hub data set as org/name",
    ),
    Found(
        "no known kind",
        {"a.xlsx": b"PK"},
        "a.xlsx",
        "data set d: file {}/a.xlsx is of no known kind; convert it to one of .jsonl, .*",
    ),
    Found("an empty file", {"a.csv": b"question,answer\n"}, "a.csv", "data set d: {}/a.csv holds no rows"),
    Found(
        "JSON over several lines",
        {"a.json": b'{\n  "question": "q"\n}\n{\n  "question": "r"\n}\n'},
        "a.json",
        "a.json:1: a JSON object over several lines, and not the only one of its file; write one object a line, or .*",
    ),
    Found(
        "rows in an object over several lines",
        {"a.json": json.dumps({"data": QA}, indent=1).encode()},
        "a.json",
        "a.json:1: no field 'question' or 'problem' or 'prompt'; it has data; set prompt_field of data set d",
    ),
    Found(
        "lines that end as they did on old machines",
        {"a.csv": b"question,answer\rq,1\r"},
        "a.csv",
        "a.csv:1: not a record: new-line character .*; save the file with line feeds",
    ),
    Found(
        "a split that was not saved",
        _saved_with_splits,
        "saved",
        "data set d: {}/saved has no split 'test'; it has train, train_hard, level_5; set split",
        {"split": "test"},
    ),
    Found(
        "columns of pandas",
        {"a.json": b'{"question": {"0": "q"}, "answer": {"0": "1"}}'},
        "a.json",
        r"a.json:1: 'question' is a struct of 0, neither text nor a number; set prompt_field of data set d to a "
        r"part of it .*",
    ),
    Found(
        "rows in an object",
        {"a.json": b'{"version": 1, "data": [{"question": "q", "answer": "1"}]}'},
        "a.json",
        "a.json:1: no field 'question' or 'problem' or 'prompt'; it has version, data; set prompt_field of data set d",
    ),
    Found(
        "a struct where an answer is wanted",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        r"a.parquet:1: 'reward_model' is a struct of ground_truth, style, neither text nor a number; set "
        r"answer_field of data set d to a part of it \(reward_model.ground_truth, reward_model.style\), or to "
        r"another field",
        {"answer_field": "reward_model"},
    ),
    Found(
        "verl without its layout",
        {"a.parquet": _parquet(VERL)},
        "a.parquet",
        r"a.parquet:1: no field 'answer'; it has data_source, .*; it looks like verl: set layout: verl, or set "
        r"answer_field of data set d",
    ),
    Found(
        "gsm8k with the wrong layout",
        {"a.jsonl": _lines({"question": "q", "answer": "1+1=2\n#### 2"})},
        "a.jsonl",
        "a.jsonl:1: no field 'prompt'; it has question, answer; it looks like gsm8k: set layout: gsm8k, or set .*",
        {"layout": "verl"},
    ),
    Found(
        "the wrong layout of questions and answers",
        {"a.jsonl": _lines(*QA)},
        "a.jsonl",
        "a.jsonl:1: no field 'prompt'; it has question, answer; set prompt_field of data set d",
        {"layout": "verl"},
    ),
    Found(
        "the wrong layout",
        {"a.parquet": _parquet(BIRD)},
        "a.parquet",
        r"a.parquet:1: no field 'problem'; it has .*; it looks like bird: set layout: bird, or set prompt_field "
        r"of data set d",
        {"layout": "math"},
    ),
    Found(
        "no such part",
        {"a.jsonl": _lines(VERL)},
        "a.jsonl",
        r"a.jsonl:1: no field 'reward_model.truth'; it has data_source, prompt, .*",
        {"answer_field": "reward_model.truth"},
    ),
    Found(
        "true",
        {"a.jsonl": _lines({"question": "q", "answer": True})},
        "a.jsonl",
        "a.jsonl:1: 'answer' is true or false, neither text nor a number; .*",
    ),
    Found(
        "bytes",
        {"a.parquet": _column(pa.binary(), b"1")},
        "a.parquet",
        "a.parquet:1: 'answer' is bytes, neither text nor a number; .*",
    ),
    Found(
        "a date",
        {"a.parquet": _column(pa.date32(), date(2024, 1, 2))},
        "a.parquet",
        "a.parquet:1: 'answer' is a date, neither text nor a number; .*",
    ),
    Found(
        "two answers",
        {"a.jsonl": _lines({"question": "q", "answer": ["1", "2"]})},
        "a.jsonl",
        r"a.jsonl:1: 'answer' is a list of 2 values, neither text nor a number; set answer_field of data set d "
        r"to a part of it \(answer.0, answer.1\), or to another field",
    ),
    Found(
        "mixed types in row 3",
        {"a.jsonl": _lines(*QA[:2], {"question": "q", "answer": {"value": "1"}})},
        "a.jsonl",
        "a.jsonl:3: 'answer' is a struct of value, neither text .* of data set d to a part of it .answer.value., .*",
    ),
    Found(
        "a missing field in row 7",
        {"a.jsonl": _lines(*QA[:6], {"question": "q"}, *QA[7:])},
        "a.jsonl",
        "a.jsonl:7: no field 'answer'; it has question; set answer_field of data set d",
    ),
    Found(
        "shards with other columns",
        {"x/a.csv": b"question,answer\nq,1\n", "x/b.csv": b"question,solution\nr,2\n"},
        "x/*.csv",
        "x/b.csv:2: no field 'answer'; it has question, solution; .*",
    ),
    Found(
        "a chat that has been answered",
        {"a.jsonl": _lines({"prompt": [*VERL["prompt"], {"role": "assistant", "content": "4"}], "answer": "4"})},
        "a.jsonl",
        "a.jsonl:1: 'prompt' ends with a turn of 'assistant', but a prompt ends with the user's; mend the row, .*",
    ),  # type: ignore[misc]
    Found(
        "a picture in the chat",
        {"a.jsonl": _lines({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "4"})},
        "a.jsonl",
        "a.jsonl:1: 'prompt' has a turn of 'user' whose content is not text; mend the row, .*",
    ),
    Found(
        "a list that is no chat",
        {
            "a.jsonl": _lines(
                {"prompt": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "answer": "4"}
            )
        },
        "a.jsonl",
        "a.jsonl:1: 'prompt' is a list of 2 values, neither text nor a number; .*",
    ),
    Found(
        "a question that pandas printed",
        _pandas_csv,
        "verl.csv",
        r"verl.csv:2: 'extra_info' is a struct of answer, index, question, .*; set prompt_field .*",
        {"layout": "verl", "prompt_field": "extra_info"},
    ),
    Found(
        "messages that numpy printed",
        {"a.csv": b"""prompt,answer\n"[{'role': 'system', 'content': 'x'}\n {'role': 'user', 'content': 'y'}]",1\n"""},
        "a.csv",
        "a.csv:2: 'prompt' holds chat messages that were printed and cannot be read back; write them to a .*",
    ),
    Found(
        "half a character",
        {"a.jsonl": b'{"question": "\\ud83d", "answer": "1"}\n'},
        "a.jsonl",
        "a.jsonl:1: 'question' holds a lone surrogate, which is no character; .*",
    ),
    Found(
        "no answers at all",
        {"a.jsonl": _lines(NUMINA | {"answer": "proof"})},
        "a.jsonl",
        r"data set d: none of its 1 rows has an answer \('answer'\)",
        {"layout": "numina"},
    ),
]


def _write(found: Found, folder: Path) -> DatasetConfig:
    if callable(found.files):
        found.files(folder)
    else:
        for name, content in found.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    path = f"{folder}{'' if found.path[:1] in ('', ':') else '/'}{found.path}"
    return DatasetConfig(name="d", path=found.path if "://" in found.path else path, **found.settings)


@pytest.mark.parametrize("found", LOADS, ids=lambda found: found.name)
def test_what_is_loaded(tmp_path: Path, found: Found) -> None:
    problems = load_problems(_write(found, tmp_path), seed=0)
    assert [(problem.text, problem.answer) for problem in problems] == found.expected


@pytest.mark.parametrize("found", REFUSED, ids=lambda found: found.name)
def test_what_is_refused(tmp_path: Path, found: Found) -> None:
    dataset = _write(found, tmp_path)
    assert isinstance(found.expected, str)
    expected = found.expected.replace("{}", str(tmp_path))
    expected = expected if expected.startswith("data set") else f"{tmp_path}/{expected}"
    with pytest.raises(ValueError, match=f"^{expected}$") as caught:
        load_problems(dataset, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["saved", "hub"])
def test_descriptions_of_the_data_are_not_called_data_that_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    _saved_to_disk(tmp_path)
    _write(
        Found("", {"hub/train.csv": b"question,answer\nq,1\n", "hub/dataset_infos.json": b"{}"}, "hub", []), tmp_path
    )
    load_problems(DatasetConfig(name="d", path=str(tmp_path / path)), seed=0)
    assert "is not read" not in caplog.text
    (tmp_path / "hub" / "more.jsonl").write_bytes(_lines(*QA))
    load_problems(DatasetConfig(name="d", path=str(tmp_path / "hub")), seed=0)
    assert "more.jsonl in" in caplog.text
