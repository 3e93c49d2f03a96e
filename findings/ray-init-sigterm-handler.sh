#!/usr/bin/env bash
# Ray 2.60.0: ray.init() takes the process's SIGTERM handler away and does not give it back.
#
# One would expect: a program that handles SIGTERM (to save before Kubernetes or Slurm ends it) goes on to hear it after
# it has connected to Ray; a library that needs a handler of its own would call the one before it.
# Seen: ray.init(address="local") puts another handler in its place, in the driver's process, which ends that process on
# the spot with status 15: the program's own handler is never called. ray.shutdown() does not bring it back either.
#
# Why it matters: a training that saves a checkpoint when it is told to end has lost the signal from the moment that Ray
# is up, and nothing says so; it is noticed when the first pre-empted job has saved nothing. dphrl puts its handler back
# after ray.init.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0

cat >"$work/program.py" <<'PY'
import os
import signal
import sys
import time

import ray


def save_first(number, frame):
    print("the program's own handler was called", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, save_first)
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
print("after ray.init: own handler", signal.getsignal(signal.SIGTERM) is save_first, flush=True)
if sys.argv[1] == "shutdown":
    ray.shutdown()
    print("after ray.shutdown: own handler", signal.getsignal(signal.SIGTERM) is save_first, flush=True)
else:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
PY
export RAY_USAGE_STATS_ENABLED=0 HOME="$work"
shutdown=$("$work/venv/bin/python" "$work/program.py" shutdown 2>/dev/null)
status=0
killed=$("$work/venv/bin/python" "$work/program.py" kill 2>/dev/null) || status=$?
echo "$shutdown"
echo "$killed"
echo "exit status after SIGTERM: $status"
grep -q "after ray.init: own handler False" <<<"$shutdown"
grep -q "after ray.shutdown: own handler False" <<<"$shutdown"
! grep -q "own handler was called" <<<"$killed"
[ "$status" = 15 ]
