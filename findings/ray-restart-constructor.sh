#!/usr/bin/env bash
# Ray 2.60.0: an actor with max_restarts=-1 is given up for good when its constructor raises in a restart.
#
# One would expect: "restart it for ever" covers a restart that fails, as it covers a process that dies in it; the
# constructor worked before, and what hinders it (a licence server, a full disk, a child process that is killed) may pass.
# Seen: where the process of the constructor ends (os._exit), Ray starts the actor again and again, and it comes back. Where
# the constructor raises, the actor is dead: no further restart, and every later call raises ActorDiedError, also long after
# the obstacle is gone.
#
# Why it matters: a pool that keeps asking a worker "are you back?" asks for ever, and a run with one such worker has lost
# its grading to a moment's trouble. dphrl's reward workers end their process instead of raising, unless it is their
# first start (ray.get_runtime_context().was_current_actor_reconstructed).
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0

cat >"$work/program.py" <<'PY'
import os
import sys
import time
from pathlib import Path

import ray

obstacle, how = Path(sys.argv[1]), sys.argv[2]


@ray.remote(max_restarts=-1, num_cpus=0)
class Worker:
    def __init__(self, obstacle, how):
        if obstacle.exists():
            if how == "raises":
                raise OSError("no licence")
            os._exit(1)

    def ready(self):
        return True


def answer(worker):
    try:
        return ray.get(worker.ready.remote(), timeout=20)
    except Exception as error:
        return type(error).__name__


ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
worker = Worker.remote(obstacle, how)
assert answer(worker) is True
obstacle.touch()
ray.kill(worker, no_restart=False)
time.sleep(8)
print(how, "- while the obstacle is there:", answer(worker), flush=True)
obstacle.unlink()
for _ in range(15):
    after = answer(worker)
    if after is True:
        break
    time.sleep(1)
print(how, "- after it is gone:", after, flush=True)
PY
export RAY_USAGE_STATS_ENABLED=0 HOME="$work"
raises=$("$work/venv/bin/python" "$work/program.py" "$work/obstacle" raises 2>/dev/null)
ends=$("$work/venv/bin/python" "$work/program.py" "$work/obstacle" ends 2>/dev/null)
echo "$raises"
echo "$ends"
grep -q "raises - after it is gone: ActorDiedError" <<<"$raises"
grep -q "ends - after it is gone: True" <<<"$ends"
