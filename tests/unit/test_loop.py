"""What the loop does in which order, written down by parts that only record what they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from dphrl.data.schedule import derive_seed, step_indices
from dphrl.loop import train
from dphrl.protocols import Parts
from dphrl.types import (
    Completion,
    Prompt,
    ReferenceSample,
    RewardResult,
    RewardStatus,
    RolloutGroup,
    RowKind,
    TrainBatch,
)

PROMPTS = [Prompt(f"p{i}", f"question {i}", (1, 2, 10 + i), "", "data") for i in range(16)]
NEAR_PERFECT = frozenset({"p0", "p5", "p9"})
DROPPED = frozenset({"p3"})
EXPLORATION = frozenset(p.prompt_id for p in PROMPTS) - NEAR_PERFECT - DROPPED


@dataclass
class World:
    """Learner, engines, grader, reference store and observer in one: `events` is what happened, in order."""

    solved: Any = lambda prompt_id, i: i % 2 == 0
    refit_works: bool = True
    policy_version: int = 0
    engine_version: int = 0
    events: list[tuple[Any, ...]] = field(default_factory=list)
    batches: list[TrainBatch] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    near_perfect: frozenset[str] = NEAR_PERFECT
    exploration: frozenset[str] = EXPLORATION

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        self.events.append(("update", batch.step))
        self.batches.append(batch)
        for _ in range(50):  # long enough for whatever runs beside it to come to its turn
            await asyncio.sleep(0)
        self.policy_version += 1
        self.events.append(("updated", batch.step))
        return {"learner/grad_norm": 1.0}

    async def refit(self, learner: Any) -> dict[str, float]:
        self.events.append(("refit", learner.policy_version))
        if self.refit_works:
            self.engine_version = learner.policy_version
        return {"sync/logprob_gap_max": 0.0}

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> Any:
        version = self.engine_version
        self.priorities.append(priority)
        self.events.append(("generate", tuple(p.prompt_id for p in prompts), num_samples, seed, greedy, version))
        for prompt in prompts:
            await asyncio.sleep(0)
            yield [
                Completion(prompt.prompt_id, i, (7, 8), "", (-1.0,) * 2, "stop", version) for i in range(num_samples)
            ]

    async def grade(self, items: Any) -> list[RewardResult]:
        return [
            RewardResult(RewardStatus.CORRECT if self.solved(p.prompt_id, c.sample_index) else RewardStatus.WRONG)
            for p, c in items
        ]

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        self.events.append(("rehearse", step, num_rows))
        return [ReferenceSample("p0", (1, 2, 10), (5, 6), (-0.1, -0.2)) for _ in range(num_rows)]

    async def after_step(self, step: int, metrics: Any, groups: Sequence[RolloutGroup], batch: Any) -> None:
        self.events.append(("observe", step, dict(metrics), tuple(group.prompt.prompt_id for group in groups)))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]

    def place(self, kind: str, number: int) -> int:
        """Where in the order of events the `number`-th of a kind (from 0) is."""
        return self.events.index(self.of(kind)[number])


def run(
    make_config: Any, world: World | None = None, *, start_step: int = 0, plain: bool = False, **changes: Any
) -> World:
    sections: dict[str, Any] = {
        "rollout": {"num_prompts": 2, "num_samples": 4},
        "reference": {"rows_per_step": 6},
        "learner": {"num_steps": 4},
    }
    for name, section in changes.items():
        sections[name] = {**sections.get(name, {}), **section} if isinstance(section, dict) else section
    world = world or World()
    parts: Any = Parts(world, world, world)  # type: ignore[arg-type]
    asyncio.run(train(make_config(**sections), PROMPTS, parts, None if plain else world, world, start_step=start_step))
    return world


# ----------------------------------------------------------------------------- which prompts, which seeds


def test_only_the_prompts_of_the_exploration_set_are_rolled_out(make_config: Any) -> None:
    world = run(make_config, learner={"num_steps": 12})
    asked = {prompt_id for _, prompt_ids, *_ in world.of("generate") for prompt_id in prompt_ids}
    assert asked == EXPLORATION
    plain = run(make_config, plain=True, algorithm={"divergence": "none"}, learner={"num_steps": 16})
    assert {prompt_id for _, prompt_ids, *_ in plain.of("generate") for prompt_id in prompt_ids} == {
        p.prompt_id for p in PROMPTS
    }
    assert plain.of("rehearse") == []
    assert all(row.kind is RowKind.POLICY for batch in plain.batches for rows in batch.minibatches for row in rows)


def test_prompts_and_seeds_are_those_of_the_step_and_the_run(make_config: Any) -> None:
    world, other = run(make_config, seed=3), run(make_config, seed=4)
    explored = [p.prompt_id for p in PROMPTS if p.prompt_id in EXPLORATION]
    for step, (_, prompt_ids, num_samples, seed, greedy, _) in enumerate(world.of("generate")):
        assert prompt_ids == tuple(explored[i] for i in step_indices(len(explored), step, 2, 3))
        assert (seed, num_samples, greedy) == (derive_seed(3, "rollout", step), 4, False)
    seeds = [event[3] for event in world.of("generate") + other.of("generate")]
    assert len(set(seeds)) == 8, "no two steps share a seed, nor two runs"
    assert [event[1] for event in world.of("generate")] != [event[1] for event in other.of("generate")]


def test_prompts_in_the_place_of_others_have_the_steps_seed(make_config: Any) -> None:
    # Twelve prompts to explore, at most six of them in a step of two.
    world = run(
        make_config,
        World(solved=lambda prompt_id, i: False),
        algorithm={"dynamic_sampling_rounds": 3, "num_minibatches": 1},
        learner={"num_steps": 4},
    )
    asked = world.of("generate")
    seeds = [seed for _, _, _, seed, *_ in asked]
    assert len(set(seeds)) == 4
    for seed in set(seeds):
        of_step = [prompt_id for _, prompt_ids, _, own, *_ in asked for prompt_id in prompt_ids if own == seed]
        assert len(of_step) == len(set(of_step)) == 6


def test_a_step_trains_on_groups_with_signal_and_reports_all_it_sampled(make_config: Any) -> None:
    flat = {"p1", "p2", "p4", "p6", "p7", "p8"}
    world = run(
        make_config,
        World(solved=lambda prompt_id, i: prompt_id not in flat and i % 2 == 0),
        algorithm={"dynamic_sampling_rounds": 6, "num_minibatches": 1},
        learner={"num_steps": 3},
    )
    for batch, (_, _, metrics, sampled) in zip(world.batches, world.of("observe"), strict=True):
        trained = {f"p{row.token_ids[2] - 10}" for row in batch.minibatches[0] if row.kind is RowKind.POLICY}
        assert (len(trained), trained & flat) == (2, set())
        assert len(sampled) == 2 * metrics["rollout/num_rounds"]
        assert metrics["reward/zero_variance_fraction"] == sum(p in flat for p in sampled) / len(sampled)
    assert any(len(sampled) > 2 for _, _, _, sampled in world.of("observe"))


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(make_config: Any, max_staleness: int) -> None:
    settings = {"learner": {"num_steps": 6}, "rollout": {"max_staleness": max_staleness}, "seed": 5}
    whole = run(make_config, **settings)
    rest = run(make_config, World(policy_version=3, engine_version=3), start_step=3, **settings)
    assert [event[1:5] for event in rest.of("generate")] == [event[1:5] for event in whole.of("generate")][3:]
    assert rest.of("rehearse") == whole.of("rehearse")[3:]
    assert [event[1] for event in rest.of("observe")] == [4, 5, 6]
    assert [batch.learning_rate for batch in rest.batches] == [batch.learning_rate for batch in whole.batches][3:]


# --------------------------------------------------------------------------------------- in which order


def test_on_policy_a_step_is_sampled_after_the_refit_that_follows_the_update(make_config: Any) -> None:
    world = run(make_config)
    kinds = [kind for kind, *_ in world.events]
    assert kinds == ["generate", "rehearse", "update", "updated", "refit", "observe"] * 4
    assert [event[-1] for event in world.of("generate")] == [0, 1, 2, 3], "each with the newest weights"
    assert [event[1] for event in world.of("refit")] == [1, 2, 3, 4]


def test_with_staleness_the_next_step_is_asked_for_beside_this_one(make_config: Any) -> None:
    world = run(make_config, rollout={"max_staleness": 1})
    assert len(world.of("generate")) == 4, "none is made again, and none after the last step"
    assert world.place("generate", 1) < world.place("update", 0), "engines need work while the last completions end"
    for step in (1, 2):
        assert world.place("generate", step + 1) < world.place("updated", step)
        assert world.place("refit", step - 1) < world.place("generate", step + 1), "or tokens were too old"
    assert [event[-1] for event in world.of("generate")] == [0, 0, 1, 2], "with the weights of the step before"
    assert [event[1] for event in world.of("refit")] == [1, 2, 3, 4], "a refit follows every update all the same"
    staleness = [metrics["rollout/staleness_max"] for _, _, metrics, _ in world.of("observe")]
    assert staleness == [0, 1, 1, 1]


@pytest.mark.parametrize("bound", [2, 3, 9])
def test_engines_are_up_to_so_many_steps_ahead_and_no_token_is_older(make_config: Any, bound: int) -> None:
    world = run(make_config, rollout={"max_staleness": bound}, learner={"num_steps": 6})
    assert len(world.of("generate")) == 6, "none is made again, and none after the last step"
    staleness = [metrics["rollout/staleness_max"] for _, _, metrics, _ in world.of("observe")]
    assert staleness == [min(step, bound) for step in range(6)]
    assert [metrics["rollout/staleness_mean"] for _, _, metrics, _ in world.of("observe")] == staleness
    assert all(metrics["queue/steps_ready"] <= bound for _, _, metrics, _ in world.of("observe"))
    assert [event[1] for event in world.of("generate")] == [event[1] for event in run_of_steps(make_config)]
    assert world.priorities == list(range(6)), "engines work on an earlier step first"


def run_of_steps(make_config: Any) -> list[tuple[Any, ...]]:
    return run(make_config, learner={"num_steps": 6}).of("generate")


@pytest.mark.parametrize(("max_staleness", "updates"), [(0, 1), (1, 2), (3, 4)])
def test_completions_staler_than_allowed_stop_the_run(make_config: Any, max_staleness: int, updates: int) -> None:
    world = World(refit_works=False)
    with pytest.raises(RuntimeError, match=f"outside rollout.max_staleness={max_staleness}"):
        run(make_config, world, rollout={"max_staleness": max_staleness}, learner={"num_steps": 6})
    assert len(world.of("update")) == updates


# ------------------------------------------------------------------------------- what each part is told


def test_each_step_rehearses_its_own_rows(make_config: Any) -> None:
    world = run(make_config)
    assert [event[1:] for event in world.of("rehearse")] == [(step, 6) for step in range(4)]
    for batch in world.batches:
        kinds = [[row.kind for row in rows] for rows in batch.minibatches]
        assert [of.count(RowKind.REFERENCE) for of in kinds] == [3, 3], "half of them in each mini-batch"
        assert [of.count(RowKind.POLICY) for of in kinds] == [4, 4]


def test_the_batch_is_of_the_step_and_of_the_version_before_the_update(make_config: Any) -> None:
    world = run(make_config, learner={"num_steps": 4, "lr": 1.0, "warmup_steps": 2})
    assert [(batch.step, batch.policy_version) for batch in world.batches] == [(step, step) for step in range(4)]
    assert [batch.learning_rate for batch in world.batches] == [0.5, 1.0, 1.0, 1.0]


def test_the_observer_counts_from_one_and_hears_the_version_after_the_update(make_config: Any) -> None:
    world = run(make_config)
    for number, ((_, step, metrics, sampled), asked) in enumerate(
        zip(world.of("observe"), world.of("generate"), strict=True), start=1
    ):
        assert (step, metrics["step"], metrics["policy_version"]) == (number, number, number)
        assert sampled == asked[1]
        assert metrics["reward/mean"] == 0.5
        assert metrics["learner/grad_norm"] == 1.0
        assert metrics["sync/logprob_gap_max"] == 0.0
        assert metrics["time/step_s"] >= metrics["time/learn_s"] > 0
