"""Faults of users, bad numbers and signals, end to end: one line that says what, where and what to do; the exit status;
and soon.

docs/operations.md has a table of them, and the last test holds it against the list in `fault_cases.py`. To add a fault,
add a Case there and a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.integration.fault_cases import CASES, write_files
from tests.integration.faults import ROOT, Case, Ended, run_all


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """What became of the commands of the selected cases."""
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder, tiny_dir)
    asked = {item.callspec.params["case"].name for item in request.session.items if "case" in _params(item)}
    return run_all([case for case in CASES if case.name in asked], folder)


def _params(item: pytest.Item) -> Mapping[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_one_line_and_the_right_status(case: Case, ended: dict[str, Ended]) -> None:
    done = ended[case.name]
    assert done.status == case.status, (done.out[-500:], done.err[-500:])
    assert "Traceback" not in done.out + done.err
    assert "sesame" not in done.out + done.err
    if not case.line:
        assert done.err == ""
        return
    (line,) = done.lines
    assert re.search(case.line, line), line
    assert line.startswith({1: "dphrl: failed: ", 2: "dphrl: error: "}.get(case.status, "dphrl: stopped by "))


def test_the_table_of_the_documentation_has_every_case() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| `[^|]*` \| (\d+) \| [\d.]+ \|$", text, re.MULTILINE)
    told = {name: int(status) for name, status in rows}
    assert {case.name: case.status for case in CASES}.items() <= told.items()
