#!/usr/bin/env bash
# datasets 5.2.0: one number in a .jsonl column turns the texts of all other rows into what JSON makes of them.
#
# Answers of a data set are texts, as people write them: "007" (a code), "1e3", "null", "true". In one row somebody
# wrote 12 without quotes.
# One would expect: the texts stay texts, whatever another row holds; or the file is refused.
# Seen: the column becomes the type Json. Texts that happen to be JSON are stored without quotes and come back
# decoded: "007" as the number 7, "1e3" as 1000.0, "null" as None, "true" as True. A text such as "1/2" stays. Written
# to parquet, the text "12" and the number 12 are the same for good. Without the row of the number every answer is as it
# was written. And a column of dates in text, "2024-01-02", comes back as datetimes.
#
# Why it matters: a gold answer 7 is wrong for "007", and None trains as the word "None" in code that calls str().
# dphrl lets datasets find the files of a split, downloads them, and reads them itself.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat >"$work/program.py" <<'PY'
import json
import sys

import datasets
from pyarrow import parquet

datasets.disable_progress_bars()


def loaded(name, answers):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    return datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache")


texts = ["007", "1e3", "null", "true", "1/2", "12"]
pure, mixed, dates = loaded("a.jsonl", texts), loaded("b.jsonl", [*texts, 12]), loaded("c.jsonl", ["2024-01-02"])
mixed.to_parquet("b.parquet")
seen = {
    "texts alone ": pure["answer"][:],
    "and a number": mixed["answer"][:],
    "its parquet ": parquet.read_table("b.parquet")["answer"].to_pylist(),
    "a date      ": [str(type(value).__name__) for value in dates["answer"]],
}
for name, value in seen.items():
    print(f"RESULT {name}: {value}")
expected = [
    texts,
    [7, 1000.0, None, True, "1/2", 12, 12],
    ["007", "1e3", "null", "true", '"1\\/2"', "12", "12"],
    ["datetime"],
]
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
#   texts alone : ['007', '1e3', 'null', 'true', '1/2', '12']
#   and a number: [7, 1000.0, None, True, '1/2', 12, 12]
#   its parquet : ['007', '1e3', 'null', 'true', '"1\\/2"', '12', '12']
#   a date      : ['datetime']
