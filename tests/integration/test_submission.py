"""Submissions as users make them, to three nodes: from a full repository, with a wheel, while others hold the CPUs."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_cluster import ROOT, SMALL, Cluster, cluster

__all__ = ["cluster"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

MB = 10**6
SECRET = "sesame-open-0123456789"
KEY = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----\n"
ONE_STEP = [
    *SMALL,
    *("learner.num_steps=1", "rollout.num_engines=1", "evaluation.num_samples=0", "algorithm.divergence=none"),
]
# It says where its worker has found the program's packages, and what is in the folder that the worker starts in.
REWARD = """
import os, sys

async def brevity(completion, answer):
    import actors, cluster, dphrl
    found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names)
    places = [os.path.dirname(module.__path__[0]) for module in (dphrl, actors, cluster)]
    with open(sys.modules[__name__].FOUND, "w") as file:
        print(*places, os.getcwd(), *found, sep="\\n", file=file)
    return -len(completion) / 100
"""


def shown_of(cluster: Cluster, job_id: str) -> dict[str, Any]:
    """Everything that the dashboard shows of a job."""
    headers = {"Authorization": f"Bearer {cluster.token}"}
    request = urllib.request.Request(f"{cluster.address}/api/jobs/{job_id}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        shown: dict[str, Any] = json.load(answer)
        return shown


def test_a_full_repository_is_submitted_without_its_data_and_secrets(cluster: Cluster, tmp_path: Path) -> None:
    repository, found = tmp_path / "repository", tmp_path / "found.txt"
    for name in ("actors", "cluster", "dphrl", "tests"):
        (repository / name).mkdir(parents=True)
        (repository / name / "__init__.py").write_text("raise SystemExit('the package of the repository was loaded')")
    (repository / "my_rewards.py").write_text(f"FOUND = {str(found)!r}\n{REWARD}")
    (repository / ".env").write_text(f"HF_TOKEN={SECRET}\n")
    (repository / "deploy_key").write_text(KEY)
    (repository / "data").mkdir()
    for name in ("a.parquet", "b.jsonl"):
        (repository / "data" / name).touch()
        os.truncate(repository / "data" / name, 350 * MB)
    submitted = cluster.dphrl(
        *("submit", "demo-math", *ONE_STEP, "reward.name=my_rewards:brevity", "run_name=full"),
        *(f"run_dir={tmp_path / 'runs'}", "--address", cluster.address, "--wait"),
        cwd=repository,
    )
    stdout, stderr = submitted.communicate()
    assert submitted.returncode == 0, stdout[-3000:] + stderr[-3000:]
    (step,) = (tmp_path / "runs" / "full" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(step)["reward/signal_mean"] < 0

    told = re.search(r"^uploaded 5 files, ([\d.]+) kB, of ", stdout, flags=re.MULTILINE)
    assert told, stdout[:1000]
    assert "not uploaded, as data or models: data/ 700 MB" in stdout
    assert "not uploaded, as secrets: .env, deploy_key" in stdout
    lines = found.read_text().splitlines()
    places, there, files = lines[:3], Path(lines[3]), {*lines[4:]}
    assert places == [str(ROOT)] * 3
    assert files == {"./my_rewards.py", *(f"./{name}/__init__.py" for name in ("actors", "cluster", "dphrl", "tests"))}
    shown = shown_of(cluster, "full")
    assert SECRET not in json.dumps(shown)
    assert shown["runtime_env"]["working_dir"].endswith(f"{there.name}.zip")
    assert float(told[1]) < 10


@pytest.mark.long
def test_a_wheel_alone_is_what_runs(cluster: Cluster, tmp_path: Path) -> None:
    """As `pip wheel --no-deps` makes it. What it requires is on the nodes, and nobody fetches it again."""
    found = tmp_path / "found.txt"
    wheel = tmp_path / "dphrl-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package in ("dphrl", "actors", "cluster"):
            for path in (ROOT / package).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(ROOT))
        archive.writestr("my_rewards.py", f"FOUND = {str(found)!r}\n{REWARD}")
        archive.writestr(
            "dphrl-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.4\nName: dphrl\nVersion: 0.1.0\nRequires-Dist: no-such-package==99\n",
        )
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("dphrl-0.1.0.dist-info/WHEEL", tag)
        archive.writestr("dphrl-0.1.0.dist-info/RECORD", "")
    submitted = cluster.dphrl(
        *("submit", "demo-math", *ONE_STEP, "reward.name=my_rewards:brevity", "run_name=wheel", "--no-upload"),
        *("--wheel", str(wheel), f"run_dir={tmp_path}", "--address", cluster.address, "--wait"),
        cwd=tmp_path,
    )
    stdout, stderr = submitted.communicate()
    assert submitted.returncode == 0, stdout[-3000:] + stderr[-3000:]
    places = {Path(line) for line in found.read_text().splitlines()[:3]}
    assert len(places) == 1
    assert "py_modules_files" in places.pop().parts


def test_a_second_job_waits_and_says_for_what(cluster: Cluster, tmp_path: Path) -> None:
    """The first takes 2.5 of 3 CPUs. When it is stopped, its step is saved, its log kept, and the second runs."""

    def submit(name: str, *more: str) -> None:
        submitted = cluster.dphrl(
            *("submit", "demo-math", *SMALL, *more, f"run_name={name}", f"run_dir={tmp_path}"),
            *("--no-upload", "--address", cluster.address),
        )
        stdout, stderr = submitted.communicate()
        assert submitted.returncode == 0, stdout + stderr

    def listed() -> dict[str, Any]:
        stdout, stderr = cluster.dphrl("jobs", "list", "--json", "--address", cluster.address).communicate()
        assert not stderr
        return {job["job"]: job for job in json.loads(stdout)}

    def until(job: str, key: str, pattern: str = "", timeout_s: float = 180.0) -> dict[str, Any]:
        """Before its program runs, a pending job waits for what Ray says; so a pattern tells which word is meant."""
        deadline = time.monotonic() + timeout_s
        while not ((found := listed())[job][key] and re.fullmatch(pattern or ".*", str(found[job][key]), re.DOTALL)):
            assert time.monotonic() < deadline, f"{job} has no {key} like {pattern!r}: {found[job]}"
            assert found[job]["status"] in ("pending", "running", "waiting"), found[job]
        return found

    submit("holder", "learner.num_steps=5000")
    holder = until("holder", "step")["holder"]
    assert (holder["status"], holder["num_steps"]) == ("running", 5000)
    assert holder["gap"] < 1e-3
    assert holder["left_s"] > 0
    assert 0 <= holder["reward"] <= 1
    submit("second", "learner.num_steps=1")
    said = r"waits for 2\.?\d* of 2\.5 CPUs; holder holds them; "
    assert until("second", "waits_for", said + "first in the queue")["second"]["status"] == "waiting"
    submit("third", "learner.num_steps=1")
    assert until("third", "waits_for", said + "number 2 in the queue, after second")["third"]["status"] == "waiting"
    table = cluster.dphrl("jobs", "list", "--address", cluster.address).communicate()[0]
    shown = r"^holder +running +\d+/5000 +\d\.\d{3} +\de-\d+ +\d.* dphrl train demo-math "
    assert re.search(shown, table, re.MULTILINE), table
    assert re.search(r"^second +waiting +- .* waits for ", table, re.MULTILINE)
    for name in ("third", "holder"):
        stopped = cluster.dphrl("jobs", "stop", name, "--address", cluster.address)
        assert stopped.communicate()[0] == f"{name} is being stopped\n"
    held = cluster.dphrl("jobs", "logs", "holder", "--follow", "--address", cluster.address)
    # Ray alone would kill it after 3 s, with nothing saved.
    (last,) = re.findall(r"stopped by SIGTERM; .* goes on after step (\d+)", held.communicate()[0])
    assert (tmp_path / "holder" / "checkpoints" / f"step_{last}" / "manifest.json").is_file()
    assert held.returncode == 130
    following = cluster.dphrl("jobs", "logs", "second", "--follow", "--address", cluster.address)
    log = following.communicate()[0]
    assert following.returncode == 0, log[-3000:]
    assert re.search(r"^found its places after \d+ s$", log, re.MULTILINE)
    ended = listed()
    assert [ended["second"][key] for key in ("status", "step", "num_steps", "left_s")] == ["succeeded", 1, 1, None]
    assert [ended[name]["status"] for name in ("holder", "third")] == ["stopped"] * 2
