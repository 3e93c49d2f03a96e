#!/usr/bin/env bash
# Ray 2.60.0: a reference that an actor's streaming generator yields inside a value is dead before the caller can use it.
#
# One would expect: what an actor puts into the object store lives as long as somebody holds its reference. A task that
# *returns* [ray.put(x)] keeps that promise: whoever unpacks the list may use the reference for as long as he likes.
# Seen: a generator with num_returns="streaming" that *yields* [ray.put(x)] does not, when its caller reads along with
# asyncio. Of twelve arrays one or two, other ones each time, are deleted before the task that gets them has them, although
# the caller has unpacked the list and holds the reference. That task fails with ReferenceCountingAssertionError ("The
# object has already been deleted by the reference counting protocol").
#
# Why it matters: a stream of large things, such as the weights of a model in chunks, is tempting to send this way, so that
# the caller can read the small list without fetching the chunk. Small models pass by luck. dphrl yields each chunk itself.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0 numpy==2.5.2

cat >"$work/program.py" <<'PY'
import asyncio
import sys
import time

import numpy as np
import ray

NUM_ITEMS, NUM_ROUNDS = 12, 3


@ray.remote
class Owner:
    @ray.method(num_returns="streaming", _generator_backpressure_num_objects=2)
    def stream(self):
        for i in range(NUM_ITEMS):
            yield [ray.put(np.full(2**22, i))]

    def whole(self):
        return [ray.put(np.full(2**22, i)) for i in range(NUM_ITEMS)]


@ray.remote
class Reader:
    def first(self, array):
        time.sleep(0.1)
        return int(array[0])


async def read(reference):
    """The first number of what a reader got, or -1 where it got nothing."""
    try:
        return await reader.first.remote(reference)
    except ray.exceptions.RayTaskError:
        return -1


async def along():
    """The caller is at most two arrays ahead of the reader."""
    stream, reading, seen = owner.stream.remote(), [], []
    while (item := await anext(stream, None)) is not None:
        (reference,) = await item
        reading.append(asyncio.create_task(read(reference)))
        if len(reading) == 2:
            seen.append(await reading.pop(0))
    return seen + [await one for one in reading]


async def returned():
    return [await read(reference) for reference in await owner.whole.remote()]


ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
owner, reader = Owner.remote(), Reader.remote()
print(f"ray {ray.__version__}, the first number of each array, -1 for one that was deleted")
print("references in a returned list:", whole := asyncio.run(returned()))
rounds = [asyncio.run(along()) for _ in range(NUM_ROUNDS)]
for seen in rounds:
    print("references in yielded lists:  ", seen)
sys.exit(0 if whole == list(range(NUM_ITEMS)) and any(-1 in seen for seen in rounds) else 1)
PY
cd "$work"
HOME=$work RAY_USAGE_STATS_ENABLED=0 "$work/venv/bin/python" program.py 2>"$work/errors" || {
    cat "$work/errors" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
# Output seen (which ones are lost differs from run to run):
#   ray 2.60.0, the first number of each array, -1 for one that was deleted
#   references in a returned list: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
#   references in yielded lists:   [0, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10, 11]
#   references in yielded lists:   [0, 1, -1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
#   references in yielded lists:   [0, 1, 2, 3, 4, 5, 6, -1, 8, 9, 10, 11]
