"""A suite, run in this process: in pieces, again, and after an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.tracking.tracker import read_metrics
from tests.integration.chaos import Nodes
from tests.integration.namespaces import wait_until

pytestmark = pytest.mark.integration

SUITE = """
name: mine
about: A test.
base: demo-math
seeds: [0]
settings:
  learner.num_steps: 1
  learner.warmup_steps: 0
  rollout.num_prompts: 2
  rollout.num_samples: 2
  data.train: {name: factor, kind: tiny, limit: 6}
  data.evaluation:
    - {name: factor, kind: tiny, split: held_out, limit: 2}
    - {name: divide, kind: tiny, split: out_of_domain, limit: 2}
  reference.num_samples: 2
  reference.threshold: 1
  reference.rows_per_step: 2
  evaluation.num_samples: 2
  evaluation.k: [1, 2]
  tracking.tensorboard: false
arms:
  grpo: {algorithm.divergence: none}
  dph-f: {algorithm.divergence: forward_kl}
  dph-js: {algorithm.divergence: js}
  strict: {algorithm.divergence: js, reference.threshold: 2}
quick: {seeds: [0], arms: [grpo]}
"""


def run(suite: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["experiment", str(suite), "--inline", "--run-dir", str(suite.parent), *arguments])


# Parts of the names of metrics that a clock decides.
TIMED = ("time/", "reward/latency", "tokens_per_s", "gb_per_s", "busy_fraction")


def test_a_suite_in_pieces_adds_up_and_goes_on_where_it_stopped(
    tmp_path: Path, tiny_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(SUITE)
    done = run(suite, "--arms", "grpo,dph-f")
    assert done.exit_code == 0, done.output
    done = run(suite, "--arms", "dph-js,strict")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert list(results["arms"]) == ["base", "grpo", "dph-f", "dph-js", "strict"], (
        "results of the first piece are not lost"
    )
    assert {"in_domain", "out_of_domain"} == set(results["arms"]["dph-f"])
    assert "reference buffer reused" in done.output, "arms of a seed share it"
    assert "reference is not reused: selection changed" in done.output
    assert "selecting from its graded responses" in done.output, "another threshold samples nothing anew"
    assert "evaluating base" not in done.output, "and the base's evaluation"
    assert not (tmp_path / "mine" / "grpo-s0" / "reference").exists()

    # Again, by another way to the same folder: nothing is trained.
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["experiment", "mine.yaml", "--inline", "--run-dir", "."])
    assert done.exit_code == 0, done.output
    assert "4 runs, 4 finished already" in done.output
    assert "step 1/1" not in done.output

    # Cut off in its last evaluation.
    (tmp_path / "mine" / "dph-f-s0" / "eval" / "step_1.json").write_text("[{")
    done = run(suite)
    assert done.exit_code == 0, done.output
    assert "4 runs, 3 finished already" in done.output
    assert "resume: 1 steps done" in done.output

    done = run(suite, "learner.lr=0.5")
    assert done.exit_code == 2
    assert "holds a run of another configuration" in done.output


def test_parallel_runs_share_what_the_first_of_a_seed_leaves(tmp_path: Path, tiny_dir: str) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(SUITE)
    done = run(suite, "--arms", "grpo,dph-f,dph-js", "--parallel", "2")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert list(results["arms"]) == ["base", "grpo", "dph-f", "dph-js"]
    logs = {arm: (tmp_path / "mine" / f"{arm}-s0" / "run.log").read_text() for arm in results["arms"] if arm != "base"}
    assert "reference stage: completions" in logs["dph-f"], "plain GRPO has no buffer to leave, so it is not the first"
    assert "reference buffer reused" in logs["dph-js"]
    assert [arm for arm, log in logs.items() if "evaluating base" in log] == ["dph-f"]

    done = run(suite, "--arms", "dph-f,dph-js", "--seeds", "3", "--parallel", "2", "reference.max_bytes=1")
    assert done.exit_code == 2, "bad input, as it is without --parallel"
    assert done.output.count("error: reference.max_bytes=1: the samples to rehearse take") in (1, 2)
    assert "tried again" not in done.output


@pytest.mark.long
@pytest.mark.timeout(600)
def test_runs_go_on_after_their_cluster_was_gone(tiny_dir: str) -> None:
    """On Ray and vLLM: every node ends at once, and another cluster comes up at the same address."""
    folder = Path(tempfile.mkdtemp(prefix="again-", dir="/tmp"))  # short, because sockets lie below it
    suite, said = folder / "mine.yaml", folder / "said"
    suite.write_text(SUITE.replace("num_steps: 1", "num_steps: 60\n  checkpoint.every_steps: 1"))
    nodes = Nodes(folder)
    command = [sys.executable, "-m", "dphrl", "experiment", str(suite), "--arms", "grpo,dph-f", "--parallel", "2"]
    command += ["--run-dir", str(folder), f"cluster.address={nodes.address}"]
    try:
        with said.open("w") as output:
            suite_process = subprocess.Popen(
                command, env=nodes.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        first = folder / "mine" / "dph-f-s0"
        wait_until(lambda: len(read_metrics(first)) >= 2, "two steps", 200)
        nodes.restart(down_s=5)
        assert suite_process.wait(300) == 0, said.read_text()[-3000:]
        assert "dph-f, seed 0 failed and is tried again: " in said.read_text()
        for run in (first, folder / "mine" / "grpo-s0"):
            assert [step["step"] for step in read_metrics(run)] == list(range(1, 61))
        assert "steps done" in (first / "run.log").read_text(), "it went on, and did not begin anew"
    finally:
        suite_process.kill()
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_deterministic_runs_give_the_same_figures_on_engines_that_went_before(tmp_path: Path, tiny_dir: str) -> None:
    suite = tmp_path / "mine.yaml"
    twice = (
        "\n  once: {algorithm.divergence: js}\n  again: {algorithm.divergence: js}\nquick: {seeds: [0], arms: [once]}"
    )
    text = SUITE[: SUITE.index("\n  grpo:")].replace("num_steps: 1", "num_steps: 3") + twice
    suite.write_text(text.replace("settings:", "settings:\n  deterministic: true\n  cluster.num_cpus: 2"))
    # On Ray and vLLM, in a process of its own: the second run finds an engine with the first one's history.
    command = [sys.executable, "-m", "dphrl", "experiment", str(suite), "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("rollout engine 0 up") == 2
    first, second = (read_metrics(tmp_path / "mine" / f"{arm}-s0") for arm in ("once", "again"))
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        same = {key for key in a if not any(timed in key for timed in TIMED)}
        assert {"policy/loss", "divergence/loss", "learner/grad_norm", "sync/logprob_gap_max"} <= same
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    evaluations = [(tmp_path / "mine" / f"{arm}-s0" / "eval" / "step_3.json").read_text() for arm in ("once", "again")]
    assert evaluations[0] == evaluations[1]
