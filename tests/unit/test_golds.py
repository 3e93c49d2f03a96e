"""Golds are looked at once: what is taken off them, which of them are refused, and what is said about it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dphrl import prepare as preparation
from dphrl.config.data import DataConfig, DatasetConfig, RewardConfig
from dphrl.config.loading import InputError, load_config
from dphrl.config.schema import Config
from dphrl.data.decoration import clean_gold
from dphrl.data.golds import BadGold, check_golds, refuse_or_drop, shorten, visible_fault
from dphrl.data.loading import load_problems
from dphrl.data.problems import Fault, Problem
from dphrl.prepare import load_prompts, prepare
from dphrl.rewards import base
from dphrl.rewards.math_answer import MathAnswerGrader
from dphrl.tracking.console import Console
from dphrl.types import RewardResult, RewardStatus

REAL = Path(os.environ.get("DPHRL_DATA") or "../shared/data") / "math"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="the data sets are not here")
MATH = RewardConfig(name="math_answer")


def _problems(*golds: str) -> list[Problem]:
    return [Problem(f"d-{i}", f"question {i}", gold, "d", location=f"a.jsonl:{i + 1}") for i, gold in enumerate(golds)]


def _faults(*golds: str, reward: RewardConfig = MATH) -> dict[str, str]:
    return {bad.gold: bad.fault.reason for bad in check_golds(_problems(*golds), "math", reward).bad}


# ------------------------------------------------------------ decoration


@pytest.mark.parametrize(
    ("gold", "clean"),
    [
        ("$70$", "70"),
        ("$$ 70 $$", "70"),
        (r"\(70\)", "70"),
        (r"\[ \frac{1}{2} \]", r"\frac{1}{2}"),
        (r"\boxed{70}", "70"),
        (r"\fbox {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{\boxed{70}}$.", "70"),
        ("['70']", "70"),
        ('["70"]', "70"),
        ("[ '70', ]", "70"),
        ("[70]", "70"),
        ("[-1/2]", "-1/2"),
        ('"70"', "70"),
        ("'70'", "70"),
        ("\u201c70\u201d", "70"),
        ("**70**", "70"),
        ("**$70$.**", "70"),
        ("__70__", "70"),
        ("`70`", "70"),
        ("<answer> 70 </answer>", "70"),
        ("70.", "70"),
        ("\ufeff 70\u200b", "70"),
        ("Answer: 70", "70"),
        ("The final answer is: $70$.", "70"),
        ("ANSWER = 70", "70"),
        (r"$\$70$", r"\$70"),
        # Lists that Python and JSON wrote, and one that was put together by hand.
        (r"['\\frac{1}{2}']", r"\frac{1}{2}"),
        (r'["\\frac{1}{2}"]', r"\frac{1}{2}"),
        (r"['\frac{1}{2}']", r"\frac{1}{2}"),
        (r"['\begin{pmatrix} 1 \\ 2 \end{pmatrix}']", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)
def test_decoration_is_taken_off(gold: str, clean: str) -> None:
    found, names = clean_gold(gold)
    assert found == clean
    assert names or gold.strip("\ufeff \u200b") == clean


@pytest.mark.parametrize(
    "gold",
    [
        "70",
        "$5",  # money
        r"\$5",
        "$3$ and $4$",
        "$$3$$, $$4$$",
        r"\(3\) or \(4\)",
        r"\[3\], \[4\]",
        r"\boxed{1} + \boxed{2}",
        r"5\$ and \$",
        "'a' or 'b'",
        "['8', '9']",
        "[1, 2]",
        "[0,100)",
        "(70)",
        "{70}",
        "f'",
        "5'",
        "2**3",
        "1, 2, 3, ...",
        "7 p.m.",
        r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.",
        "0.5",
        r"\text{(B)}",
        "answers",
    ],
)
def test_what_may_mean_something_stays(gold: str) -> None:
    assert clean_gold(gold) == (gold, [])


# ------------------------------------------------------------ golds that cannot be used

GSM8K = "She has 2*3=<<2*3=6>>6 apples.\n#### 6"
WORKED = r"Adding both sides gives $x=3$, so the answer is $\boxed{3}$."
BAD = {
    "": "the gold is empty",
    " $$ ": "the gold is empty",
    "nan": "a missing value",
    "None": "a missing value",
    "<NA>": "a missing value",
    "proof": "a missing value",
    "#### 5": "a worked solution with the answer after ####",
    GSM8K: "a worked solution with the answer after ####",
    WORKED: r"a worked solution with the answer in \boxed{}",
    "['8', '9']": "a list of several texts",
    '{"target": 98, "numbers": [1]}': "a struct of target, numbers, stored as text",
    "{'ground_truth': '4', 'style': 'rule'}": "a struct of ground_truth, style, stored as text",
    "We add three and four and so there are seven apples": "a sentence, which no completion would repeat",
    "No. It is not closed.": "a sentence, which no completion would repeat",
    "It is the line $y=x$.": "a sentence, which no completion would repeat",
    r"\frac{1}{": "not an expression that can be read",
    r"\frac{1}": "not an expression that can be read",
    r"\triangle ABC + ": "not an expression that can be read",
    "5 4.6 @ 7": "not an expression that can be read",
    "10^10^10": "cannot be graded (refused: a power of more than 40000 bits",
    "10^{10^{10}}": "cannot be graded (refused: a power of more than 40000 bits",
    "1000000!": "cannot be graded (refused: a factorial above 3000!",
    "(" * 1500 + ")" * 1500: "cannot be graded (refused: the answer has 3000 characters",
}


@pytest.mark.parametrize("extraction", ["boxed", "auto"])
def test_golds_that_no_completion_can_match_are_told_why(extraction: str) -> None:
    reward = RewardConfig.model_validate({"name": "math_answer", "extraction": extraction})
    told = _faults(*BAD, reward=reward)
    # The grader says more about what it refuses.
    assert {gold: told[gold][: len(reason)] for gold, reason in BAD.items()} == BAD


GOOD = [
    *["7", "-0.5", "1,234", "25%", r"\$5", "$5", r"\frac{3}{4}", "3/4", r"2\sqrt{3}", "(1, 2)", "[0, 1)", "1, 2, 3"],
    *[r"\{1, 2\}", "x = 3", r"x^2 + 2x", r"\text{(B)}", "B", "Thursday", "June 20", r"\text{even}", "undefined"],
    *[
        "no solution",
        "There is no solution.",
        "Infinite number of solutions",
        "5 cm",
        "$60$ miles per hour",
        "12:30",
        "101_2",
    ],
    *[r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"(-\infty, 2) \cup (3, \infty)", "x > 3", r"\emptyset"],
    *["Ann, Bob, Carl, Dora, Emil, Fay, Gus, Hal, Ida", r"\text{None}", "1 + 2i", r"45^\circ", "a:b", "2004!"],
    *["(B) The sum of the first ten odd numbers is even", "C. Nine. Then we add three more to get twelve"],
    # Right in their own spelling, or in what is made alike before anything is read.
    *[
        r"\varnothing",
        r"\{\}",
        r"\mathbb{Z}",
        r"\angle ABC",
        r"AB \parallel CD",
        r"p \Rightarrow q",
        "\u56db",
        "\u00bd",
    ],
]


def test_golds_of_every_form_are_kept() -> None:
    assert _faults(*GOOD) == {}


def test_golds_are_cleaned_counted_and_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Counting(MathAnswerGrader):
        def grade(self, items: Any) -> list[RewardResult]:
            asked.extend(gold for _, gold in items)
            return super().grade(items)

    monkeypatch.setitem(base._GRADERS, "math_answer", lambda config: Counting(config.extraction, config.timeout_s))
    done: list[int] = []
    checked = check_golds(_problems("$70$", "70", "**7**.", "8", "@@", "70"), "math", MATH, done.append)
    assert [problem.answer for problem in checked.problems] == ["70", "70", "7", "8", "70"]
    assert [problem.problem_id for problem in checked.problems] == ["d-0", "d-1", "d-2", "d-3", "d-5"]
    assert (checked.num_cleaned, dict(checked.cleaned)) == (2, {"$..$": 1, "**..**": 1, "full stop": 1})
    assert (asked.count("70"), sum(done)) == (1, 6)
    assert [str(bad) for bad in checked.bad] == ["a.jsonl:5: '@@': not an expression that can be read"]


def test_what_the_loader_found_wrong_comes_first() -> None:
    problem = Problem("d-0", "q", "$70$", "d", location="a:1", fault=Fault("no box"))
    checked = check_golds([problem], "math", MATH)
    assert (checked.problems, checked.num_cleaned) == ([], 0)
    assert checked.bad == [BadGold("a:1", "$70$", Fault("no box"))]


def test_golds_of_ones_own_reward_are_only_looked_for() -> None:
    reward = RewardConfig(name="my.module:reward")
    checked = check_golds(
        _problems("$70$", "#### 5", "{'style': 1}", "", "nan", "a b c d. E f g h i j"), "math", reward
    )
    assert [problem.answer for problem in checked.problems] == [
        "$70$",
        "#### 5",
        "{'style': 1}",
        "a b c d. E f g h i j",
    ]
    assert [str(bad) for bad in checked.bad] == ["a.jsonl:4: the gold is empty", "a.jsonl:5: 'nan': a missing value"]


def test_golds_of_embedded_tasks_are_left_alone() -> None:
    problems = _problems("#### 5")
    assert check_golds(problems, "tiny", RewardConfig(name="factorization")).problems == problems


def test_a_gold_that_is_wrong_against_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(MathAnswerGrader):
        def grade(self, items: Any) -> list[RewardResult]:
            return [RewardResult(RewardStatus.WRONG) for _ in items]

    monkeypatch.setitem(base._GRADERS, "math_answer", lambda config: Strict())
    assert _faults("7") == {"7": "graded against itself it is wrong"}


def test_a_grader_that_fails_is_no_fault_of_the_golds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MathAnswerGrader):
        def grade(self, items: Any) -> list[RewardResult]:
            return [RewardResult(RewardStatus.INFRASTRUCTURE_ERROR, "no child") for _ in items]

    monkeypatch.setitem(base._GRADERS, "math_answer", lambda config: Broken())
    with pytest.raises(ValueError, match="golds cannot be checked, because the grader fails: no child"):
        check_golds(_problems("70"), "math", MATH)


# ------------------------------------------------------------ refused or dropped


def _bad(count: int, *remedies: str) -> list[BadGold]:
    return [BadGold(f"a:{i}", f"g{i}", Fault("bad", remedies[i % len(remedies)])) for i in range(count)]


def test_the_line_names_rows_count_and_remedies() -> None:
    dataset = DatasetConfig(name="d")
    data = DataConfig(train=dataset)
    with pytest.raises(ValueError, match="rows") as caught:
        refuse_or_drop(_bad(7, "mend", "set x", "mend"), 9, dataset, data)
    assert str(caught.value) == (
        "data set d: 7 of 9 rows have no gold to grade against: a:0: 'g0': bad; a:1: 'g1': bad; a:2: 'g2': bad; "
        "a:3: 'g3': bad; a:4: 'g4': bad; and 2 more; mend; set x, or set data.invalid_gold: drop"
    )
    refuse_or_drop([], 9, dataset, data)


@pytest.mark.parametrize(
    ("of_all", "own", "ending"),
    [
        ("refuse", None, "mend, or set data.invalid_gold: drop"),
        ("drop", "refuse", "mend, or set its invalid_gold: drop"),
        ("drop", None, None),
        ("refuse", "drop", None),
    ],
)
def test_a_data_sets_own_setting_wins(of_all: str, own: str | None, ending: str | None) -> None:
    dataset = DatasetConfig.model_validate({"name": "d", "invalid_gold": own})
    data = DataConfig.model_validate({"train": dataset, "invalid_gold": of_all})
    if ending is None:
        refuse_or_drop(_bad(1, "mend"), 2, dataset, data)
        # Nothing would be left to train on.
        ending = "mend"
    with pytest.raises(ValueError, match=f"{ending}$"):
        refuse_or_drop(_bad(2, "mend"), 2, dataset, data)


def test_the_earlier_word_for_refusing_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: {name: d, invalid_gold: error}, evaluation: [{name: e, invalid_gold: drop}]}")
    data = load_config(str(path)).data
    assert (data.train.invalid_gold, data.evaluation[0].invalid_gold, data.invalid_gold) == (None, "drop", "refuse")


def test_long_golds_are_shown_on_one_short_line() -> None:
    assert shorten("a\n b\ud800") == r"'a b\ud800'"
    assert shorten("7" * 100) == f"'{'7' * 60}...'"


# ------------------------------------------------------------ files, as a run prepares them


class PlainTokenizer:
    """One token for each character, and no chat template."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(*golds: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": gold} for i, gold in enumerate(golds)]


def _prompts(path: Path, **settings: Any) -> tuple[list[str], str]:
    """The golds that are left, and the last line of the console."""
    own = {key: settings.pop(key) for key in ("answer_format", "answer_field", "limit") if key in settings}
    config = Config.model_validate({"data": {"train": {"name": "d", "path": str(path)} | own} | settings})
    said = io.StringIO()
    loaded = load_prompts(config.data.train, config, PlainTokenizer(), Console(said), duplicates=config.data.duplicates)
    line = said.getvalue().splitlines()[-1]
    assert loaded.notes[0] == line
    return [prompt.answer for prompt in loaded.prompts], line


@pytest.mark.parametrize(
    ("golds", "settings", "line"),
    [
        (
            ["7", "#### 5", GSM8K],
            {},
            "2 of 3 rows .*:2: '#### 5': a worked .*; set answer_format: gsm8k, or mend the rows, or set data",
        ),
        (
            [WORKED, "7"],
            {},
            r"1 of 2 rows .*:1: 'Adding both .*; set answer_format: boxed, or mend the rows, or set data.inv",
        ),
        (["7", None, "", "nan"], {}, "3 of 4 rows .*:2: the gold is empty; .*:4: 'nan': a missing value; mend"),
        ([7, float("nan")], {}, "1 of 2 rows .*:2: 'nan': a missing value; fill in or remove the rows .*, or set data"),
        (["7", "8"], {"answer_format": "gsm8k"}, "2 of 2 rows .*:1: '7': no #### in 'answer'; .* answer_format: plain"),
        (["7", "8"], {"answer_format": "boxed"}, r"2 of 2 rows .*:1: '7': no \\boxed\{\} in 'answer'; .*"),
        (["We add three and four to get seven apples in all."], {}, "1 of 1 rows .* name the field of the short ans"),
        (
            ["7", r"\frac{1}{"],
            {},
            r"1 of 2 rows .*:2: '\\frac\{1\}\{': not an expression that can be read; mend or rem",
        ),
        (["7", "9^{9^{9^9}}"], {}, r"1 of 2 rows .*:2: '9.*': cannot be graded \(refused: a power of more than"),
        (["['1', '2']"], {}, "1 of 1 rows .* a list of several texts; write one text in each row, such as 8, 9, or"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, golds: Any, settings: Any, line: str) -> None:
    path = _write(tmp_path / "a.jsonl", *_rows(*golds))
    with pytest.raises(ValueError, match=f"^data set d: {line}") as caught:
        _prompts(path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_a_column_of_numbers_has_gaps(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"question": ["a", "b", "c"], "answer": pa.array([0.1, float("nan"), None], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"2 of 3 rows .*a\.parquet:2: 'nan': a missing.*a\.parquet:3: the gold is empty"
    ):
        _prompts(tmp_path / "a.parquet")
    assert _prompts(tmp_path / "a.parquet", invalid_gold="drop")[0] == ["0.1"]


@pytest.mark.parametrize(
    ("golds", "kept", "said"),
    [
        (["$70$", "['71']", r"\boxed{72}"], ["70", "71", "72"], "3 prompts, 3 golds cleaned"),
        (["7", "#### 5", "$8$"], ["7", "8"], "2 prompts, 1 golds cleaned ($..$), 1 dropped without a gold to grade"),
        (["7", None, "nan", "@@"], ["7"], "1 prompts, 3 dropped without a gold to grade against, the first"),
        ([7, 0.5, 145.0], ["7", "0.5", "145"], "3 prompts"),
    ],
)
def test_decorated_and_broken_files_are_read_and_counted(tmp_path: Path, golds: Any, kept: Any, said: str) -> None:
    answers, line = _prompts(_write(tmp_path / "a.jsonl", *_rows(*golds)), invalid_gold="drop")
    assert answers == kept
    assert line.startswith(f"data d (train): {said}")


@pytest.mark.parametrize(("limit", "said"), [(2, "2 prompts, 2 rows read, which is its limit"), (4, "3 prompts")])
def test_a_limit_that_cuts_is_said(tmp_path: Path, limit: int, said: str) -> None:
    _, line = _prompts(_write(tmp_path / "a.jsonl", *_rows("1", "2", "3")), limit=limit)
    assert line == f"data d (train): {said}"


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "resolve_model", lambda path: path)
    monkeypatch.setattr(preparation, "load_tokenizer", lambda path, **settings: PlainTokenizer())
    monkeypatch.setattr(preparation, "_check_model", lambda config, model_dir: None)


@pytest.mark.usefixtures("without_model")
def test_a_run_keeps_its_notes_for_the_log_and_tells_of_shared_questions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = _write(tmp_path / "train.jsonl", *_rows("1", "@@", "3"), *_rows("$1$"))
    test = _write(
        tmp_path / "test.jsonl", {"question": "q0 ", "answer": "1"}, *_rows("1"), {"question": "n", "answer": "2"}
    )
    data = {
        "train": {"name": "d", "path": str(train)},
        "evaluation": [{"name": "t", "path": str(test)}],
        "invalid_gold": "drop",
    }
    prepared = prepare(Config.model_validate({"data": data}), Console(io.StringIO()))
    assert [prompt.prompt_id for prompt in prepared.prompts] == ["d-0", "d-2"]
    # An evaluation set keeps its repetitions.
    assert [prompt.prompt_id for prompt in prepared.evaluations[0].prompts] == ["t-0", "t-1", "t-2"]
    shared = "data t (train): 2 of 3 prompts are in data.train too, so its results do not show what"
    assert shared in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        prepared.log_notes()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        f"data d (train): 2 prompts, 1 golds cleaned ($..$), 1 dropped without a gold to grade against, the first "
        f"{train}:2, 1 repetitions of other rows dropped"
    )
    assert lines[1] == f"data d (train): dropped {train}:2: '@@': not an expression that can be read"
    assert lines[2] == "data t (train): 3 prompts, 1 repeat another row"
    assert lines[3].startswith(shared)


@pytest.mark.usefixtures("without_model")
def test_refused_golds_are_the_users_to_correct(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", *_rows("#### 5"))
    with pytest.raises(InputError, match=r"^data set d: 1 of 1 rows .*a\.jsonl:1: '#### 5'"):
        prepare(Config.model_validate({"data": {"train": {"name": "d", "path": str(path)}}}), Console(io.StringIO()))


# ------------------------------------------------------------ real data


@needs_data
@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("math500.jsonl", {}),
        ("gsm8k_train.jsonl", {"answer_format": "gsm8k"}),
        ("gsm8k_test.jsonl", {"answer_format": "gsm8k"}),
        ("svamp.jsonl", {"prompt_field": "Body", "answer_field": "Answer"}),
    ],
)
def test_real_golds_can_be_graded(file: str, settings: dict[str, Any]) -> None:
    problems = load_problems(DatasetConfig(name="d", path=str(REAL / file), **settings), 0)
    assert check_golds(problems, "math", MATH).bad == []


@needs_data
def test_cleaning_changes_no_value() -> None:
    problems = load_problems(DatasetConfig(name="d", path=str(REAL / "college_math_ccby.jsonl")), 0)
    cleaned = [(problem.answer, clean_gold(problem.answer)[0]) for problem in problems]
    changed = [(before, after) for before, after in dict.fromkeys(cleaned) if before != after]
    assert len(changed) > 500
    grader = MathAnswerGrader()
    verdicts = grader.grade([(rf"\boxed{{{after}}}", before) for before, after in changed])
    grader.close()
    assert {verdict.status for verdict in verdicts} == {RewardStatus.CORRECT}


@needs_data
def test_most_real_answers_of_a_textbook_can_be_graded_and_its_proofs_are_found() -> None:
    problems = load_problems(DatasetConfig(name="d", path=str(REAL / "college_math_ccby.jsonl")), 0)
    bad = check_golds(problems, "math", MATH).bad
    # A proof in the place of the answer has a dozen words, the answers have two at most.
    assert {"Yes. It has a unique solution.", "This is not a subspace."} & {gold.gold for gold in bad} == {
        "Yes. It has a unique solution."
    }
    assert len(bad) < len(problems) / 7
    assert sum(visible_fault(clean_gold(gold.gold)[0]) is None for gold in bad) < 50
