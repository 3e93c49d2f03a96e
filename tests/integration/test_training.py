"""The whole pipeline: on Ray, inline, resumed; and both modes against each other."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import open_system, run_training
from dphrl.config.loading import InputError, dump_config
from dphrl.prepare import prepare
from dphrl.protocols import Parts
from dphrl.reference.buffer import ReferenceBuffer
from dphrl.replay import stored_steps
from dphrl.run import training_run
from dphrl.tracking.console import Console
from dphrl.tracking.events import read_events
from dphrl.tracking.metrics import step_problems
from dphrl.tracking.tracker import Tracker, read_metrics
from dphrl.types import Completion, Prompt

pytestmark = pytest.mark.integration

# What must agree between the modes on the same completions; times and gaps are each mode's own.
SAME = ("reward/mean", "policy/loss", "policy/entropy", "divergence/loss", "learner/grad_norm", "rollout/num_tokens")

Tape = dict[Any, list[list[Completion]]]


class Recording:
    """A rollout pool that remembers what it handed out for each request, in the order of like requests."""

    def __init__(self, pool: Any, tape: Tape) -> None:
        self.pool, self.tape = pool, tape

    async def refit(self, learner: Any) -> Any:
        return await self.pool.refit(learner)

    def drain_metrics(self) -> Any:
        return self.pool.drain_metrics()

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncIterator[Sequence[Completion]]:
        heard: list[Completion] = []
        self.tape.setdefault((seed, greedy, num_samples, *(p.prompt_id for p in prompts)), []).append(heard)
        async for completions in self.pool.generate(prompts, num_samples, seed=seed, greedy=greedy, priority=priority):
            heard.extend(completions)
            yield completions


class Replaying(Recording):
    """The same completions again; a request that was never recorded is a KeyError."""

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncIterator[Sequence[Completion]]:
        yield self.tape[(seed, greedy, num_samples, *(p.prompt_id for p in prompts))].pop(0)


class WrappedSystem:
    """A system whose rollout pool is wrapped, and whose reference buffer is known beforehand."""

    def __init__(self, system: Any, wrap: Any) -> None:
        self.system, self.wrap = system, wrap

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    async def start(self, on_ready: Any) -> Parts:
        parts = await self.system.start(on_ready)
        return Parts(parts.learner, self.wrap(parts.rollouts), parts.rewards)


def run_mode(config: Any, folder: Path, wrap: Any, *, inline: bool) -> list[dict[str, Any]]:
    import asyncio

    console = Console()
    prepared = prepare(config, console)
    with Tracker(folder, tensorboard=False) as tracker, open_system(config, prepared, inline=inline) as system:
        wrapped: Any = WrappedSystem(system, wrap)
        asyncio.run(training_run(config, prepared, wrapped, tracker, console, resume=False))
    return read_metrics(folder)


@pytest.fixture(scope="module")
def ray_run(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three steps on Ray, recorded; it starts its own Ray, as a user's run does."""
    folder = tmp_path_factory.mktemp("ray") / "run"
    tape: Tape = {}
    config = make_config(
        algorithm={"num_minibatches": 1},
        # Some group has a signal at the first step, whatever this machine's model samples: prompts enough, and not
        # only those of which no answer was right.
        rollout={"num_prompts": 8, "num_samples": 4},
        reference={"threshold": 2},
        learner={"num_steps": 3},
        checkpoint={"every_steps": 2},
        tracking={"replay_steps": 2},
        cluster={"num_cpus": 2},
    )
    metrics = run_mode(config, folder, lambda pool: Recording(pool, tape), inline=False)
    return config, folder, tape, metrics


def test_ray_run_leaves_what_the_contract_says(ray_run: Any) -> None:
    config, folder, _, metrics = ray_run
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert [problem for record in metrics for problem in step_problems(record)] == []
    assert all(record["sync/logprob_gap_max"] <= 1e-3 for record in metrics)
    assert all(record["rollout/staleness_max"] == 0 for record in metrics)
    manifest = json.loads((folder / "reference" / "manifest.json").read_text())
    assert manifest["split"]["num_prompts"] == config.data.train.limit
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_2", "step_3"]
    samples = [json.loads(line) for line in (folder / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "score", "status", "policy_version"} <= samples[0].keys()
    evaluation = json.loads((folder / "eval" / "step_3.json").read_text())[0]
    assert {"dataset", "split", "pass@1", "pass@4", "greedy", "retention", "per_prompt"} <= evaluation.keys()


def test_a_step_of_the_ranks_repeats_to_the_bit(ray_run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from cluster.replay import replay_step

    config, folder, _, _ = ray_run
    dump_config(config, folder / "config.yaml")
    assert stored_steps(folder) == [2, 3]
    assert replay_step(folder, 3), capfd.readouterr().out
    printed = capfd.readouterr().out
    assert f"replay of step 3: 1 step(s) from {folder}/checkpoints/step_2" in printed
    assert "identical: 1 step(s)" in printed
    with pytest.raises(InputError, match="step 2 cannot be replayed, as it has a gap"):
        replay_step(folder, 2)


def test_losses_that_are_no_numbers_are_told_and_stop_the_run(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dphrl.learner import update

    healthy = update.hybrid_loss

    def spoiled(*given: Any, **named: Any) -> Any:
        loss, metrics = healthy(*given, **named)
        return loss + math.inf, metrics | {"policy/loss": loss.detach() + math.inf}

    monkeypatch.setattr(update, "hybrid_loss", spoiled)
    settings = {"num_steps": 4, "max_skipped_steps": 2}
    config = inline_config(make_config, tmp_path, learner=settings, checkpoint={"every_steps": 1})
    with pytest.raises(RuntimeError, match=r"step 2: the loss was not finite, as in 2 steps in a row .* --resume"):
        run_training(config, inline=True)
    folder = tmp_path / "inline"
    skipped = config.algorithm.num_minibatches
    events = [event for event in read_events(folder) if event["event"] == "skipped_step"]
    assert [(event["step"], event["facts"]["skipped"]) for event in events] == [(1, skipped), (2, skipped)]
    records = read_metrics(folder)
    assert [r["learner/skipped_steps"] for r in records] == [skipped] * 2
    assert [r["events/skipped_step"] for r in records] == [1, 1]
    assert all(r["divergence/loss"] == pytest.approx(0, abs=1e-6) for r in records), "the policy is the initial one"


def test_exported_model_loads_in_transformers(ray_run: Any, tokenizer: Any, prompts: list[Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, _, _ = ray_run
    exported = folder / "checkpoints" / "step_3" / "hf"
    model = AutoModelForCausalLM.from_pretrained(exported)
    output = model.generate(torch.tensor([prompts[0].token_ids]), do_sample=False, max_new_tokens=24)
    assert output.shape[1] > len(prompts[0].token_ids)
    assert AutoTokenizer.from_pretrained(exported).chat_template == tokenizer.chat_template


def test_inline_agrees_with_ray_on_the_same_completions(
    ray_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, tape, on_ray = ray_run
    # The buffer is taken over, which proves that both modes see the same fingerprint. A request that inline makes
    # for other prompts, in another order or by another seed is not on the tape.
    shutil.copytree(folder / "reference", tmp_path / "inline" / "reference")
    inline = run_mode(config, tmp_path / "inline", lambda pool: Replaying(pool, tape), inline=True)
    for ours, theirs in zip(inline, on_ray, strict=True):
        for name in SAME:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (name, ours["step"])
        statuses = [name for name in theirs if name.startswith("reward/status/")]
        assert statuses
        assert [ours[name] for name in statuses] == [theirs[name] for name in statuses]
    assert "reference buffer reused" in capsys.readouterr().out


def test_reference_logprobs_are_the_learners_own(ray_run: Any, tiny_dir: str, tokenizer: Any) -> None:
    import asyncio

    from dphrl.inline import InlineLearner

    config, folder, _, metrics = ray_run
    assert metrics[0]["divergence/num_rows"] > 0
    assert abs(metrics[0]["divergence/loss"]) < 1e-6 < metrics[1]["divergence/loss"]
    samples = ReferenceBuffer.load(folder / "reference").samples
    learner = InlineLearner(config, tiny_dir)
    sequences = [((*s.prompt_token_ids, *s.token_ids), len(s.prompt_token_ids)) for s in samples]
    for sample, logprobs in zip(samples, asyncio.run(learner.score(sequences)), strict=True):
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-5)


def inline_config(make_config: Any, tmp_path: Path, **changes: Any) -> Any:
    one_update = {"algorithm": {"num_minibatches": 1}, "run_dir": str(tmp_path), "run_name": "inline"}
    return make_config(**{**one_update, **changes})


@pytest.mark.parametrize("tokens", ["all", "entropy"])
def test_divergence_is_zero_before_the_first_update(make_config: Any, tmp_path: Path, tokens: str) -> None:
    algorithm = {"num_minibatches": 1, "rehearsal_tokens": tokens}
    run_training(inline_config(make_config, tmp_path, algorithm=algorithm), inline=True)
    assert ReferenceBuffer.load(tmp_path / "inline" / "reference").has_entropies == (tokens == "entropy")
    first, second = read_metrics(tmp_path / "inline")
    assert first["divergence/num_rows"] > 0
    assert abs(first["divergence/loss"]) < 1e-6 < second["divergence/loss"]


def test_a_run_is_never_mixed_with_another(make_config: Any, tmp_path: Path) -> None:
    config = inline_config(make_config, tmp_path, learner={"num_steps": 1})
    run_training(config, inline=True)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume"):
        run_training(config, inline=True)
    run_training(config, inline=True, overwrite=True)
    assert len(read_metrics(tmp_path / "inline")) == 1


def test_empty_d_pef_and_plain_rlvr_train_with_a_zero_divergence(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing_solved = {"reference": {"num_samples": 2, "threshold": 2}, "rollout": {"max_tokens": 3}}
    run_training(inline_config(make_config, tmp_path / "empty", **nothing_solved), inline=True)
    assert "no prompt is near-perfect" in capsys.readouterr().out
    assert [record["divergence/loss"] for record in read_metrics(tmp_path / "empty" / "inline")] == [0.0, 0.0]
    plain = {"algorithm": {"divergence": "none", "num_minibatches": 1}}
    run_training(inline_config(make_config, tmp_path / "plain", **plain), inline=True)
    assert not (tmp_path / "plain" / "inline" / "reference").exists()
    assert [record["divergence/loss"] for record in read_metrics(tmp_path / "plain" / "inline")] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("estimator", "has_reference_stage"),
    [
        ({"divergence": "reverse_kl", "estimator": "rollout", "kl_estimator": "k3"}, False),
        ({"divergence": "js", "estimator": "definition"}, True),
    ],
)
def test_baselines_with_a_resident_reference_model(
    make_config: Any, tmp_path: Path, estimator: dict[str, Any], has_reference_stage: bool
) -> None:
    config = inline_config(make_config, tmp_path, algorithm={**estimator, "num_minibatches": 1})
    run_training(config, inline=True)
    first, second = read_metrics(tmp_path / "inline")
    assert abs(first["divergence/loss"]) < 1e-6
    assert second["divergence/loss"] != 0
    assert (tmp_path / "inline" / "reference").exists() == has_reference_stage


@pytest.mark.long
def test_a_users_own_divergence_is_found_in_every_actor(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "from dphrl.algo.divergences import get_divergence, register_divergence\n\n\n"
    module += "@register_divergence('mine')\ndef mine():\n    return get_divergence('squared_hellinger')\n"
    (tmp_path / "users_module.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    changes = {"plugins": ["users_module"], "divergence": "mine", "num_minibatches": 1}
    config = inline_config(make_config, tmp_path, algorithm=changes, cluster={"num_cpus": 2})
    run_training(config)
    assert read_metrics(tmp_path / "inline")[1]["divergence/loss"] > 0


def test_overlapped_rollouts_stay_within_their_staleness(make_config: Any, tmp_path: Path) -> None:
    config = inline_config(make_config, tmp_path, rollout={"max_staleness": 1}, learner={"num_steps": 3})
    run_training(config, inline=True)
    assert all(0 <= record["rollout/staleness_max"] <= 1 for record in read_metrics(tmp_path / "inline"))
