"""The embedded task and model: what the rest of the suite, the demos and the experiments stand on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dphrl.tiny import (
    DIVISORS,
    SPLITS,
    WarmStartRecipe,
    build_tokenizer,
    ensure_tiny_model,
    grade,
    is_held_out,
    make_demonstrations,
    make_problems,
)
from dphrl.tiny.model import TinyShape

QUICK = WarmStartRecipe(
    num_steps=3,
    batch_size=8,
    num_warmup_steps=1,
    shape=TinyShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2),
)


def number_of(text: str) -> int:
    """The integer in a question or an answer."""
    if text.startswith(("FACTOR", "DIVIDE")):
        return int("".join(text.removesuffix(" ?").split()[-5:]))
    return int(text.rsplit(":", 1)[1])


def answer_to(question: str) -> str:
    words = question.split()
    kind = "factor" if words[0] == "FACTOR" else f"divide:{words[1]}"
    return f"{kind}:{number_of(question):05d}"


# --- the problems ---


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_solvable_distinct_and_say_what_they_ask(split: str) -> None:
    problems = make_problems(split, 400, seed=3)
    assert len({problem.problem_id for problem in problems}) == len({problem.question for problem in problems}) == 400
    for problem in problems:
        number = number_of(problem.question)
        assert 10 < number < 100_000
        assert problem.answer == answer_to(problem.question)
        named = [int(problem.question.split()[1])] if split == "out_of_domain" else DIVISORS
        assert any(number % p == 0 for p in named)


def test_no_evaluation_number_is_ever_trained_on() -> None:
    trained = {number_of(problem.question) for seed in (0, 1) for problem in make_problems("train", 2000, seed)}
    trained |= {number_of(question) for question, _ in make_demonstrations(3000, seed=0)}
    for split in ("held_out", "out_of_domain"):
        evaluated = {number_of(problem.question) for problem in make_problems(split, 1000, seed=0)}
        assert not trained & evaluated
        assert all(map(is_held_out, evaluated))
    assert not any(map(is_held_out, trained))


def test_one_integer_in_five_is_held_out() -> None:
    assert 0.19 < sum(map(is_held_out, range(20_000))) / 20_000 < 0.21


def test_problems_depend_on_the_seed_alone() -> None:
    problems = make_problems("train", 50, seed=7)
    assert make_problems("train", 50, seed=7) == problems
    assert make_problems("train", 20, seed=7) == problems[:20]
    assert make_problems("train", 50, seed=8) != problems
    assert make_demonstrations(20, seed=7) == make_demonstrations(20, seed=7)
    # A fixed example: two machines, or two releases, must mean the same problems by the same seed.
    assert make_problems("held_out", 1, seed=1)[0].question == "FACTOR 4 6 5 9 6 ?"


def test_every_strategy_is_worth_about_the_same_and_none_is_enough() -> None:
    numbers = [number_of(problem.question) for problem in make_problems("train", 1000, seed=0)]
    for divisor in DIVISORS:
        assert 0.35 < sum(number % divisor == 0 for number in numbers) / 1000 < 0.65


@pytest.mark.parametrize(("split", "num_problems"), [("test", 1), ("train", -1), ("held_out", 1_000_000)])
def test_impossible_requests_name_the_value(split: str, num_problems: int) -> None:
    with pytest.raises(ValueError, match="test" if split == "test" else str(num_problems)):
        make_problems(split, num_problems, seed=0)


# --- the demonstrations ---


def test_a_fifth_of_the_demonstrations_slip_and_the_rest_are_correct() -> None:
    demonstrations = make_demonstrations(4000, seed=1)
    statuses = [grade(completion, answer_to(question))[0] for question, completion in demonstrations]
    assert set(statuses) == {"correct", "wrong"}
    assert 0.17 < statuses.count("wrong") / len(statuses) < 0.23
    assert 0.22 < sum(question.startswith("DIVIDE") for question, _ in demonstrations) / len(demonstrations) < 0.28
    exact = make_demonstrations(500, seed=1, slip_rate=0.0)
    assert {grade(completion, answer_to(question))[0] for question, completion in exact} == {"correct"}


def test_demonstrations_choose_evenly_among_the_divisors_that_work() -> None:
    chosen = [
        int(completion.split()[0])
        for question, completion in make_demonstrations(30_000, seed=2, divide_share=0.0)
        if number_of(question) % 231 == 0
    ]
    assert len(chosen) > 1000
    for divisor in DIVISORS:
        assert 0.28 < chosen.count(divisor) / len(chosen) < 0.39


def test_a_slip_spoils_one_remainder_and_the_rest_follows_from_it() -> None:
    for question, completion in make_demonstrations(300, seed=4, slip_rate=1.0):
        words = completion.split()
        divisor, remainders = int(words[0]), list(map(int, words[2:7]))
        digits = list(map(int, f"{number_of(question):05d}"))
        before = [0, *remainders[:-1]]
        expected = [(10 * r + d) % divisor for r, d in zip(before, digits, strict=True)]
        assert sum(r != e for r, e in zip(remainders, expected, strict=True)) == 1
        assert all(0 <= r < divisor for r in remainders)
        quotient = [(10 * r + d) // divisor for r, d in zip(before, digits, strict=True)]
        assert list(map(int, words[10:15])) == quotient


# --- the grader ---


@pytest.mark.parametrize(
    ("completion", "answer", "status"),
    [
        (r"3 : 0 1 2 0 0 \boxed{3*01386}", "factor:04158", "correct"),
        (r"7 : 0 4 6 2 0 \boxed{ 7 * 0 0 5 9 4 }", "factor:04158", "correct"),
        ("\\boxed {\t11\n* 378 }", "factor:04158", "correct"),
        (r"\boxed{11*00378}", "divide:11:04158", "correct"),
        (r"\boxed{03*1386}", "factor:04158", "correct"),
        (r"\boxed{7*00594} <eos> and so on", "factor:04158", "correct"),
        # The last box counts, and only the last.
        (r"\boxed{3*01387} no: \boxed{3*01386}", "factor:04158", "correct"),
        (r"\boxed{3*01386} no: \boxed{3*01387}", "factor:04158", "wrong"),
        (r"\boxed{3*01386} or \boxed{", "factor:04158", "unparsable"),
        (r"\boxed{3*01386} or \boxed{7}", "factor:04158", "unparsable"),
        # Wrong products and divisors.
        (r"\boxed{3*01385}", "factor:04158", "wrong"),
        (r"\boxed{3*41580}", "factor:04158", "wrong"),
        (r"\boxed{1*04158}", "factor:04158", "wrong"),
        (r"\boxed{2*02079}", "factor:04158", "wrong"),
        (r"\boxed{21*00198}", "factor:04158", "wrong"),
        (r"\boxed{0*00000}", "factor:04158", "wrong"),
        (r"\boxed{01386*3}", "factor:04158", "wrong"),
        (r"\boxed{3*01386}", "divide:7:04158", "wrong"),
        # No readable answer.
        ("", "factor:04158", "unparsable"),
        ("3 * 1386", "factor:04158", "unparsable"),
        (r"\boxed{}", "factor:04158", "unparsable"),
        (r"\boxed{3*01386", "factor:04158", "unparsable"),
        (r"boxed{3*01386}", "factor:04158", "unparsable"),
        (r"\boxed{3*-1386}", "factor:04158", "unparsable"),
        (r"\boxed{-3*-1386}", "factor:04158", "unparsable"),
        (r"\boxed{3*1386.0}", "factor:04158", "unparsable"),
        (r"\boxed{3*1_386}", "factor:04158", "unparsable"),
        (r"\boxed{3**1386}", "factor:04158", "unparsable"),
        (r"\boxed{3*2*693}", "factor:04158", "unparsable"),
        (r"\boxed{{3*01386}}", "factor:04158", "unparsable"),
        (r"\boxed{3*001386}", "factor:04158", "unparsable"),
        (r"\boxed{3*٠١٣٨٦}", "factor:04158", "unparsable"),  # digits to int(), not to us
        (r"\boxed{³*1386}", "factor:04158", "unparsable"),
    ],
)
def test_grader(completion: str, answer: str, status: str) -> None:
    assert grade(completion, answer)[0] == status


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{3*" + "9" * 100_000 + "}",
        "\\boxed" * 50_000,
        "\\boxed{" * 50_000,
        "\\boxed" + " " * 100_000 + "3*1386}",
        "\\boxed{\x00\ud800*\udfff}",
        "}\\boxed",
        "\u202e\\boxed{3*1386",
    ],
    ids=["huge-number", "no-braces", "all-open", "long-gap", "surrogates", "reversed", "right-to-left"],
)
def test_hostile_text_is_unparsable_and_the_detail_can_be_written(text: str) -> None:
    status, detail = grade(text, "factor:04158")
    assert status == "unparsable"
    assert len(detail.encode()) < 200


@pytest.mark.parametrize("answer", ["", "04158", "factor:4158", "divide:04158", "divide:7:04158 ", "factor:٠٤١٥٨"])
def test_an_answer_of_another_task_is_an_error_not_a_wrong_completion(answer: str) -> None:
    with pytest.raises(ValueError, match="not of this task"):
        grade(r"\boxed{3*01386}", answer)


# --- the tokenizer ---


def test_text_and_ids_round_trip() -> None:
    tokenizer = build_tokenizer()
    for question, completion in make_demonstrations(200, seed=5):
        for text in (question, completion):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    plain_ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    text = tokenizer.decode([*plain_ids, *reversed(plain_ids)], skip_special_tokens=True)
    assert tokenizer(text)["input_ids"] == [*plain_ids, *reversed(plain_ids)]


def test_chat_template_places_every_special_token_once() -> None:
    tokenizer = build_tokenizer()
    user = {"role": "user", "content": "DIVIDE 11 0 4 1 5 8 ?"}
    assistant = {"role": "assistant", "content": r"11 : 0 4 8 8 0 \boxed{ 11 * 0 0 3 7 8 }"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<bos>", *user["content"].split(), "<assistant>"]
    rendered = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert tokenizer(rendered)["input_ids"] == prompt
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=True)["input_ids"]
    assert whole == prompt + tokenizer(assistant["content"])["input_ids"] + [tokenizer.eos_token_id]
    shown = tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)
    assert grade(shown, "divide:11:04158")[0] == "correct"


# --- the warm start ---


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_model(tmp_path_factory.mktemp("cache"), recipe=QUICK)


def test_saved_directory_loads_with_the_auto_classes(quick_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, built = AutoTokenizer.from_pretrained(quick_model), build_tokenizer()
    text = r"10 : 0 1 \boxed{ 7 * 0 }"
    assert tokenizer(text)["input_ids"] == built(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "FACTOR 0 4 1 5 8 ?"}]
    arguments = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompt = tokenizer.apply_chat_template(messages, **arguments)
    assert prompt["input_ids"].equal(built.apply_chat_template(messages, **arguments)["input_ids"])
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "<pad>", "left")

    model = AutoModelForCausalLM.from_pretrained(quick_model)
    assert str(model.dtype) == "torch.float32"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.generation_config.top_k
    output = model.generate(**prompt, max_new_tokens=4)
    assert output.shape[1] <= prompt["input_ids"].shape[1] + 4


def test_a_second_call_trains_nothing(quick_model: Path) -> None:
    steps: list[tuple[int, int]] = []
    again = ensure_tiny_model(quick_model.parent, lambda *step: steps.append(step), recipe=QUICK)
    assert again == quick_model
    assert steps == []
    assert [path.name for path in quick_model.parent.iterdir()] == [quick_model.name]
    assert json.loads((quick_model / "recipe.json").read_text())["num_steps"] == 3


def test_warm_start_is_reproducible_reports_progress_and_leaves_torch_alone(
    quick_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.manual_seed(123)
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    monkeypatch.setenv("DPHRL_CACHE", str(tmp_path))
    steps: list[tuple[int, int]] = []
    again = ensure_tiny_model(progress=lambda *step: steps.append(step), recipe=QUICK)
    assert again == tmp_path / quick_model.name
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (again / "model.safetensors").read_bytes() == (quick_model / "model.safetensors").read_bytes()
    assert torch.get_rng_state().equal(state)
    assert torch.get_num_threads() == num_threads


def test_the_loss_falls_within_a_few_steps_and_covers_the_completion_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from dphrl.tiny import warm_start

    losses: list[float] = []
    original = torch.nn.functional.cross_entropy

    def spy(logits: torch.Tensor, labels: torch.Tensor, **kwargs: int) -> torch.Tensor:
        assert int((labels != kwargs["ignore_index"]).sum()) == 17 * 32  # p : 5 remainders \boxed{ p * 5 digits } <eos>
        losses.append(original(logits, labels, **kwargs).item())
        return original(logits, labels, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    warm_start(replace(QUICK, num_steps=30, batch_size=32, lr=1e-2))
    assert losses[0] == pytest.approx(3.18, abs=0.3)  # log of 24 tokens: an untrained model knows nothing
    assert losses[-1] < losses[0] - 1.0


def test_any_number_of_the_recipe_changes_the_cache_entry() -> None:
    changed = [
        replace(QUICK, seed=1),
        replace(QUICK, lr=1e-4),
        replace(QUICK, slip_rate=0.0),
        replace(QUICK, shape=replace(QUICK.shape, num_layers=2)),
    ]
    assert len({recipe.fingerprint() for recipe in [QUICK, *changed]}) == 5


def test_a_damaged_entry_is_rebuilt_and_an_interrupted_warm_start_leaves_nothing(tmp_path: Path) -> None:
    directory = ensure_tiny_model(tmp_path, recipe=QUICK)
    (directory / "model.safetensors").unlink()
    assert ensure_tiny_model(tmp_path, recipe=QUICK) == directory
    assert (directory / "model.safetensors").is_file()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_model(tmp_path, interrupt, recipe=replace(QUICK, seed=9))
    assert list(tmp_path.iterdir()) == [directory]


def test_a_process_that_finishes_second_keeps_the_first_ones_model(tmp_path: Path) -> None:
    marker = {}

    def other_process_wins(done: int, total: int) -> None:
        if done == total:
            winner = ensure_tiny_model(tmp_path, recipe=QUICK)
            marker["inode"] = (winner / "model.safetensors").stat().st_ino

    directory = ensure_tiny_model(tmp_path, other_process_wins, recipe=QUICK)
    assert (directory / "model.safetensors").stat().st_ino == marker["inode"]
    assert list(tmp_path.iterdir()) == [directory]


def test_importing_the_task_loads_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "tokenizers"}
    code = f"import sys, dphrl.tiny.task; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
