"""Rows, problems, the schedule and chat prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dphrl.config_data import DataConfig, DatasetConfig
from dphrl.data.chat import build_prompts
from dphrl.data.math_problems import Problem, load_problems
from dphrl.data.source import expand_path, load_rows


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _dataset(path: Path | str, **settings: Any) -> DatasetConfig:
    return DatasetConfig(name="d", path=str(path), **settings)


ROWS = [{"question": f"q{i}", "answer": str(i)} for i in range(5)]


def test_jsonl_and_parquet_give_the_same_problems(tmp_path: Path) -> None:
    lines = _jsonl(tmp_path / "a.jsonl", *ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    problems = load_problems(_dataset(lines), seed=0)
    assert problems == load_problems(_dataset(tmp_path / "a.parquet"), seed=1)
    assert problems[3] == Problem("d-3", "q3", "3", "d")
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
        (b'{"question": "q", "answer": "\xff"}\n', r"a\.jsonl:1: not a line of JSON"),
        (b'{"question": "q", "solution": "1"}\n', r"a\.jsonl:1: no field 'answer'; it has question, solution;"),
        (b'{"question": "q", "answer": " "}\n', r"a\.jsonl:1: the answer .* is empty"),
        (b'{"question": "q", "answer": null}\n', r"a\.jsonl:1: the answer .* is empty"),
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
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        load_rows(_dataset(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        load_rows(_dataset(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match=r"neither a \.jsonl or \.parquet file nor a hub"):
        load_rows(_dataset(""))


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: object, **settings: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\n(offline mode)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"org/set:main.* could not be loaded .*ConnectionError.*jsonl") as caught:
        load_rows(_dataset("org/set:main"))
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_takes_subset_split_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, subset, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_rows(_dataset("org/set:main", split="test", limit=3))) == 3
    load_rows(_dataset("org/set"))
    assert calls == [("org/set", "main", "test"), ("org/set", None, "train")]


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
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no '####' .* answer_format"):
        load_problems(_dataset(path, answer_format="gsm8k"), seed=0)


@pytest.mark.parametrize(("value", "answer"), [(145.0, "145"), (0, "0"), (0.5, "0.5"), (" x ", "x")])
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
    with pytest.raises(ValueError, match="split 'test' is unknown to the tiny task"):
        load("test", 0)
    with pytest.raises(ValueError, match=r"data set t: .*; set its limit"):
        load_problems(DatasetConfig(name="t", kind="tiny", split="train", limit=10**6), 0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, a BOS that both the tokenizer and the chat template write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", chat_template=template)


def _data_config(**settings: Any) -> DataConfig:
    return DataConfig(train=DatasetConfig(name="d", path="x.jsonl"), **settings)


PROBLEMS = [Problem("d-0", "1+1?", "2", "d"), Problem("d-1", "what is {x} " + "9" * 50, "1", "d")]


def test_prompts_are_chat_templated_with_one_bos(tokenizer: Any) -> None:
    config = _data_config(system_prompt="Be brief.", prompt_template=r"{question} Use \boxed{}.")
    prompts, dropped = build_prompts(PROBLEMS, tokenizer, config)
    assert dropped == 0
    assert prompts[0].text == r"<s>[system]Be brief.[user]1+1? Use \boxed{}.>"
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text
    assert [prompt.token_ids.count(tokenizer.bos_token_id) for prompt in prompts] == [1, 1]
    assert (prompts[0].prompt_id, prompts[0].answer, prompts[0].dataset) == ("d-0", "2", "d")
    assert isinstance(prompts[0].token_ids, tuple)
    assert "{x}" in prompts[1].text


def test_long_prompts_are_dropped_and_counted(tokenizer: Any) -> None:
    num_tokens = len(build_prompts(PROBLEMS[:1], tokenizer, _data_config())[0][0].token_ids)
    prompts, dropped = build_prompts(PROBLEMS, tokenizer, _data_config(max_prompt_tokens=num_tokens))
    assert [prompt.prompt_id for prompt in prompts] == ["d-0"]
    assert dropped == 1
    with pytest.raises(ValueError, match=rf"max_prompt_tokens=3 drops all 2 .* raise it to at least {num_tokens}"):
        build_prompts(PROBLEMS, tokenizer, _data_config(max_prompt_tokens=3))
    assert build_prompts([], tokenizer, _data_config()) == ([], 0)


def test_without_a_chat_template_the_prompt_is_plain_text_and_that_is_said_once(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    prompts, _ = build_prompts(PROBLEMS, tokenizer, _data_config(system_prompt="Be brief."))
    assert prompts[0].text == "Be brief.\n\n1+1?"
    assert prompts[0].token_ids.count(tokenizer.bos_token_id) == 1
    assert sum("no chat template" in record.message for record in caplog.records) == 1


def test_a_template_that_refuses_a_system_prompt_is_a_clear_error(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"System role not supported; set data\.system_prompt"):
        build_prompts(PROBLEMS, tokenizer, _data_config(system_prompt="Be brief."))
