"""Faults of users, end to end: one line that says what, where and what to do; the exit status; and soon.

docs/operations.md has a table of them, and the last test holds it against this list. To add a fault, add a Case and a
row there. Commands run two at a time before the first test: most of each is the import of libraries.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dphrl.config.loading import config_to_yaml, load_config

ROOT = Path(__file__).resolve().parents[2]
WALL_S = 240.0
SETUP = 'set -o pipefail; dphrl() { "$PYTHON" -m dphrl "$@"; }; '
BASE = (
    # A run folder each: they run side by side, and a folder has one owner.
    "base: demo-math\nrun_name: %s\nreward: {name: math_answer}\nmodel: {path: %s}\n"
    "data: {train: {name: mine, kind: math, path: %s, prompt_field: q, answer_field: a}, evaluation: []}\n"
    "evaluation: {num_samples: 0}\n"
)
GOOD_ROW = json.dumps({"q": "1 + 1?", "a": "2"}) + "\n"


@dataclass(frozen=True)
class Case:
    """A command in a folder with broken files, and how it must end.

    name: its row in docs/operations.md. command: for bash; `dphrl` is the program. status: the exit status.
    line: a pattern of the one line on standard error; "" for silence. cpu_s: the processor time that it may take, after
    which the system ends it; a loaded machine does not count.
    """

    name: str
    command: str
    status: int = 2
    line: str = ""
    cpu_s: int = 10
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: str = ""


CONFIGURATION = [
    Case(
        "aliases of aliases", "dphrl plan bomb.yaml", line=r"bomb.yaml: not valid YAML: aliases make more than 200,000"
    ),
    Case(
        "nesting of a configuration", "dphrl plan deep.yaml", line=r"deep.yaml:2: not valid YAML: nested more than 50 d"
    ),
    Case("a repeated key", "dphrl plan twice.yaml", line=r"twice.yaml:3: not valid YAML: key 'seed' appears twice"),
    Case("a configuration of megabytes", "dphrl plan large.yaml", line=r"large.yaml: not valid YAML: more than 1 MiB"),
    Case(
        "a number of 100,000 digits",
        "dphrl plan digits.yaml",
        line=r"digits.yaml: seed: expected an integer >= 0 \(got",
    ),
    Case(
        "an absurd number",
        "dphrl plan demo-math rollout.num_samples=1000000000000",
        line=r"command line: rollout.num_samples: expected an integer >= 1 and <= 100,000 \(got 1000000000000\)",
    ),
    Case(
        "an absurd product",
        "dphrl plan demo-math rollout.num_prompts=10000000",
        line=r"rollout.num_prompts=10000000 x rollout.num_samples=8 are 80,000,000 completions a step.*; lower one",
    ),
    Case("not a number", "dphrl plan demo-math learner.lr=.nan", line=r"learner.lr: expected a number > 0 \(got NaN\)"),
    Case(
        "a secret among the settings",
        "dphrl plan demo-math reward.name=my:grade 'reward.params={api_key: Sesame-1234}'",
        line=r"reward.params.api_key: looks like a secret",
    ),
    Case(
        "a secret in a job",
        "dphrl submit demo-math --env HF_TOKEN",
        line=r"--env HF_TOKEN: looks like a secret.*; set it in the environment of the cluster's nodes",
        env={"HF_TOKEN": "sesame"},
    ),
]
PLACES = [
    Case(
        "run_dir is a file",
        "dphrl train demo-math run_dir=file",
        line=r"run_dir: file/demo-math cannot be written \(file i",
    ),
    Case(
        "a read-only run folder",
        "dphrl sample demo-math run_dir=/proc/runs",
        line=r"run_dir: /proc/runs/.* cannot be wri",
    ),
    Case(
        "a run_name that is too long",
        f"dphrl train demo-math --inline run_name={'x' * 300}",
        line=r"run_dir: runs/x+ cannot be written \(File name too long\); choose another place",
    ),
    Case(
        "the result's file cannot be written",
        "dphrl eval demo-math --model tiny-factor -o file/result.json",
        line=r"file/result.json: cannot be written \(file is no folder\); name another file",
    ),
    Case(
        "the report cannot be written",
        "dphrl report run -o file/r.html",
        line=r"file/r.html: cannot be written",
    ),
    Case(
        "a rendered file cannot be written",
        "dphrl render slurm demo-math -o file/x",
        line=r"file/x: cannot be wr",
    ),
    Case(
        "the cache cannot be written",
        "dphrl train demo-math --inline",
        line=r"model tiny-factor: the folder for embedded models cannot be written .*; set DPHRL_CACHE",
        env={"DPHRL_CACHE": "file/cache"},
    ),
]
MODELS_AND_DATA = [
    Case(
        "weights that are cut off",
        "dphrl train half.yaml --inline",
        line=r"half/model.safetensors has .* bytes where its",
    ),
    Case("a model without weights", "dphrl train bare.yaml --inline", line=r"model.path: .*/bare holds no weights"),
    Case(
        "nesting of a row",
        "dphrl train nested.yaml --inline",
        line=r"nested.jsonl:2: not a line of JSON: maximum recursion depth exceeded .*; mend it",
    ),
    Case(
        "half of a character in a row",
        "dphrl train half-letter.yaml --inline",
        line=r"half-letter.jsonl:2: 'q' holds a lone",
    ),
    Case(
        "a gold of a million characters",
        "dphrl train gold.yaml --inline",
        line=r"1 of 2 rows have no gold to grade against: gold.jsonl:2: .*: 1,000,001 characters, more than any answer",
    ),
    Case(
        "a broken row to score", "dphrl score math -o /dev/null -", stdin="[" * 100_000, line=r"-:1: not a line of JSON"
    ),
]
STREAMS = [
    Case(
        "a full standard output",
        "dphrl presets > /dev/full",
        status=1,
        line=r"dphrl: failed: standard output cannot be written: No space left on device",
    ),
    Case(
        "a closed standard output", "dphrl version >&-", status=1, line=r"standard output cannot be written: Bad file"
    ),
    Case("a reader that goes", "{ sleep 1; dphrl plan demo-math; } | head -c 0", status=1),
    Case("a closed standard error", "dphrl plan nope 2>&-"),
    Case("a full standard error", "dphrl plan nope 2> /dev/full"),
]
CASES = [*CONFIGURATION, *PLACES, *MODELS_AND_DATA, *STREAMS]


def write_files(folder: Path, model: str) -> None:
    """The broken files that the commands name."""
    aliases = "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 10))
    texts = {
        "bomb.yaml": f"a0: &a0 [x]\n{aliases}",
        "deep.yaml": "a:\n  " + "[" * 100_000,
        "twice.yaml": "base: demo-math\nseed: 1\nseed: 2\n",
        "large.yaml": "x" * 2**21,
        "digits.yaml": f"base: demo-math\nseed: {'9' * 100_000}\n",
        "file": "a file",
        "nested.jsonl": GOOD_ROW + '{"q": "?", "a": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        "half-letter.jsonl": GOOD_ROW + json.dumps({"q": "a \ud800", "a": "1"}) + "\n",
        "gold.jsonl": GOOD_ROW + json.dumps({"q": "?", "a": "1+" * 500_000 + "1"}) + "\n",
        "half.yaml": BASE % ("half-run", folder / "half", "gold.jsonl"),
        "bare.yaml": BASE % ("bare-run", folder / "bare", "gold.jsonl"),
        **{
            f"{name}.yaml": BASE % (f"{name}-run", model, f"{name}.jsonl") for name in ("nested", "half-letter", "gold")
        },
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("half", "bare"):
        shutil.copytree(model, folder / name)
    (folder / "bare" / "model.safetensors").unlink()
    os.truncate(folder / "half" / "model.safetensors", 100_000)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config_to_yaml(load_config("demo-math")))


def run(case: Case, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **case.env}
    return subprocess.run(
        ["bash", "-c", f"ulimit -t {case.cpu_s}; {SETUP}{case.command}"],
        cwd=folder,
        env={**os.environ, **environment},
        input=case.stdin,
        capture_output=True,
        text=True,
        timeout=WALL_S,
        check=False,
    )


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, tiny_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """What became of the commands of the selected cases."""
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder, tiny_dir)
    asked = {item.callspec.params["case"].name for item in request.session.items if "case" in _params(item)}
    with ThreadPoolExecutor(2) as pool:
        return {case.name: pool.submit(run, case, folder) for case in CASES if case.name in asked}


def _params(item: pytest.Item) -> Mapping[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_one_line_and_the_right_status(
    case: Case, ended: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = ended[case.name].result()
    assert done.returncode == case.status, (done.stdout[-500:], done.stderr[-500:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("dphrl: ")]
    assert "Traceback" not in done.stdout + done.stderr
    assert "sesame" not in done.stdout + done.stderr
    if not case.line:
        assert done.stderr == ""
        return
    (line,) = lines
    assert re.search(case.line, line), line
    assert line.startswith("dphrl: failed: " if case.status == 1 else "dphrl: error: ")


def test_the_table_of_the_documentation_has_every_case() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| `[^|]*` \| (\d+) \|$", text, re.MULTILINE)
    told = {name: int(status) for name, status in rows}
    assert {case.name: case.status for case in CASES}.items() <= told.items()
