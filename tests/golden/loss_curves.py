"""Loss curves of every kind of objective: 20 steps of the real loop in float32 on completions written beforehand.

Completions come from a fixed pool instead of the policy: sampled ones would be others as soon as one rounding
differs, and the rest of the curve with them. Everything else is real: reference stage, grader, batches, update.

    python -m tests.golden.loss_curves        # writes tests/golden/curves/ anew

Renew the curves only with a change that is meant to change numbers; look at the difference, and say in the change's
message which numbers and why.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dphrl.config.schema import Config
from dphrl.data.chat import build_prompts
from dphrl.data.loading import load_problems
from dphrl.inline import InlineLearner, InlineRewards
from dphrl.loop import train
from dphrl.protocols import Parts
from dphrl.reference.stage import fill_reference
from dphrl.tiny import ensure_tiny_model
from dphrl.tokenizer import load_tokenizer
from dphrl.types import Completion, Prompt, RolloutGroup

FOLDER = Path(__file__).resolve().parent / "curves"
NUM_STEPS = 20
NUM_DIGITS = 7  # significant ones that are written
METRICS = (
    "policy/loss",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/importance_mean",
    "divergence/loss",
    "divergence/log_u_mean",
    "learner/grad_norm",
    "reward/mean",
)
ARMS: dict[str, dict[str, Any]] = {
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js"},
    "alpha": {"divergence": {"name": "alpha", "alpha": 0.5}},
    "reverse_kl_k3": {"divergence": "reverse_kl", "estimator": "rollout", "kl_estimator": "k3"},
    "js_definition": {"divergence": "js", "estimator": "definition"},
    "grpo": {"divergence": "none", "aggregation": "sequence_mean", "clip_high": 0.2},
    "dapo": {"divergence": "none", "overlong_buffer_tokens": 12, "dynamic_sampling_rounds": 3},
    "gspo": {
        "divergence": "none",
        "ratio": "sequence",
        "aggregation": "sequence_mean",
        "clip_low": 0.0035,
        "clip_high": 0.0045,
    },
    "rloo": {"divergence": "none", "advantage": "leave_one_out", "entropy_bonus": 0.01},
}


def make_config(model_dir: str, algorithm: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "seed": 1,
            "model": {"path": model_dir, "dtype": "float32"},
            "data": {"train": {"name": "factor", "kind": "tiny", "limit": 12}, "max_prompt_tokens": 16},
            "reward": {"name": "factorization"},
            "algorithm": {"eta": 0.5, "num_minibatches": 2, **algorithm},
            "rollout": {"num_prompts": 4, "num_samples": 4, "max_tokens": 24},
            "reference": {"num_samples": 6, "threshold": 4, "stored_per_prompt": 2, "rows_per_step": 4},
            "learner": {
                "num_steps": NUM_STEPS,
                "lr": 3e-4,
                "lr_schedule": "linear",
                "warmup_steps": 3,
                "micro_batch_tokens": 256,
                "grad_clip": 0.5,
            },
            "evaluation": {"num_samples": 0},
        }
    )


def work_out(number: int, divisor: int, rng: random.Random) -> str:
    """A division as the task wants it, with a slip in one of three."""
    digits, remainder, quotient, remainders = f"{number:05d}", 0, 0, []
    slip = rng.randrange(15)
    for place, digit in enumerate(digits):
        value = remainder * 10 + int(digit)
        quotient, remainder = quotient * 10 + value // divisor, value % divisor
        if place == slip:
            remainder = (remainder + 1) % divisor
        remainders.append(remainder)
    return f"{divisor} : {' '.join(map(str, remainders))} \\boxed{{ {divisor} * {' '.join(f'{quotient:05d}'[-5:])} }}"


class WrittenRollouts:
    """Draws a prompt's completions by the seed from what is written for it; the engine is a little off the learner."""

    def __init__(self, learner: InlineLearner, tokenizer: Any) -> None:
        self.learner, self.tokenizer, self.version = learner, tokenizer, 0

    async def refit(self, learner: Any) -> dict[str, float]:
        self.version = learner.policy_version
        return {}

    def drain_metrics(self) -> dict[str, float]:
        return {}

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncIterator[Sequence[Completion]]:
        jobs = []
        for prompt in prompts:
            rng = random.Random(f"{seed}:{prompt.prompt_id}")
            number = int(prompt.answer.rpartition(":")[2])
            for i in range(num_samples):
                # Often one that divides, so that there is something to be right about.
                divisor = rng.choice([d for d in (3, 7, 11) if number % d == 0] + [3, 7, 11])
                # Of several lengths: some say a little more than they need to.
                text = work_out(number, divisor, rng) + " ?" * rng.choice((0, 0, 2, 6))
                ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)
                jobs.append((prompt, i, ids, text, rng))
        scores = await self.learner.score([((*p.token_ids, *ids), len(p.token_ids)) for p, _, ids, _, _ in jobs])
        yield [
            Completion(
                prompt.prompt_id,
                i,
                ids,
                text,
                tuple(min(-1e-6, x + rng.gauss(0, 0.2)) for x in logprobs),
                "stop",
                self.version,
            )
            for (prompt, i, ids, text, rng), logprobs in zip(jobs, scores, strict=True)
        ]


class Recorder:
    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {}

    async def after_step(
        self, step: int, metrics: Mapping[str, float], groups: Sequence[RolloutGroup], batch: object
    ) -> None:
        for name in METRICS:
            if name in metrics:
                self.curves.setdefault(name, []).append(float(f"{metrics[name]:.{NUM_DIGITS}g}"))


async def run_arm(arm: str, folder: Path) -> dict[str, list[float]]:
    model_dir = str(ensure_tiny_model())
    config, tokenizer = make_config(model_dir, ARMS[arm]), load_tokenizer(model_dir)
    prompts = build_prompts(load_problems(config.data.train, config.seed), tokenizer, config.data)[0]
    learner = InlineLearner(config, model_dir)
    parts = Parts(learner, WrittenRollouts(learner, tokenizer), InlineRewards(config))
    reference = None
    if config.uses_reference_samples:
        reference = await fill_reference(config, prompts, parts.rollouts, parts.rewards, learner, {}, folder)
        assert reference.near_perfect, "an arm that rehearses needs something to rehearse"
        assert len(reference.exploration) >= config.rollout.num_prompts
    recorder = Recorder()
    await train(config, prompts, parts, reference, recorder)
    return recorder.curves


def curves_of(arm: str) -> dict[str, list[float]]:
    """The arm's curves on one thread, whose sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return asyncio.run(run_arm(arm, Path(folder) / "reference"))
    finally:
        torch.set_num_threads(threads)


def stored(arm: str) -> dict[str, list[float]]:
    return json.loads((FOLDER / f"{arm}.json").read_text())


def write(arm: str, curves: Mapping[str, Sequence[float]]) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(list(values))}" for name, values in curves.items()]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{arm}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    for arm in sys.argv[1:] or ARMS:
        write(arm, curves_of(arm))
        print(f"{FOLDER / arm}.json written")


if __name__ == "__main__":
    main()
