#!/usr/bin/env bash
# Ray 2.60.0: a worker_process_setup_hook cannot put a folder first on sys.path.
#
# One would expect: the hook runs before any task, so a folder that it inserts at sys.path[0] is where the tasks' imports
# look first.
# Seen: Ray inserts the driver's own folder at sys.path[0] again after the hook has run. A module that lies in both
# folders comes from the driver's. Only a module that the hook imports itself is safe, because it is loaded already.
#
# Why it matters: a program that is shipped to workers as installed packages can be hidden there by a folder of the same
# name beside the user's script. dphrl therefore loads its packages in the hook, and leaves sys.path alone.
#
# Needs Python 3.11 and a package index; about a minute. Exit status 0: the behaviour is still as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.60.0

mkdir "$work/driver" "$work/hook"
for folder in driver hook; do
    for module in looked_up loaded_by_hook; do echo "PLACE = '$folder'" >"$work/$folder/$module.py"; done
done
cat >"$work/driver/program.py" <<'PY'
import sys

import ray

FOLDER = sys.argv[1]


def hook():
    import sys

    sys.path.insert(0, FOLDER)
    import loaded_by_hook  # noqa: F401


@ray.remote
def look():
    import loaded_by_hook
    import looked_up

    return looked_up.PLACE, loaded_by_hook.PLACE, sys.path.index(FOLDER)


environment = {"worker_process_setup_hook": hook}
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
later, before, place = ray.get(look.remote())
print(f"ray {ray.__version__}: imported by the task: from the {later}'s folder; imported by the hook: from the {before}'s")
print(f"the folder that the hook put at sys.path[0] is at sys.path[{place}] when the task runs")
sys.exit(0 if (later, before) == ("driver", "hook") and place > 0 else 1)
PY
cd "$work/driver"
HOME=$work RAY_USAGE_STATS_ENABLED=0 "$work/venv/bin/python" program.py "$work/hook" 2>"$work/errors" || {
    cat "$work/errors" >&2
    echo "the behaviour has changed" >&2
    exit 1
}
# Output seen:
#   ray 2.60.0: imported by the task: from the driver's folder; imported by the hook: from the hook's
#   the folder that the hook put at sys.path[0] is at sys.path[2] when the task runs
