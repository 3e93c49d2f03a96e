"""SQL gradings a second, sandboxed, against the same work done plainly in this process; and one grader against two."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dphrl.processors import whole_cpus

NUM_ITEMS, NUM_ROUNDS, TIMEOUT_S = 1000, 5, 10.0
# Batches as a pool would hand them out, and no query so long that it alone decides when the last grader is done.
BATCH_SIZE, MAX_QUERY_MS = 50, 20

Pair = tuple[str, str, str]


def _pairs() -> list[Pair]:
    """(database, gold, prediction), all different: every second prediction is the gold, the others a neighbour's."""
    data = Path(os.environ.get("DPHRL_DATA") or "../shared/data")
    if not (data / "sql/pairs.jsonl").is_file():
        print(f"{data}/sql/pairs.jsonl is not here: set DPHRL_DATA to the folder of labelled data", file=sys.stderr)
        sys.exit(2)
    rows = [json.loads(line) for line in (data / "sql/pairs.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["tie_sensitive"] and (row["ms"] or 0) < MAX_QUERY_MS]
    pairs: dict[Pair, Pair] = {}
    for index, (row, neighbour) in enumerate(itertools.pairwise(rows)):
        prediction = row if index % 2 or neighbour["db"] != row["db"] else neighbour
        key = row["db"], row["gold_sql"], prediction["gold_sql"]
        pairs[key] = str((data / f"sql/dbs/{row['db']}.sqlite").resolve()), row["gold_sql"], prediction["gold_sql"]
    return list(pairs.values())[:NUM_ITEMS]


def _plain(pairs: list[Pair]) -> list[bool]:
    """Neither killable nor limited: parse, open, execute both, compare sets of rows."""
    import sqlglot

    verdicts = []
    for path, gold, prediction in pairs:
        sqlglot.parse(prediction, dialect="sqlite")
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        connection.text_factory = bytes
        try:
            expected, found = (set(connection.execute(sql).fetchall()) for sql in (gold, prediction))
            verdicts.append(expected == found)
        finally:
            connection.close()
    return verdicts


def _items(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [
        (prediction, json.dumps({"db": path, "gold_sql": gold, "convention": "bird"}))
        for path, gold, prediction in pairs
    ]


def _seconds_of_pool(items: list[tuple[str, str]], graders: list[Any]) -> float:
    """All items in batches, the next one to whichever grader is free; each grader in a thread."""
    batches = iter([items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)])
    lock = threading.Lock()

    def work(grader: Any) -> None:
        while True:
            with lock:
                batch = next(batches, None)
            if batch is None:
                return
            grader.grade(batch)

    threads = [threading.Thread(target=work, args=(grader,)) for grader in graders]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def run() -> dict[str, Any]:
    """Both sides in turn, NUM_ROUNDS times; a fresh grader each time, so that no gold is known beforehand."""
    from dphrl.rewards.sql_execution import SqlExecutionGrader

    pairs = _pairs()
    items = _items(pairs)
    seconds: dict[str, list[float]] = {"plain": [], "sandboxed": [], "one_grader": [], "two_graders": []}
    num_differing = 0
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        expected = _plain(pairs)
        seconds["plain"].append(time.perf_counter() - started)
        graders = [SqlExecutionGrader(TIMEOUT_S) for _ in range(4)]
        try:
            started = time.perf_counter()
            results = graders[0].grade(items)
            seconds["sandboxed"].append(time.perf_counter() - started)
            num_differing += sum((r.score == 1) != e for r, e in zip(results, expected, strict=True))
            seconds["one_grader"].append(_seconds_of_pool(items, graders[1:2]))
            seconds["two_graders"].append(_seconds_of_pool(items, graders[2:]))
        finally:
            for grader in graders:
                grader.close()
    median = {side: statistics.median(each) for side, each in seconds.items()}
    return {
        "benchmark": "sql_grading",
        "num_items": len(items),
        "num_cpus": whole_cpus(),
        "throughput_ratio": median["plain"] / median["sandboxed"],
        "scaling_1_to_2": median["one_grader"] / median["two_graders"],
        "num_differing_verdicts": num_differing,
        **{f"{side}_per_s": len(items) / value for side, value in median.items()},
    }
