"""Problems to prompts: chat templates, length limits, and schemas that are made to fit."""

from __future__ import annotations

import io
import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dphrl.config.data import DataConfig, DatasetConfig
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.data.chat import build_prompts, fill_template
from dphrl.data.messages import Message
from dphrl.data.problems import Problem, SqlContext
from dphrl.data.schema_fitting import SchemaFitter
from dphrl.data.schema_relevance import SchemaIndex, name_stems, stem
from dphrl.data.sql_schema import read_schema
from dphrl.prepare import load_prompts, prepare
from dphrl.tracking.console import Console


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
    prompts, *counts = build_prompts(PROBLEMS, tokenizer, config)
    assert counts == [0, 0, 0]
    assert prompts[0].text == r"<s>[system]Be brief.[user]1+1? Use \boxed{}.>"
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text
    assert [prompt.token_ids.count(tokenizer.bos_token_id) for prompt in prompts] == [1, 1]
    assert (prompts[0].prompt_id, prompts[0].answer, prompts[0].dataset) == ("d-0", "2", "d")
    assert isinstance(prompts[0].token_ids, tuple)
    assert "{x}" in prompts[1].text


def test_long_prompts_are_dropped_and_counted(tokenizer: Any) -> None:
    num_tokens = len(build_prompts(PROBLEMS[:1], tokenizer, _data_config())[0][0].token_ids)
    prompts, dropped, *_ = build_prompts(PROBLEMS, tokenizer, _data_config(max_prompt_tokens=num_tokens))
    assert [prompt.prompt_id for prompt in prompts] == ["d-0"]
    assert dropped == 1
    with pytest.raises(ValueError, match=rf"max_prompt_tokens=3 drops all 2 .* raise it to at least {num_tokens}"):
        build_prompts(PROBLEMS, tokenizer, _data_config(max_prompt_tokens=3))
    assert build_prompts([], tokenizer, _data_config()) == ([], 0, 0, 0)


def test_without_a_chat_template_the_prompt_is_plain_text_and_that_is_said_once(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    prompts = build_prompts(PROBLEMS, tokenizer, _data_config(system_prompt="Be brief.")).prompts
    assert prompts[0].text == "Be brief.\n\n1+1?"
    assert prompts[0].token_ids.count(tokenizer.bos_token_id) == 1
    assert sum("no chat template" in record.message for record in caplog.records) == 1


def test_a_template_that_refuses_a_system_prompt_is_a_clear_error(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(ValueError, match=r"System role not supported; set data\.system_prompt"):
        build_prompts(PROBLEMS, tokenizer, _data_config(system_prompt="Be brief."))


TURNS = (Message("user", "2+2?"), Message("assistant", "4"))


@pytest.mark.parametrize(
    ("earlier", "settings", "text"),
    [
        ((), {}, "<s>[user]1+1?>"),
        (TURNS, {}, "<s>[user]2+2?[assistant]4[user]1+1?>"),
        ((Message("system", "Own."),), {}, "<s>[system]Own.[user]1+1?>"),
        # A row's own system turn stays; one is put before those that have none.
        ((Message("system", "Own."),), {"system_prompt": "All."}, "<s>[system]Own.[user]1+1?>"),
        (TURNS, {"system_prompt": "All."}, "<s>[system]All.[user]2+2?[assistant]4[user]1+1?>"),
        # The last turn is the question, also to the template.
        (TURNS, {"prompt_template": "Q: {question}"}, "<s>[user]2+2?[assistant]4[user]Q: 1+1?>"),
    ],
)
def test_chat_messages_are_used_as_they_are(
    tokenizer: Any, earlier: tuple[Message, ...], settings: dict[str, Any], text: str
) -> None:
    problem = Problem("d-0", "1+1?", "2", "d", earlier=earlier)
    assert build_prompts([problem], tokenizer, _data_config(**settings)).prompts[0].text == text


def test_without_a_chat_template_only_a_system_turn_can_go_before_the_question(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    problem = Problem("d-0", "1+1?", "2", "d", location="a.jsonl:1", earlier=(Message("system", "Be brief."),))
    assert build_prompts([problem], tokenizer, _data_config()).prompts[0].text == "Be brief.\n\n1+1?"
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the prompt has a turn of 'assistant', but .* no chat template"):
        build_prompts([replace(problem, earlier=TURNS)], tokenizer, _data_config())


def test_variables_reach_the_chat_template(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{{ messages[-1].content }}{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    config = _data_config(chat_template_kwargs={"enable_thinking": False})
    prompt = build_prompts(PROBLEMS, tokenizer, config).prompts[0]
    assert prompt.text == "1+1?</think>"
    assert prompt.token_ids != build_prompts(PROBLEMS, tokenizer, _data_config()).prompts[0].token_ids
    assert not caplog.records
    build_prompts(PROBLEMS, tokenizer, _data_config(chat_template_kwargs={"enable_thought": False, "thinking": 1}))
    assert ["enable_thought" in record.message for record in caplog.records] == [True, False]
    assert "never reads thinking, so it changes nothing" in caplog.records[1].message
    with pytest.raises(
        ValueError, match=r"chat_template_kwargs\s+Value error, tokenize is set by dphrl itself; remove"
    ):
        _data_config(chat_template_kwargs={"tokenize": True})


SCRIPT = """
CREATE TABLE weather (day TEXT, city TEXT, rainfall REAL, wind REAL, cloud REAL, note TEXT);
CREATE TABLE stadium (stadium_id INTEGER PRIMARY KEY, name TEXT, city TEXT, capacity INTEGER);
CREATE TABLE singer (singer_id INTEGER PRIMARY KEY, name TEXT, country TEXT, birthYear INTEGER);
CREATE TABLE performs (
    singer_id INTEGER REFERENCES singer(singer_id), stadium_id INTEGER REFERENCES stadium(stadium_id)
);
CREATE TABLE invoice (invoice_id INTEGER PRIMARY KEY, amount REAL, due TEXT, paid TEXT, memo TEXT);
INSERT INTO weather VALUES ('monday', 'Oslo', 1, 2, 3, 'x'), ('friday', 'Rome', 1, 2, 3, 'y');
INSERT INTO stadium VALUES (1, 'Balmoor', 'Peterhead', 4000);
INSERT INTO singer VALUES (1, 'Joe Sharp', 'Netherlands', 1952), (2, 'Timbaland', 'United States', 1972);
INSERT INTO performs VALUES (1, 1);
INSERT INTO invoice VALUES (1, 2.5, 'now', 'no', 'Zanzibar');
"""
ALL_TABLES = ["weather", "stadium", "singer", "performs", "invoice"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("databases") / "concerts.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCRIPT)
    return path


def _problem(
    database: Path, question: str, evidence: str = "", *, num_sample_rows: int = 0, max_schema_tokens: int | None = None
) -> Problem:
    context = SqlContext(read_schema(database, num_sample_rows), evidence, max_schema_tokens)
    return Problem("d-0", question, "{}", "d", "text_to_sql", context)


def _sql_config(**settings: Any) -> DataConfig:
    return DataConfig(train=DatasetConfig(name="d", path="x.jsonl", kind="text_to_sql"), **settings)


def _tables(text: str) -> list[str]:
    return re.findall(r"CREATE TABLE (\w+)", text)


def _lines(text: str) -> set[str]:
    return {line.rstrip(",") for line in text.removesuffix(">").split("\n")}


def test_a_sql_prompt_has_schema_evidence_and_question(tokenizer: Any, database: Path) -> None:
    problem = _problem(database, "Who sings {schema}?", "Sharp is {question}", num_sample_rows=1)
    config = _sql_config(max_prompt_tokens=5000)
    prompt = build_prompts([problem], tokenizer, config).prompts[0]
    assert "  singer_id INTEGER PRIMARY KEY,\n" in prompt.text
    assert "-- (1, 'Joe Sharp', 'Netherlands', 1952)" in prompt.text
    assert "Timbaland" not in prompt.text
    assert "\nQuestion: Who sings {schema}?\nExternal knowledge: Sharp is {question}\n" in prompt.text
    assert "```sql" in prompt.text
    without = build_prompts([_problem(database, "Who?")], tokenizer, config).prompts[0].text
    assert "External knowledge" not in without
    assert "\nQuestion: Who?\n" in without


@pytest.mark.parametrize(
    ("template", "evidence", "expected"),
    [
        ("{schema}|{question}|{evidence}|{other}", "E", "S|Q|E|{other}"),
        ("{question}\nHint: {evidence}\nend", "", "Q\nend"),
        ("{question} ({evidence})", "", "Q ()"),
        ("{question}\n{evidence}", "a\nb", "Q\na\nb"),
    ],
)
def test_templates(template: str, evidence: str, expected: str) -> None:
    assert fill_template(template, "Q", "S", evidence) == expected


def test_a_template_suits_every_kind_of_data_it_is_for() -> None:
    math = DatasetConfig(name="m")
    sql = DatasetConfig(name="s", kind="text_to_sql")
    assert DataConfig(train=sql, evaluation=(math,)).template_for("math") == "{question}"
    with pytest.raises(ValueError, match=r"lacks \{schema\}, which s \(text_to_sql\) needs; add it"):
        DataConfig(train=sql, prompt_template="{question}")
    with pytest.raises(ValueError, match=r"asks for a schema or evidence, which m \(math\) has not"):
        DataConfig(train=sql, evaluation=(math,), prompt_template="{schema} {question}")


def test_sample_rows_go_first_then_unrelated_tables_then_columns(tokenizer: Any, database: Path) -> None:
    problem = _problem(database, "In which stadium did Timbaland sing?", num_sample_rows=2)
    config = _sql_config(prompt_template="{question}\n{schema}", max_prompt_tokens=5000)
    whole = build_prompts([problem], tokenizer, config)
    assert whole[1:] == (0, 0, 0)
    lengths = [len(whole.prompts[0].token_ids)]
    seen = []
    for max_tokens in range(lengths[0] - 1, 130, -10):
        built = build_prompts([problem], tokenizer, config.model_copy(update={"max_prompt_tokens": max_tokens}))
        assert built.num_dropped == 0
        assert built.num_lost_rows + built.num_lost_names == 1
        prompt = built.prompts[0]
        assert len(prompt.token_ids) <= max_tokens
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        # Nothing but whole lines of the whole prompt, a last comma apart.
        assert _lines(prompt.text) <= _lines(whole.prompts[0].text)
        seen.append((prompt.text.count("-- ("), _tables(prompt.text), prompt.text.count("\n")))
    rows, tables, _ = zip(*seen, strict=True)
    assert list(rows) == sorted(rows, reverse=True)
    assert all(shown == ALL_TABLES for count, shown in zip(rows, tables, strict=True) if count)
    # What holds the value, what is named, what joins them: in this order they stay.
    assert ["stadium", "singer", "performs"] in tables
    assert ["stadium", "singer"] in tables
    assert not any("invoice" in shown and "performs" not in shown for shown in tables)
    assert len(tables[-1]) == 1


def test_evidence_and_values_count_as_well_as_names(database: Path) -> None:
    fitter = SchemaFitter(lambda texts: [len(text) for text in texts])
    schema = read_schema(database, 0)
    for text, table in [
        ("How much is it?\nit means the amounts", "invoice"),
        ("What about Zanzibar", "invoice"),
        ("clouds", "weather"),
        ("all the years of birth", "singer"),
        ("capacities", "stadium"),
    ]:
        assert _tables(fitter.fit(schema, text, 120).text)[0] == table, text
    assert _tables(fitter.fit(schema, "nothing to do with it", 10**6).text) == ALL_TABLES


def test_a_table_too_wide_keeps_the_columns_asked_for_and_its_keys(database: Path) -> None:
    fitter = SchemaFitter(lambda texts: [len(text) for text in texts])
    fitted = fitter.fit(read_schema(database, 2), "memos of invoices", 80)
    assert fitted.text == "CREATE TABLE invoice (\n  invoice_id INTEGER PRIMARY KEY,\n  memo TEXT\n);"
    assert (fitted.lost_rows, fitted.lost_names) == (True, True)


def test_a_key_to_a_table_left_out_is_left_out(database: Path) -> None:
    fitter = SchemaFitter(lambda texts: [len(text) for text in texts])
    text = fitter.fit(read_schema(database, 0), "who performs", 200).text
    assert _tables(text) == ["performs"]
    assert "REFERENCES" not in text


def test_max_schema_tokens_bounds_the_schema_alone(tokenizer: Any, database: Path) -> None:
    problem = _problem(database, "Which singers are from Rome? " + "Hm. " * 100, max_schema_tokens=150)
    config = _sql_config(prompt_template="{question}\n{schema}", max_prompt_tokens=5000)
    built = build_prompts([problem], tokenizer, config)
    schema = built.prompts[0].text.split("\n", 1)[1].removesuffix(">")
    assert 100 < len(schema) <= 150
    assert built.num_lost_names == 1
    assert "singer" in _tables(schema)


def test_a_question_that_leaves_no_room_for_a_schema_is_dropped(tokenizer: Any, database: Path) -> None:
    problems = [_problem(database, "Who sings?"), _problem(database, "Who sings? " + "Hm. " * 100)]
    config = _sql_config(prompt_template="{question}\n{schema}", max_prompt_tokens=300)
    built = build_prompts(problems, tokenizer, config)
    assert (len(built.prompts), built.num_dropped, built.num_lost_names) == (1, 1, 1)


def test_lines_are_tokenized_once_however_many_questions(database: Path) -> None:
    counted: list[str] = []
    fitter = SchemaFitter(lambda texts: [counted.append(text) or len(text) for text in texts])  # type: ignore[func-returns-value]
    schema = read_schema(database, 1)
    for question in ("singers", "stadiums and weather", "singers"):
        for max_tokens in (10**6, 300, 100):
            fitter.fit(schema, question, max_tokens)
    assert len(counted) == len(set(counted))


def test_stems_meet_across_names_and_questions() -> None:
    for words in [
        ("cities", "city"), ("classes", "class"), ("boxes", "box"), ("names", "name", "named"), ("singers", "singer"),
        ("matches", "match"), ("addresses", "address"), ("status", "status"),
    ]:  # fmt: skip
        assert len({stem(word) for word in words}) == 1, words
    assert name_stems("Student_ID") == name_stems("studentId") == name_stems("Students ID") == ["student", "id"]
    assert name_stems("TVSeries2") == ["tv", stem("series"), "2"]


def test_relevance_orders_all_tables_and_breaks_ties_by_position(database: Path) -> None:
    index = SchemaIndex(read_schema(database, 0))
    assert index.relevance("").order == (0, 1, 2, 3, 4)
    ranked = index.relevance("the capacity of each stadium")
    assert sorted(ranked.order) == [0, 1, 2, 3, 4]
    # A neighbour of the stadium comes before what has nothing to do with it.
    assert [ALL_TABLES[i] for i in ranked.order[:2]] == ["stadium", "performs"]
    assert ranked.columns[1] == {"stadium_id", "capacity"}


def test_what_is_dropped_and_trimmed_is_said(tokenizer: Any, database: Path, tmp_path: Path) -> None:
    rows = [
        {"db": database.name, "question": question, "gold_sql": query}
        for question, query in [
            ("Who sings?", "SELECT name FROM singer"),
            ("Who sings? " + "Hm. " * 300, "SELECT name FROM singer"),
            ("Who sings?", "SELECT surname FROM singer"),
            ("And where?", "SELECT city FROM stadium"),
        ]
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"name": "d", "kind": "text_to_sql", "path": str(path), "databases": str(database.parent)}
    data = {"train": settings, "invalid_gold": "drop", "max_prompt_tokens": 600}
    said = io.StringIO()
    config = Config.model_validate({"data": data})
    prompts, notes = load_prompts(config.data.train, config, tokenizer, Console(said), duplicates="drop")
    assert [prompt.prompt_id for prompt in prompts] == ["d-0", "d-3"]
    line = (
        f"data d (train): 2 prompts, 1 dropped without a gold to grade against, the first {path}:3, 1 longer than "
        "data.max_prompt_tokens=600 dropped, 2 with a schema trimmed by relevance (tables or columns left out), to fit"
    )
    assert said.getvalue().splitlines()[-1] == line
    assert notes[0] == line
    assert notes[1].startswith(f"data d (train): dropped {path}:3: 'SELECT surname FROM singer': the gold query does")


@pytest.mark.parametrize(
    ("question", "reward", "warned"),
    [
        ("How many boxed pens? Answer after ####.", {}, True),
        ("Answer after ####.", {"extraction": "auto"}, False),
        (r"Answer in \boxed{}.", {}, False),
    ],
)
def test_prompts_that_ask_for_no_box_are_said(
    tmp_path: Path,
    make_config: Any,
    caplog: pytest.LogCaptureFixture,
    question: str,
    reward: dict[str, str],
    warned: bool,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": question, "answer": "1"}))
    data = {"train": {"name": "d", "kind": "math", "path": str(path), "limit": 1}, "evaluation": ()}
    prepare(make_config(data=data, reward={"name": "math_answer", **reward}), Console(io.StringIO()))
    assert ("No prompt of d asks for \\boxed{}" in caplog.text) == warned


def test_a_token_that_the_model_does_not_know_is_refused(tiny_dir: str, make_config: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    config = make_config(model={"path": str(folder)})
    assert prepare(config, Console(io.StringIO())).prompts
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["FACTOR 6"])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"writes token \d+ in the prompt .* knows \d+ tokens") as caught:
        prepare(config, Console(io.StringIO()))
    assert "\n" not in str(caught.value)
