"""Ray's workers keep to the program's own packages when the driver's folder holds others of the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
THEIRS = "raise SystemExit('theirs was loaded')"

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import ray
from dphrl.own_code import pin
pin()
sys.path.remove({root!r})
import typer
from actors.reward import RewardWorker
from cluster.cli.support import exit_status
from cluster.connection import connect
from dphrl.config.data import RewardConfig
from dphrl.config.loading import load_config

@ray.remote(num_cpus=0)
def look():
    import actors.waiting, cluster.jobs, dphrl, my_rewards
    return [dphrl.__path__[0], actors.__path__[0], cluster.__path__[0], my_rewards.__file__]

try:
    with exit_status():
        connect(load_config("demo-math", ["cluster.num_cpus=1", "cluster.object_store_gib=0.2"]))
        print(*ray.get(look.remote()))
        worker = RewardWorker.options(num_cpus=0.5).remote(RewardConfig(name="my_rewards:same"))
        ray.get(worker.ready.remote())
        print(*[str(result.status) for result in ray.get(worker.grade.remote([("4", "4"), ("5", "4")]))])
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""
REWARD = "def same(completion, answer):\n    return completion == answer\n"


def run_in(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**cleared, "RAY_USAGE_STATS_ENABLED": "0", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_actors_are_ours_and_the_reward_is_the_users(tmp_path: Path) -> None:
    for name in ("dphrl", "actors", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(THEIRS)
    done = run_in(tmp_path)
    assert done.returncode == 0, done.stderr
    found, verdicts = done.stdout.splitlines()
    assert found.split() == [
        *(str(ROOT / name) for name in ("dphrl", "actors", "cluster")),
        f"{tmp_path}/my_rewards.py",
    ]
    assert verdicts == "correct wrong"


def test_a_worker_that_has_loaded_another_package_says_which(tmp_path: Path) -> None:
    """As a node's sitecustomize may do, before anything that a driver sends."""
    start, theirs = tmp_path / "start", tmp_path / "start" / "actors"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").touch()
    # Only what Ray starts is amiss.
    (start / "sitecustomize.py").write_text(
        "import sys\nif any('default_worker' in word for word in sys.orig_argv):\n    import actors\n"
    )
    done = run_in(tmp_path, PYTHONPATH=str(start))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"dphrl: error: actors: a process on {os.uname().nodename} has loaded {theirs} under that name"
    )
