"""Rows of files and hubs, and the problems made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dphrl.config.data import DatasetConfig
from dphrl.data.loading import load_problems
from dphrl.data.problems import Fault, Problem
from dphrl.data.source import expand_path, load_rows
from tests.unit.fake_hub import FakeHub


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _dataset(path: Path | str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(name="d", path=str(path), **settings)


ROWS = [{"question": f"q{i}", "answer": str(i)} for i in range(5)]


def test_jsonl_json_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    lines = _jsonl(tmp_path / "a.jsonl", *ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    problems = load_problems(_dataset(lines), seed=0)
    assert problems == load_problems(_dataset(tmp_path / "a.parquet"), seed=1)
    assert problems[3] == Problem("d-3", "q3", "3", "d")
    assert problems[3].location == f"{lines}:4"
    array = tmp_path / "a.json"
    array.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    assert load_problems(_dataset(array), seed=0) == problems
    assert load_problems(_dataset(array), seed=0)[3].location == f"{array}[3]"
    assert load_problems(_dataset(lines, limit=2), seed=0) == problems[:2]


def test_a_limit_stops_before_a_bad_line(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", *ROWS[:2])
    path.write_text(path.read_text() + "{broken\n")
    assert len(load_rows(_dataset(path, limit=2))) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not a line of JSON"):
        load_rows(_dataset(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "q", "answer": "1"}\n\n[1]\n', r"a\.jsonl:3: a JSON list"),
        (b'{"question": "q", "answer": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        (b'{"question": "q"\n', r"a\.jsonl:1: not a line of JSON"),
        (b'{"question": "q", "solution": "1"}\n', r"a\.jsonl:1: no field 'answer'; it has question, solution;"),
        (b'{"question": "", "answer": "1"}\n', r"a\.jsonl:1: the question .* is empty"),
        (b"\n", "holds no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(_dataset(tmp_path / "a.jsonl"), seed=0)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*; replace it"):
        load_rows(_dataset(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        load_rows(_dataset(tmp_path / "missing.jsonl"))
    with pytest.raises(
        ValueError, match=r"path '' is neither a file \(\.jsonl, .*\) nor a folder nor a hub data set's name"
    ):
        load_rows(_dataset(""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "q", "answer": "1"}, 7]', r"a\.json\[1\]: a JSON int, not an object"),
        ('[{"question": "q"}', r"a\.json: not a JSON array: .*; mend it"),
        ("[]", "holds no rows"),
    ],
)
def test_a_bad_json_array_is_named_by_position(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(_dataset(tmp_path / "a.json"))


def _ids(path: Path, **settings: Any) -> list[int]:
    return [row.fields["id"] for row in load_rows(_dataset(path, **settings))]


def test_rows_are_filtered_by_field_before_the_limit(tmp_path: Path) -> None:
    rows = [{"id": i, "source": "ab"[i % 2], "level": i, "tie": i == 2} for i in range(6)]
    path = _jsonl(tmp_path / "a.jsonl", *rows[:-1], rows[-1] | {"rare": True})
    assert _ids(path, where={"source": "a"}) == [0, 2, 4]
    assert _ids(path, where={"source": "a"}, exclude_where={"tie": True}, limit=1) == [0]
    assert _ids(path, where={"source": "a"}, exclude_where={"tie": True}) == [0, 4]
    assert _ids(path, where={"source": "a", "level": [2, 3]}) == [2]
    assert _ids(path, exclude_where={"source": "a", "level": [1, 3]}) == [5]
    # A field of the last row alone is a field, wherever the limit falls.
    assert _ids(path, exclude_where={"rare": True}, limit=2) == [0, 1]
    with pytest.raises(ValueError, match=r"no row of .*a\.jsonl has a field 'sorce'; correct where"):
        load_rows(_dataset(path, where={"sorce": "a"}))
    with pytest.raises(ValueError, match=r"no row of .* has a field 'ties'"):
        load_rows(_dataset(path, exclude_where={"ties": True}, limit=1))
    with pytest.raises(ValueError, match=r"leave none of the 6 rows of .*, whose first has .*: .*; correct them$"):
        load_rows(_dataset(path, where={"source": "c"}))
    with pytest.raises(ValueError, match="level: expected a value or a list of values"):
        _dataset(path, where={"level": {"min": 3}})


def test_fields_are_found_by_their_usual_names_or_set(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"problem": "q", "text": "t", "answer": "1", "final": "2"})
    assert load_problems(_dataset(path), seed=0) == [Problem("d-0", "q", "1", "d")]
    problems = load_problems(_dataset(path, prompt_field="text", answer_field="final"), seed=0)
    assert problems == [Problem("d-0", "t", "2", "d")]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no field 'answr'; it has problem, .*; set answer_field of"):
        load_problems(_dataset(path, answer_field="answr"), seed=0)
    path = _jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": "1"}, {"problem": "q", "answer": "1"})
    with pytest.raises(ValueError, match=r"b\.jsonl:2: no field 'question'"):
        load_problems(_dataset(path), seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def test_texts_of_a_hub_data_set_stay_texts(hub: FakeHub) -> None:
    answers = ["007", 12, "null", "2024-01-02"]
    hub.add("org/set", {"train.jsonl": [{"question": "q", "answer": answer} for answer in answers], "test.jsonl": ROWS})
    rows = load_rows(_dataset("org/set"))
    assert [row.fields["answer"] for row in rows] == answers
    assert rows[0].location == "org/set/train.jsonl:1"
    assert hub.downloaded == [["train.jsonl", "README.md"]]
    assert [row.fields["answer"] for row in load_rows(_dataset("org/set", split="test", limit=3))] == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"data set d: org/set has no split 'dev'; it has train, test; set split"):
        load_rows(_dataset("org/set", split="dev"))


def test_without_a_connection_what_was_downloaded_is_used(hub: FakeHub) -> None:
    hub.offline = True
    hub.add("org/set", {"train.jsonl": ROWS})
    with pytest.raises(ValueError, match=r"'org/set:x' could not be .*ConnectionError.*or give a file") as caught:
        load_rows(_dataset("org/set:x"))
    assert "\n" not in str(caught.value)
    (hub.root / "org/set/README.md").write_text("# A data set\n")
    assert load_rows(_dataset("org/set"))[4].location == "org/set/train.jsonl:5"


def test_a_hub_data_set_has_subsets(hub: FakeHub) -> None:
    hub.add("org/set", {f"{name}/train.jsonl": [{"question": name}] for name in ("main", "hard")}, ["main", "hard"])
    assert load_rows(_dataset("org/set:hard"))[0].fields["question"] == "hard"
    with pytest.raises(ValueError, match=r"'org/set' could not be loaded from the hub: .*Config name is missing.*main"):
        load_rows(_dataset("org/set"))


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPHRL_DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("$DPHRL_DATA/a.jsonl") == expand_path("${DPHRL_DATA}/a.jsonl") == "/data/a.jsonl"
    assert expand_path("~/a.jsonl") == "/home/me/a.jsonl"
    with pytest.raises(ValueError, match="variable NO_SUCH_THING is not set"):
        expand_path("$NO_SUCH_THING/a.jsonl")

    monkeypatch.delenv("DPHRL_DATA")
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    with pytest.raises(ValueError, match=r"DPHRL_DATA is not set; it names the folder .* export DPHRL_DATA="):
        expand_path("$DPHRL_DATA/a.jsonl")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert expand_path("$DPHRL_DATA/a.jsonl") == "../shared/data/a.jsonl"


def test_gsm8k_answers(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "6*7 #### no\n#### 1,234 "})
    assert load_problems(_dataset(path, answer_format="gsm8k"), seed=0)[0].answer == "1234"
    path = _jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": "42"})
    (problem,) = load_problems(_dataset(path, answer_format="gsm8k"), seed=0)
    assert problem.fault == Fault("no #### in 'answer'", "set answer_format: plain, or mend the rows")


def test_boxed_answers(tmp_path: Path) -> None:
    solution = r"First \boxed{1}, so $x=\boxed{\frac{1}{2}}$."
    path = _jsonl(tmp_path / "a.jsonl", {"problem": "q", "solution": solution, "answer": "no box"})
    assert load_problems(_dataset(path, answer_format="boxed"), seed=0)[0].answer == r"\frac{1}{2}"
    path = _jsonl(tmp_path / "b.jsonl", {"problem": "q", "solution": "it is 5"})
    (problem,) = load_problems(_dataset(path, answer_format="boxed"), seed=0)
    assert problem.fault == Fault(r"no \boxed{} in 'solution'", "set answer_format: plain, or mend the rows")


@pytest.mark.parametrize(
    ("value", "answer"),
    [(145.0, "145"), (0, "0"), (0.5, "0.5"), (" x ", "x"), (1e-05, "0.00001"), (1e22, "1" + "0" * 22), (100.0, "100")],
)
def test_an_answer_may_be_a_number(tmp_path: Path, value: object, answer: str) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": value})
    assert load_problems(_dataset(path), seed=0)[0].answer == answer


def test_the_tiny_task_depends_on_the_seed_and_has_its_splits() -> None:
    def load(split: str, seed: int) -> list[Problem]:
        return load_problems(DatasetConfig(name="t", kind="tiny", split=split, limit=20), seed)

    train = load("train", 0)
    assert len({problem.problem_id for problem in train}) == 20
    assert train[0].problem_id == "t-0"
    assert train == load("train", 0) != load("train", 1)
    assert {problem.text for problem in train}.isdisjoint(problem.text for problem in load("held_out", 0))
    assert load("out_of_domain", 0)[0].text.startswith("DIVIDE")
    with pytest.raises(ValueError, match="split 'test' is unknown to the embedded task"):
        load("test", 0)
    with pytest.raises(ValueError, match=r"data set t: .*; set its limit"):
        load_problems(DatasetConfig(name="t", kind="tiny", split="train", limit=10**6), 0)


def test_a_seed_draws_the_order_of_rows_before_the_limit(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "rows.jsonl", *({"question": "q", "answer": "a", "id": i} for i in range(50)))

    def drawn(**settings: Any) -> list[int]:
        return [row.fields["id"] for row in load_rows(_dataset(path, **settings))]

    assert sorted(drawn(shuffle_seed=1)) == list(range(50)) == drawn()
    assert drawn(shuffle_seed=1, limit=5) == drawn(shuffle_seed=1)[:5] != drawn(shuffle_seed=2, limit=5)


def test_a_layout_sets_the_fields_and_a_setting_beside_it_wins(tmp_path: Path) -> None:
    dataset = _dataset("x", layout="spider")
    assert (dataset.kind, dataset.convention) == ("text_to_sql", "spider")
    assert _dataset("x", layout="spider", convention="bird").convention == "bird"
    # An embedded task has no rows of a file, so a layout beside it takes its place.
    assert _dataset("x", layout="verl", kind="tiny").kind == "math"
    with pytest.raises(
        ValueError, match=r"kind: math does not go with layout: bird; leave kind out, or set it to text_"
    ):
        _dataset("x", layout="bird", kind="math")
    # What a run writes down reads as the same.
    again = DatasetConfig.model_validate(dataset.model_dump())
    assert again == dataset
    path = _jsonl(tmp_path / "a.jsonl", {"problem": "q", "solution": r"\boxed{1}", "answer": "2", "final": "#### 3"})
    for settings, answer in [
        ({}, "2"),
        ({"answer_format": "boxed"}, "1"),
        ({"answer_field": "solution"}, "1"),
        ({"answer_field": "final", "answer_format": "gsm8k"}, "3"),
        ({"answer_field": "final"}, "#### 3"),
    ]:
        assert load_problems(_dataset(path, layout="math", **settings), seed=0)[0].answer == answer


def test_files_of_another_kind_beside_the_data_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _jsonl(tmp_path / "b.jsonl", *ROWS)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(load_rows(_dataset(tmp_path))) == 5
    assert not caplog.records
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"question,answer\nq,1\n"))
    assert len(load_rows(_dataset(tmp_path))) == 5
    assert "Data set d: a.csv.gz in " in caplog.text


def test_fields_that_are_not_asked_for_keep_only_their_names(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1", "generations": ["long"], "level": {"of": 5}}
    for path in (_jsonl(tmp_path / "a.jsonl", row), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist([row]), path)
        dataset = _dataset(path, where={"level.of": 5})
        assert load_rows(dataset, ["question", "answer"])[0].fields == row | {"generations": None}
        assert load_rows(dataset, ["other"])[0].fields == row | {"question": None, "generations": None}
        assert load_rows(dataset)[0].fields == row
