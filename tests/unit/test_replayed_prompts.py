"""Replay: near-perfect prompts that a step samples and trains like those to explore."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from dphrl.collect import collect_step
from dphrl.config.loading import load_config
from dphrl.data.schedule import derive_seed, spread, step_indices
from dphrl.loop import train
from dphrl.protocols import Parts
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, RowKind, TrainBatch

CORRECT, WRONG = RewardResult(RewardStatus.CORRECT), RewardResult(RewardStatus.WRONG)
EXPLORED = [Prompt(f"e{i:02}", "", (1, 2), "", "data") for i in range(24)]
MASTERED = [Prompt(f"m{i:02}", "", (1, 3), "", "data") for i in range(10)]


@dataclass
class World:
    """Engines, grader, learner and reference store in one. near_perfect: prompts of the split."""

    near_perfect: frozenset[str] = frozenset(p.prompt_id for p in MASTERED)
    exploration: frozenset[str] = frozenset(p.prompt_id for p in EXPLORED)
    policy_version: int = 0
    asked: list[list[str]] = field(default_factory=list)
    rehearsed: list[int] = field(default_factory=list)
    batches: list[TrainBatch] = field(default_factory=list)

    async def generate(self, prompts: Sequence[Prompt], num_samples: int, **_: Any) -> Any:
        self.asked.append([p.prompt_id for p in prompts])
        for p in prompts:
            await asyncio.sleep(0)
            yield [
                Completion(p.prompt_id, i, (7,), "", (-1.0,), "stop", self.policy_version) for i in range(num_samples)
            ]

    async def grade(self, items: Any) -> list[RewardResult]:
        """Of mastered prompts every answer is right, of the others the first alone."""
        return [CORRECT if p.prompt_id[0] == "m" or c.sample_index == 0 else WRONG for p, c in items]

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        self.rehearsed.append(step)
        return [ReferenceSample("m00", (1, 3), (7,), (-0.5,))] * num_rows

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        self.batches.append(batch)
        self.policy_version += 1
        return {}

    async def refit(self, learner: Any) -> dict[str, float]:
        return {}

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def after_step(self, *_: Any) -> None: ...


def replay_config(make_config: Any, share: float, num_prompts: int = 8, **changes: Any) -> Any:
    algorithm = {"divergence": "none", "num_minibatches": 2} | changes.pop("algorithm", {})
    return make_config(
        algorithm=algorithm,
        reference={"replay_share": share},
        rollout={"num_prompts": num_prompts, "num_samples": 2},
        **changes,
    )


def asked(config: Any, step: int, replayed: Sequence[Prompt] = MASTERED, explored: Sequence[Prompt] = EXPLORED) -> Any:
    world = World()
    parts = Parts(None, world, world)  # type: ignore[arg-type]
    rollouts = asyncio.run(collect_step(config, explored, parts, step, None, replayed))
    assert rollouts.metrics["rollout/num_rounds"] == sum(map(len, world.asked)) / len(world.asked[0])
    return world.asked


@pytest.mark.parametrize(
    ("share", "num_prompts", "expected"),
    # 0.25 x 8; 0.3 x 8 = 2.4; 0.01 x 8 = 0.08 is rounded up to one; none without a share.
    [(0.25, 8, 2), (0.3, 8, 2), (0.01, 8, 1), (0.0, 8, 0), (0.5, 4, 2)],
)
def test_a_share_of_the_steps_prompts_is_replayed_in_the_place_of_others(
    make_config: Any, share: float, num_prompts: int, expected: int
) -> None:
    config = replay_config(make_config, share, num_prompts)
    assert config.num_replayed == expected
    for step in range(3):
        (names,) = asked(config, step)
        assert len(names) == len(set(names)) == num_prompts
        assert sum(name[0] == "m" for name in names) == expected
        mine = step_indices(10, step, expected, derive_seed(config.seed, "replay"))
        assert [n for n in names if n[0] == "m"] == [MASTERED[i].prompt_id for i in mine]
        own = step_indices(24, step, num_prompts - expected, config.seed)
        assert [n for n in names if n[0] == "e"] == [EXPLORED[i].prompt_id for i in own]


def test_every_mastered_prompt_comes_back_before_any_comes_twice(make_config: Any) -> None:
    config = replay_config(make_config, 0.25)
    back = [name for step in range(5) for name in asked(config, step)[0] if name[0] == "m"]
    assert sorted(back) == [p.prompt_id for p in MASTERED]
    assert asked(config, 3) == asked(config, 3), "a function of seed and step"


def test_with_too_few_of_them_the_others_fill_the_step(make_config: Any) -> None:
    config = replay_config(make_config, 0.5)
    (names,) = asked(config, 0, MASTERED[:1])
    assert (len(names), sum(name[0] == "m" for name in names)) == (8, 1)
    (names,) = asked(config, 0, [])
    assert {name[0] for name in names} == {"e"}
    (names,) = asked(config, 0, MASTERED, [])
    assert [name[0] for name in names] == ["m"] * 4, "with nothing to explore the step has these alone"


def test_mini_batches_have_their_share_of_them(make_config: Any) -> None:
    assert spread([1, 2, 3, 4, 5, 6], [10, 20]) == [1, 2, 10, 3, 4, 5, 20, 6]
    assert spread([1], []) == [1]
    assert spread([], [10, 20]) == [10, 20]
    assert spread([1, 2], [10, 20]) == [1, 10, 2, 20], "of equal places the first list's"
    (names,) = asked(replay_config(make_config, 0.25), 0)
    assert [sum(name[0] == "m" for name in half) for half in (names[:4], names[4:])] == [1, 1]


def test_dynamic_sampling_replaces_a_mastered_group_that_teaches_nothing_by_one_to_explore(make_config: Any) -> None:
    config = replay_config(make_config, 0.25, algorithm={"dynamic_sampling_rounds": 3})
    first, *more = asked(config, 0)
    assert [len(names) for names in more] == [1, 1], "for each of the two"
    assert {names[0][0] for names in more} == {"e"}
    assert len({*first, *(name for names in more for name in names)}) == 10


def loop(config: Any, reference: Any = None) -> World:
    world = World()
    parts: Any = Parts(world, world, world)  # type: ignore[arg-type]
    observer: Any = world
    store: Any = world if reference is None else reference
    asyncio.run(train(config, [*EXPLORED, *MASTERED], parts, store, observer))
    return world


def test_replay_rehearses_nothing_through_the_divergence(make_config: Any) -> None:
    world = loop(replay_config(make_config, 0.25, learner={"num_steps": 2}))
    assert world.rehearsed == []
    rows = [row for batch in world.batches for minibatch in batch.minibatches for row in minibatch]
    assert {row.kind for row in rows} == {RowKind.POLICY}
    assert [sum(name[0] == "m" for name in names) for names in world.asked] == [2, 2]


def test_replay_and_a_divergence_go_together_and_without_replay_none_comes_back(make_config: Any) -> None:
    both = loop(replay_config(make_config, 0.25, algorithm={"divergence": "js"}, learner={"num_steps": 2}))
    assert both.rehearsed == [0, 1]
    assert [sum(name[0] == "m" for name in names) for names in both.asked] == [2, 2]
    neither = loop(replay_config(make_config, 0.0, algorithm={"divergence": "js"}, learner={"num_steps": 2}))
    assert {name[0] for names in neither.asked for name in names} == {"e"}


def test_replay_alone_has_a_reference_stage_and_no_rehearsal_rows() -> None:
    config = load_config("demo-math-replay")
    assert (config.uses_reference_stage, config.uses_reference_samples, config.uses_divergence) == (True, False, False)
    assert config.num_replayed * config.rollout.num_samples == load_config("demo-math").reference.rows_per_step
    assert not load_config("demo-math-grpo").uses_reference_stage
    # A count that divides into no mini-batches is one of rows that nobody asks for.
    load_config("demo-math-replay", ["reference.rows_per_step=7", "algorithm.num_minibatches=2"])


def test_a_plan_tells_how_many_come_back() -> None:
    from cluster.planning.describe import _batch

    told = dict(_batch(load_config("demo-math-replay")))
    assert told["replayed prompts a step"] == "8 near-perfect ones"
    assert told["rehearsal rows a step"] == "0"
    assert "replayed prompts a step" not in dict(_batch(load_config("demo-math")))
    told = dict(_batch(load_config("demo-math-entropy")))
    assert told["rehearsal rows a step"] == "64, of their tokens the 0.2 of highest entropy"


def test_the_stage_says_what_it_is_for(make_config: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from dphrl.reference.reuse import _notes, prepare_reference
    from dphrl.tracking.console import Console

    nothing: Any = SimpleNamespace()
    plain = replay_config(make_config, 0.0)
    console = Console(interactive=False)
    assert asyncio.run(prepare_reference(plain, nothing, nothing, nothing, tmp_path, console)) is None
    assert (
        "reference stage: none (no divergence, or one estimated on rollouts alone; no replay)"
        in capsys.readouterr().out
    )
    counts = {"num_prompts": 2, "num_graded": 8, "num_truncated": 0, "num_unconfirmed": 0, "num_stored_samples": 2}
    counts |= {"num_exploration": 0}
    (note,) = _notes(replay_config(make_config, 0.25), counts)
    assert note.startswith("NOTE: no prompt is left to explore: this run only replays. Use harder problems")
    (note,) = _notes(plain, counts)
    assert "no prompt is left to explore: the policy term is exactly 0: it only rehearses" in note
