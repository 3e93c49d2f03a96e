#!/usr/bin/env bash
# pyarrow 26.0.1, datasets 5.2.0: a bit that flips in a Parquet file changes a problem of the data set, unnoticed.
#
# A data set of sums is written as Parquet, then one bit of the file is flipped, as a bad disk or a bad copy does it:
# the question "What is 0 + 0?" becomes "What is 0 + 1?", its answer stays 0.
# One would expect: an error. The format has a CRC32 for each page, and pyarrow has page_checksum_verification.
# Seen:
#                                            datasets.load_dataset   pyarrow, as it comes   pyarrow with verification
#   written by datasets.Dataset.to_parquet   the wrong question      the wrong question     the wrong question
#   written with write_page_checksum=True    the wrong question      the wrong question     OSError
#
# Why it matters: neither library writes checksums unless told to, verification of a page without one succeeds, and
# load_dataset ignores those that are there. A run trains on the wrong question or, in stored tokens, on another token.
# dphrl writes its reference buffer with page checksums and verifies them.
#
# Needs Python 3.11 and a package index; a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1 datasets==5.2.0
cat >"$work/program.py" <<'PY'
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq

datasets.disable_progress_bars()
work = Path(sys.argv[1])
rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(200)]
whole = datasets.Dataset.from_list(rows)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"What is 0 + 0?") + len("What is 0 + ")] ^= 1
    path.write_bytes(data)


def load_dataset(path):
    read = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(work / path.stem))
    return read["question"][0]


def read_table(path, **options):
    return pq.read_table(path, **options).to_pylist()[0]["question"]


def verified(path):
    try:
        return read_table(path, page_checksum_verification=True)
    except OSError as error:
        return f"OSError: {error}"


plain, checked = work / "plain.parquet", work / "checked.parquet"
whole.to_parquet(plain)
pq.write_table(whole.data.table, checked, write_page_checksum=True)
seen = {}
for path in (plain, checked):
    assert verified(path) == "What is 0 + 0?"
    flip_a_bit(path)
    seen[path.stem] = [load_dataset(path), read_table(path), verified(path)]
    print(f"{path.stem:8}", *seen[path.stem], sep=" | ")
wrong = "What is 0 + 1?"
as_described = seen["plain"] == [wrong] * 3 and seen["checked"][:2] == [wrong] * 2 and "CRC" in seen["checked"][2]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PY
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/program.py" "$work"
