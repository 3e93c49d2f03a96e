"""The list of deliberate errors applies to this tree; the runner tells killed from survived."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.__main__ import main
from tests.mutants.catalogue import complaints, load, select

ROOT = Path(__file__).resolve().parents[2]


def test_every_error_of_the_list_can_be_made_and_has_its_tests() -> None:
    mutants = load()
    assert complaints(mutants, ROOT) == []
    assert len(mutants) >= 40
    rooms = {mutant.file.rpartition("/")[0] for mutant in mutants}
    assert rooms >= {"dphrl", "dphrl/algo", "dphrl/learner", "dphrl/reference", "dphrl/evaluation", "actors"}


def test_a_pattern_selects_by_room_file_or_sentence() -> None:
    mutants = load()
    assert {m.file for m in select(mutants, "dphrl/algo/losses.py")} == {"dphrl/algo/losses.py"}
    assert all(m.file.startswith("actors/") for m in select(mutants, "actors/*"))
    assert select(mutants, "no such error") == []


SOURCE = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
TESTS = "from pkg.sums import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
ENTRY = """
- error: {error}
  file: pkg/sums.py
  text: "{text}"
  becomes: "{becomes}"
  tests: [{tests}]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one module, of whose two functions one is tested."""
    files = {"pkg/__init__.py": "", "pkg/sums.py": SOURCE, "tests/test_sums.py": TESTS, "lists/room.yaml": ""}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    return tmp_path


def run(project: Path, *entries: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
    (project / "lists" / "room.yaml").write_text("".join(entries))
    command = [sys.executable, "-m", "tests.mutants", "--root", str(project), "--catalogue", str(project / "lists")]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (project / "pkg" / "sums.py").read_text() == SOURCE, "the tree itself is never touched"
    return done.returncode, done.stdout + done.stderr


def entry(text: str, becomes: str, error: str = "an error", tests: str = "tests/test_sums.py") -> str:
    return ENTRY.format(text=text, becomes=becomes, error=error, tests=tests)


def test_all_killed_is_success(project: Path) -> None:
    killed = entry("return 2 * x", "return 1 * x", "first"), entry("return 2 * x", "return 4 * x", "second")
    code, said = run(project, *killed)
    assert (code, "2 of 2 killed" in said) == (0, True), said


def test_each_error_gets_its_verdict_and_one_survivor_fails_the_run(project: Path) -> None:
    entries = [
        entry("return 2 * x", "return 1 * x", "a wrong number"),
        entry("return 2 * x", "return sum(iter(int, 1))", "an endless loop"),
        entry("return 3 * x", "return 4 * x", "not seen"),
        entry("def double(x)", "def doubled(x)", "no import"),
        entry("return 2 * x", "return 1", "never read", tests="tests/test_nothing.py"),
    ]
    code, said = run(project, *entries, options=("--timeout", "3"))
    assert code == 1
    verdicts = {sentence: word for word, sentence in re.findall(r"^(\w+) +[\d.]+ s  \S+: (.*)$", said, re.MULTILINE)}
    assert verdicts == {
        "a wrong number": "killed",
        "an endless loop": "killed",
        "not seen": "SURVIVED",
        # Neither says that a test would have noticed.
        "no import": "BROKEN",
        "never read": "BROKEN",
    }
    assert "pkg.sums was not imported from the copy" in said
    assert "2 of 5 killed" in said


@pytest.mark.parametrize(
    ("text", "becomes", "message"),
    [
        ("return 5 * x", "return 1", "'return 5 * x' occurs 0 times, not once"),
        ("* x", "* y", "'* x' occurs 2 times, not once"),
        ("return 2 * x", "return 2 * (x", "was never closed"),
        ("return 2 * x", "return 2 * x", "becomes itself"),
    ],
)
def test_an_error_that_cannot_be_made_fails_the_run(
    project: Path, capsys: pytest.CaptureFixture[str], text: str, becomes: str, message: str
) -> None:
    (project / "lists" / "room.yaml").write_text(entry(text, becomes))
    assert main(["--root", str(project), "--catalogue", str(project / "lists")]) == 1
    assert message in capsys.readouterr().out


def test_tests_that_fail_without_any_error_stop_the_run(project: Path) -> None:
    (project / "tests" / "test_sums.py").write_text(TESTS.replace("6", "7"))
    code, said = run(project, entry("return 2 * x", "return 1 * x"))
    assert code == 1
    assert "tests fail on the tree as it is" in said


def test_the_list_is_printed_and_a_run_of_what_nothing_matches_fails(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "lists" / "room.yaml").write_text(entry("return 2 * x", "return 1 * x", "a sentence"))
    options = ["--root", str(project), "--catalogue", str(project / "lists")]
    assert main([*options, "--list"]) == 0
    assert "a sentence\n1 mutants" in capsys.readouterr().out
    assert main([*options, "--only", "nothing"]) == 1
