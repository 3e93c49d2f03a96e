#!/usr/bin/env bash
# datasets 5.2.0: of a folder with shards of two kinds, load_dataset reads one kind and says nothing of the other.
#
# A folder holds train-0.jsonl (1 row), train-1.csv and train-2.csv (2 rows each): the same columns, exported at
# different times.
# One would expect: five rows; or an error, as there is one when two *splits* are of different kinds.
# Seen: the kind with more files is taken, the rows of the others are missing, and nothing is said: 4 rows. With as many
# files of each kind one of the two is taken.
#
# Why it matters: a run trains on a part of its data and cannot know. dphrl lets datasets sort a folder's files into
# splits, and names the files of another kind that lie beside them.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat >"$work/program.py" <<'PY'
import os
import sys

import datasets

datasets.disable_progress_bars()
TABLE = "question,answer\na,1\nb,2\n"
LINE = '{"question": "c", "answer": 3}\n'


def number_of_rows(folder, files):
    os.mkdir(folder)
    for name, content in files.items():
        with open(f"{folder}/{name}", "w") as file:
            file.write(content)
    return datasets.load_dataset(folder, split="train", cache_dir="cache").num_rows


shards = {"train-0.jsonl": LINE, "train-1.csv": TABLE, "train-2.csv": TABLE}
seen = {
    "one .jsonl, two .csv": number_of_rows("three", shards),
    "one .jsonl, one .csv": number_of_rows("two", dict(list(shards.items())[:2])),
}
for name, value in seen.items():
    print(f"RESULT {name}: {value} rows")
sys.exit(0 if list(seen.values()) == [4, 1] else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   one .jsonl, two .csv: 4 rows
#   one .jsonl, one .csv: 1 rows
