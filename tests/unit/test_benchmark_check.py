"""`python -m tests.benchmarks --check`: ratios of a benchmark that does nothing but say them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import _check
from tests.benchmarks._check import BASELINES, Baseline, read

FAKE = """
import json, sys
from pathlib import Path
name, *options = sys.argv[1:]
assert options[0] == "--json", options
with Path(__file__).with_name("calls").open("a") as calls:
    calls.write(" ".join([name, *options[1:]]) + "\\n")
if name == "fails":
    sys.exit("it is broken")
print("a table")
if name != "mute":
    print(json.dumps({"benchmark": name, "time_ratio": 2.0, "speed_ratio": 2.0, "seconds": 9, "none": None}))
"""
Check = Callable[..., int]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """check(entries, arguments) -> exit status; the file stays in tmp_path."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)

    def run(entries: Sequence[dict[str, Any]], *arguments: str) -> int:
        path = tmp_path / "baselines.json"
        path.write_text(json.dumps(entries))
        return _check.main(["--check", *arguments], path, [sys.executable, str(fake)])

    return run


def entry(**changes: Any) -> dict[str, Any]:
    return {"benchmark": "a", "ratio": "time_ratio", "better": "lower", "baseline": 2.0, "quick": True} | changes


NOISE = {"tolerance": 0.3, "reason": "noise"}


@pytest.mark.parametrize(
    ("changes", "verdict", "status"),
    [
        ({}, "ok", 0),
        ({"baseline": 1.82}, "ok", 0),
        ({"baseline": 1.81}, "REGRESSED", 1),
        ({"baseline": 9.0}, "ok", 0),
        ({"baseline": 1.5} | NOISE, "ok (up to 40%: noise)", 0),
        ({"baseline": 1.42} | NOISE, "REGRESSED (up to 40%: noise)", 1),
        ({"ratio": "speed_ratio", "better": "higher", "baseline": 2.19}, "ok", 0),
        ({"ratio": "speed_ratio", "better": "higher", "baseline": 2.21}, "REGRESSED", 1),
        ({"ratio": "speed_ratio", "better": "higher", "baseline": 0.5}, "ok", 0),
        ({"baseline": None}, "new", 0),
        ({"ratio": "missing"}, "FAILED", 1),
        ({"ratio": "none"}, "FAILED", 1),
        ({"benchmark": "fails"}, "FAILED", 1),
        ({"benchmark": "mute"}, "FAILED", 1),
    ],
)
def test_a_ratio_is_judged_by_its_baseline(
    check: Check, capsys: Any, changes: dict[str, Any], verdict: str, status: int
) -> None:
    assert check([entry(**changes)]) == status
    assert capsys.readouterr().out.splitlines()[1].endswith("  " + verdict)


def test_the_table(check: Check, capsys: Any) -> None:
    check([entry(baseline=1.6), entry(ratio="speed_ratio", better="higher", baseline=None), entry(benchmark="fails")])
    told = capsys.readouterr()
    assert [line.split() for line in told.out.splitlines()] == [
        ["benchmark", "ratio", "baseline", "now", "change"],
        ["a", "time_ratio", "1.6", "2", "+25.0%", "REGRESSED"],
        ["a", "speed_ratio", "-", "2", "-", "new"],
        ["fails", "time_ratio", "2", "-", "-", "FAILED"],
    ]
    assert "fails: exit status 1: it is broken" in told.err


def test_each_benchmark_runs_once_with_its_options(check: Check, tmp_path: Path) -> None:
    options = {"options": "--rounds 3 --name 'a b'"}
    check([entry(), entry(ratio="speed_ratio"), entry(**options), entry(benchmark="slow", quick=False)])
    assert (tmp_path / "calls").read_text().splitlines() == ["a", "a --rounds 3 --name a b"]


def test_names_choose_and_quick_ones_are_the_default(check: Check, tmp_path: Path) -> None:
    entries = [entry(), entry(benchmark="slow", quick=False), entry(benchmark="b")]
    check(entries, "slow", "a")
    assert (tmp_path / "calls").read_text().splitlines() == ["a", "slow"]


def test_an_unknown_name_runs_nothing(check: Check, tmp_path: Path, capsys: Any) -> None:
    assert check([entry()], "a", "nowhere") == 2
    assert "nowhere: no such benchmark in baselines.json, which has a" in capsys.readouterr().err
    assert not (tmp_path / "calls").exists()


def test_an_update_writes_what_was_measured_and_one_line_an_entry(check: Check, tmp_path: Path) -> None:
    kept = entry(benchmark="slow", quick=False, baseline=7.0, **NOISE)
    assert check([entry(baseline=None), kept, entry(benchmark="fails", baseline=3.0)], "--update") == 1
    lines = (tmp_path / "baselines.json").read_text().splitlines()
    assert lines[1] == '  {"benchmark": "a", "ratio": "time_ratio", "better": "lower", "baseline": 2.0, "quick": true},'
    assert read(tmp_path / "baselines.json") == [
        Baseline("a", "time_ratio", "lower", 2.0, quick=True),
        Baseline("slow", "time_ratio", "lower", 7.0, tolerance=0.3, reason="noise"),
        Baseline("fails", "time_ratio", "lower", 3.0, quick=True),
    ]
    assert check([entry(baseline=0.1)], "--update") == 0, "what is written anew has not regressed"


def test_a_benchmark_that_does_not_end_has_failed(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(json.dumps([entry()]))
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert _check.main(["--check", "--timeout", "0.2"], path, sleeper) == 1
    assert "a: no result within 0.2 s" in capsys.readouterr().err


def test_what_a_check_started_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "baselines.json").write_text(json.dumps([entry()]))
    sleeper = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"
    program = (
        "import sys; from pathlib import Path; from tests.benchmarks import _check; "
        f"_check.main(['--check'], Path('baselines.json'), [sys.executable, '-c', {sleeper!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(BASELINES.parents[2])}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as checking:
        wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"))
        checking.terminate()
    assert checking.returncode == 128 + signal.SIGTERM
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(pid))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"toleranse": 1}, "entry 1: toleranse: no key"),
        ({"better": "bigger"}, "entry 1: better: 'bigger'; use lower or higher"),
        ({"baseline": 0}, "entry 1: baseline: 0"),
        ({"tolerance": 0.2}, "entry 1: tolerance and reason come together"),
        ({"reason": "noise"}, "entry 1: tolerance and reason come together"),
    ],
)
def test_a_bad_entry_is_one_line(check: Check, capsys: Any, changes: dict[str, Any], complaint: str) -> None:
    assert check([entry(**changes)]) == 2
    assert f"benchmarks: error: baselines.json: {complaint}" in capsys.readouterr().err


def test_a_missing_key_and_a_file_that_is_no_json(check: Check, tmp_path: Path, capsys: Any) -> None:
    assert check([{"benchmark": "a", "better": "lower"}]) == 2
    (tmp_path / "bad.json").write_text("[\n{]")
    assert _check.main(["--check"], tmp_path / "bad.json") == 2
    err = capsys.readouterr().err
    assert "entry 1: ratio is missing" in err
    assert "bad.json:2: " in err


def test_the_committed_baselines_are_of_benchmarks_that_exist() -> None:
    folder = BASELINES.parent
    entries = read(BASELINES)
    for one in entries:
        assert (folder / f"{one.benchmark}.py").exists() or (folder / f"{one.benchmark}_time.py").exists(), one
    assert any(one.quick for one in entries)
    assert len({(one.benchmark, one.options, one.ratio) for one in entries}) == len(entries)


def test_the_command_hands_over() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "--check", "nowhere"]
    done = subprocess.run(command, cwd=BASELINES.parents[2], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere: no such benchmark" in done.stderr
