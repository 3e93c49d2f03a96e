"""A run in one process: its completions are samples of the policy, whatever a model's generation configuration asks."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dphrl.inline import InlineLearner, InlineRollouts, InlineSystem, SeededChoice
from dphrl.tokenizer import load_tokenizer


def complete(folder: Path, prompts: list[Any], make_config: Any) -> list[tuple[int, ...]]:
    """Two sampled and one greedy completion of some prompts."""
    config = make_config()
    learner = InlineLearner(config, str(folder))
    rollouts = InlineRollouts(learner, load_tokenizer(folder), config)

    async def run() -> list[tuple[int, ...]]:
        await rollouts.refit(learner)
        found = []
        for num_samples, greedy in ((2, False), (1, True)):
            async for batch in rollouts.generate(prompts[:4], num_samples, seed=1, greedy=greedy):
                found += [completion.token_ids for completion in batch]
        return found

    return asyncio.run(run())


@pytest.fixture
def folder(tiny_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"min_p": 0.9},
        {"typical_p": 0.2},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 2},
        {"num_return_sequences": 2},
        {"stop_strings": ["x"]},
        {"temperature": 0.1, "top_p": 0.2, "top_k": 1},
    ],
)
def test_a_models_own_way_to_sample_changes_no_completion(
    settings: dict[str, Any], folder: Path, prompts: list[Any], make_config: Any
) -> None:
    usual = complete(folder, prompts, make_config)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert complete(folder, prompts, make_config) == usual


def test_a_model_ends_at_each_of_its_end_tokens(folder: Path, prompts: list[Any], make_config: Any) -> None:
    # A token that the model says early, and its usual end.
    early = max(complete(folder, prompts, make_config), key=len)[1]
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, early]}))
    ended = complete(folder, prompts, make_config)
    assert early in {token_ids[-1] for token_ids in ended}
    assert not any({2, early} & {*token_ids[:-1]} for token_ids in ended)


def test_a_model_without_any_end_token_can_be_sampled(folder: Path, prompts: list[Any], make_config: Any) -> None:
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        path = folder / name
        told = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith(("eos_token", "pad_token"))}
        path.write_text(json.dumps(told))
    longest = make_config().rollout.max_tokens
    assert {len(token_ids) for token_ids in complete(folder, prompts, make_config)} == {longest}


def test_a_padding_token_without_an_embedding_pads_no_batch(folder: Path, prompts: list[Any], make_config: Any) -> None:
    usual = complete(folder, prompts, make_config)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "[PAD]"}))
    assert complete(folder, prompts, make_config) == usual
    shorter = replace(prompts[0], token_ids=prompts[0].token_ids[1:])
    complete(folder, [prompts[0], shorter], make_config)


def test_the_system_ends_its_rewards_child(tiny_dir: str, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    with InlineSystem(make_config(), tiny_dir, load_tokenizer(Path(tiny_dir))) as system:
        monkeypatch.setattr(system.rewards.grader, "close", lambda: ended.append("reward"))
        assert ended == []
    assert ended == ["reward"]


def test_a_completion_is_a_function_of_its_prompt_and_the_seed(
    tiny_dir: str, prompts: list[Any], make_config: Any
) -> None:
    learners: list[InlineLearner] = []

    def sample(chosen: list[Any], num_samples: int, seed: int, at_once: int) -> dict[tuple[str, int], tuple[int, ...]]:
        config = make_config(rollout={"max_concurrent_sequences": at_once})
        learners.append(learner := InlineLearner(config, tiny_dir))
        rollouts = InlineRollouts(learner, load_tokenizer(tiny_dir), config)

        async def run() -> dict[tuple[str, int], tuple[int, ...]]:
            await rollouts.refit(learner)
            stream = rollouts.generate(chosen, num_samples, seed=seed)
            return {(c.prompt_id, c.sample_index): c.token_ids async for batch in stream for c in batch}

        return asyncio.run(run())

    expected = sample(prompts, 4, 3, at_once=256)
    assert sample(prompts[::-1], 4, 3, at_once=256) == expected
    assert sample(prompts, 4, 3, at_once=5) == expected
    parts = [sample(prompts[i::3], 4, 3, at_once=256) for i in range(3)]
    assert {key: ids for part in parts for key, ids in part.items()} == expected
    assert sample(prompts, 2, 3, at_once=256).items() <= expected.items()
    assert sample(prompts, 4, 4, at_once=256) != expected
    twin = replace(prompts[0], prompt_id="twin")
    both = sample([prompts[0], twin], 16, 3, at_once=256)
    of_prompt, of_twin = ([ids for (name, _), ids in both.items() if name == n] for n in (prompts[0].prompt_id, "twin"))
    assert len({*of_prompt}) > 1
    assert of_prompt != of_twin


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_seeded_choices_follow_the_distribution_at_the_temperature(make_config: Any, temperature: float) -> None:
    num_rows = 20_000
    logits = torch.tensor([0.3, -torch.inf, 1.0, -1.0, 0.0])
    choose = SeededChoice(range(num_rows), make_config(rollout={"temperature": temperature}))
    for _ in range(2):
        left = choose(torch.empty(0), logits.expand(num_rows, -1))
        assert (left.isfinite().sum(dim=-1) == 1).all()
        shares = left.argmax(dim=-1).bincount(minlength=5) / num_rows
        # Four standard deviations of a share that is estimated from so many rows.
        assert (shares - (logits / temperature).softmax(dim=-1)).abs().max() < 4 * 0.5 / num_rows**0.5
        assert shares[1] == 0


def test_calls_are_served_in_their_order_and_to_their_end(tiny_dir: str, prompts: list[Any], make_config: Any) -> None:
    config = make_config(rollout={"max_concurrent_sequences": 2, "max_tokens": 3})
    learner = InlineLearner(config, tiny_dir)
    rollouts = InlineRollouts(learner, load_tokenizer(tiny_dir), config)
    batches: list[int] = []

    async def call(number: int, priority: int = 0) -> list[tuple[Any, ...]]:
        found = []
        async for batch in rollouts.generate(prompts[number : number + 2], 2, seed=number, priority=priority):
            batches.append(number)
            found += [(c.prompt_id, c.sample_index, c.token_ids) for c in batch]
            await asyncio.sleep(0)
        return found

    async def run() -> list[Any]:
        await rollouts.refit(learner)
        together = await asyncio.gather(*map(call, range(3)))
        assert batches == [0, 0, 1, 1, 2, 2]
        assert together == [await call(number) for number in range(3)], "and as if it were alone"
        batches.clear()
        await asyncio.gather(*[call(number, priority=-number) for number in range(3)])
        assert batches == [0, 0, 2, 2, 1, 1], "the first runs already; of those that wait, the lowest number"
        left = rollouts.generate(prompts[:2], 2, seed=0)
        await anext(left)
        await left.aclose()
        assert await call(1) == together[1], "a call that is given up leaves the turn to the next"
        return together

    asyncio.run(run())
