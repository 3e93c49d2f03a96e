"""The embedded models: their tokenizers, the warm start and the cache. What the demos and experiments stand on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planning.shapes import KNOWN_SHAPES
from dphrl.tiny import WarmStartRecipe, build_tokenizer, ensure_tiny_model, grade, sql_task, warm_start
from dphrl.tiny.model import TinyShape
from dphrl.tiny.recipe import RECIPES, TASKS, Task
from dphrl.tiny.shipped import load_shipped, main, write_shipped
from dphrl.tiny.warm_start import demonstration_loss

QUICK = WarmStartRecipe(
    num_steps=3,
    batch_size=8,
    num_warmup_steps=1,
    shape=TinyShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2),
)


# --- the tokenizer ---


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_text_and_ids_round_trip(task: Task) -> None:
    tokenizer = build_tokenizer(task.vocabulary)
    for question, completion in task.make_demonstrations(200, seed=5):
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


def test_both_tasks_share_a_cache_and_each_has_its_own_words(quick_model: Path) -> None:
    from transformers import AutoTokenizer

    recipe = replace(QUICK, task="sql")
    directory = ensure_tiny_model(quick_model.parent, recipe=recipe)
    assert {quick_model.name.split("-")[1], directory.name.split("-")[1]} == {"factor", "sql"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for _, sql in sql_task.make_demonstrations(20, seed=0):
        assert tokenizer.decode(tokenizer(sql)["input_ids"]) == sql
        assert AutoTokenizer.from_pretrained(quick_model)(sql)["input_ids"].count(tokenizer.unk_token_id) > 10


def test_a_recipe_for_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="task 'spql' is unknown: choose one of factor, sql"):
        replace(QUICK, task="spql")


def test_a_second_call_trains_nothing(quick_model: Path) -> None:
    steps: list[tuple[int, int]] = []
    again = ensure_tiny_model(quick_model.parent, lambda *step: steps.append(step), recipe=QUICK)
    assert again == quick_model
    assert steps == []
    assert not [path.name for path in quick_model.parent.iterdir() if path.name.startswith(".")]
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
        replace(QUICK, task="sql"),
        replace(QUICK, shape=replace(QUICK.shape, num_layers=2)),
    ]
    assert len({recipe.fingerprint() for recipe in [QUICK, *changed]}) == 6


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


# --- the weights that come with the package ---


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_recipe_comes_with_trained_weights(recipe: WarmStartRecipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    steps: list[tuple[int, int]] = []
    directory = ensure_tiny_model(tmp_path, lambda *step: steps.append(step), recipe=recipe)
    assert steps == [], "the recipe and the weights do not belong together: python -m dphrl.tiny.shipped"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert str(model.dtype) == "torch.float32"
    # Small enough for a laptop, and the sizes that `dphrl plan` reckons with.
    assert model.num_parameters() == pytest.approx(KNOWN_SHAPES[f"tiny-{recipe.task}"].num_parameters, rel=0.05)
    # 3 nats are those of an untrained model; a seed that the warm start did not see.
    assert demonstration_loss(model, recipe, seed=1, num_batches=2) < 0.2


def test_a_changed_recipe_is_trained_and_not_taken_from_the_package() -> None:
    for recipe in RECIPES.values():
        assert load_shipped(replace(recipe, num_steps=recipe.num_steps + 1)) is None
    assert load_shipped(QUICK) is None


def test_written_weights_come_back_but_for_the_rounding_to_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = warm_start(QUICK)
    write_shipped(QUICK, model, tmp_path)
    monkeypatch.setattr("dphrl.tiny.shipped._FOLDER", tmp_path)
    loaded, tokenizer = load_shipped(QUICK) or pytest.fail("not found")
    assert len(tokenizer) == model.config.vocab_size
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    for (name, before), (_, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert after.equal(before.half().float()), name


@pytest.mark.parametrize("tasks", [[], ["spql"], ["sql", "spql"]])
def test_the_command_that_writes_them_names_the_tasks(tasks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tasks) == 2
    assert "of factor, sql" in capsys.readouterr().err
