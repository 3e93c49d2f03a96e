#!/usr/bin/env bash
# datasets 5.2.0: whether a text column cast to Json keeps its texts is decided by its first five rows alone.
#
# One would expect: casting a column of texts to Json either takes every text for JSON, or every text for a string.
# Seen: the first five rows are tried. If each of them is JSON by itself, all texts are stored as they are, and decoded
# when they are read: "1" is the number 1, and a later text that is no JSON ("1/2", "x = 2") cannot be read at all, an
# error that comes with the row and not with the cast. If one of the five is no JSON, all are stored as strings, and
# "1" stays the text "1".
#
#   first five rows            "1" is read as     "1/2" in row 6
#   "1" "2" "3" "4" "5"        1 (a number)       an error
#   "1/2" "1" "2" "3" "4"      "1" (a text)       a text
#
# Why it matters: shuffling a data set of answers changes their types, and a set that begins with easy problems fails at
# its first fraction. dphrl reads such columns from their storage: what is JSON text there stays that text.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat >"$work/program.py" <<'PY'
import sys

import datasets

datasets.disable_progress_bars()


def read_back(texts):
    rows = datasets.Dataset.from_dict({"answer": texts}).cast_column("answer", datasets.Json())
    values = []
    for index in range(len(texts)):
        try:
            values.append(rows[index]["answer"])
        except ValueError:
            values.append("ValueError")
    return values


seen = {
    "numbers first   ": read_back(["1", "2", "3", "4", "5", "1/2"]),
    "a fraction first": read_back(["1/2", "1", "2", "3", "4", "5"]),
}
for name, value in seen.items():
    print(f"RESULT {name}: {value}")
expected = [[1, 2, 3, 4, 5, "ValueError"], ["1/2", "1", "2", "3", "4", "5"]]
sys.exit(0 if list(seen.values()) == expected else 1)
PY
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" program.py >"$work/output" 2>&1 || {
    tail -n 20 "$work/output" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
sed -n 's/^RESULT //p' "$work/output"
# Output seen:
#   numbers first   : [1, 2, 3, 4, 5, 'ValueError']
#   a fraction first: ['1/2', '1', '2', '3', '4', '5']
