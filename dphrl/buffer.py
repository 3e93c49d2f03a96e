"""The reference buffer: what the initial policy already solves, sampled once and rehearsed ever after.

On disk: `manifest.json` (the fingerprint and the split's counts), `counts.parquet` (every prompt's number of
correct responses and its part) and `samples.parquet` (the stored responses with the learner's log-probs).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.algo.partition import Split, split_prompts
from dphrl.collect import collect_groups
from dphrl.config import Config
from dphrl.data.schedule import step_indices
from dphrl.protocols import Learner, RewardPool, RolloutPool
from dphrl.types import Prompt, ReferenceSample, RolloutGroup

Fingerprint = Mapping[str, str]

# Prompts sampled and graded before the next are handed out: bounds memory and paces the progress bar.
PROMPTS_PER_CHUNK = 512
# Salts that keep the reference stage's random choices apart from the training steps'.
_SAMPLING_SALT, _CHOICE_SALT, _SCHEDULE_SALT = 7919, 104729, 1299709


@dataclass(frozen=True)
class ReferenceBuffer:
    """A filled buffer. Implements `protocols.ReferenceStore`; immutable, so it may be shared and reused."""

    split: Split
    num_correct: Mapping[str, int]
    num_graded: Mapping[str, int]
    samples: Sequence[ReferenceSample]
    fingerprint: Fingerprint
    seed: int

    @property
    def near_perfect(self) -> frozenset[str]:
        return frozenset(self.split.near_perfect)

    @property
    def exploration(self) -> frozenset[str]:
        return frozenset(self.split.exploration)

    @property
    def schedule_seed(self) -> int:
        """Seeds the order in which steps see the samples."""
        return self.seed + _SCHEDULE_SALT

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        indices = step_indices(len(self.samples), step, num_rows, self.schedule_seed)
        return [self.samples[i] for i in indices]

    def counts(self) -> dict[str, float]:
        """The split in numbers, for the manifest and the console."""
        graded = sum(self.num_graded.values())
        return {
            "num_prompts": len(self.num_correct),
            "num_near_perfect": len(self.split.near_perfect),
            "num_exploration": len(self.split.exploration),
            "num_dropped": len(self.split.dropped),
            "num_stored_samples": len(self.samples),
            "num_stored_tokens": sum(len(sample.token_ids) for sample in self.samples),
            "mean_correct": sum(self.num_correct.values()) / graded if graded else 0.0,
        }

    def save(self, folder: Path) -> None:
        """Write all files, then put the folder in place in one rename: a reader sees all of it or none."""
        staging = folder.with_name(folder.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        part = dict.fromkeys(self.split.near_perfect, "near_perfect")
        part |= dict.fromkeys(self.split.exploration, "exploration") | dict.fromkeys(self.split.dropped, "dropped")
        ids = list(self.num_correct)
        counts = {
            "prompt_id": ids,
            "num_correct": [self.num_correct[i] for i in ids],
            "num_graded": [self.num_graded[i] for i in ids],
            "part": [part[i] for i in ids],
        }
        pq.write_table(pa.table(counts), staging / "counts.parquet")
        pq.write_table(pa.Table.from_pylist([_to_row(s) for s in self.samples], _SCHEMA), staging / "samples.parquet")
        manifest = {"fingerprint": dict(self.fingerprint), "seed": self.seed, "split": self.counts()}
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)

    @classmethod
    def load(cls, folder: Path) -> ReferenceBuffer:
        """What `save` wrote. Raises OSError or ValueError when it is not there or not whole."""
        manifest = json.loads((folder / "manifest.json").read_text())
        counts = pq.read_table(folder / "counts.parquet").to_pylist()
        samples = pq.read_table(folder / "samples.parquet", schema=_SCHEMA).to_pylist()
        parts: dict[str, list[str]] = {"near_perfect": [], "exploration": [], "dropped": []}
        for row in counts:
            parts[row["part"]].append(row["prompt_id"])
        return cls(
            split=Split(*(tuple(parts[name]) for name in ("near_perfect", "exploration", "dropped"))),
            num_correct={row["prompt_id"]: row["num_correct"] for row in counts},
            num_graded={row["prompt_id"]: row["num_graded"] for row in counts},
            samples=[_from_row(row) for row in samples],
            fingerprint=manifest["fingerprint"],
            seed=manifest["seed"],
        )


_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)


def _to_row(sample: ReferenceSample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in _SCHEMA.names}


def _from_row(row: dict[str, Any]) -> ReferenceSample:
    return ReferenceSample(
        row["prompt_id"], tuple(row["prompt_token_ids"]), tuple(row["token_ids"]), tuple(row["logprobs"])
    )


def fingerprint(config: Config, model_dir: str, prompts: Sequence[Prompt], learner_dtype: str) -> dict[str, str]:
    """One hash per thing that decides a buffer's content, so that a mismatch can say which one changed."""
    reference, rollout = config.reference, config.rollout
    chosen = {name: getattr(reference, name) for name in ("num_samples", "threshold", "stored_per_prompt", "all_wrong")}
    sampling = chosen | {"temperature": rollout.temperature, "max_tokens": rollout.max_tokens, "seed": config.seed}
    return {
        "model weights": _hash_files(model_dir, ("*.safetensors", "*.bin", "config.json")),
        "tokenizer": _hash_files(model_dir, ("tokenizer*", "*.jinja", "vocab*", "merges*")),
        "prompts": _hash([(p.prompt_id, p.token_ids, p.answer) for p in prompts]),
        "sampling": _hash(sampling),
        "reward": _hash(config.reward.model_dump(include={"name", "extraction", "timeout_s"})),
        "learner numerics": _hash([learner_dtype, config.model.attention, config.learner.packing]),
    }


def changed_parts(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Names of what differs between two fingerprints; empty when the stored buffer may be reused."""
    return [name for name in wanted if stored.get(name) != wanted[name]]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _hash_files(model_dir: str, patterns: Sequence[str]) -> str:
    folder = Path(model_dir)
    if not folder.is_dir():  # a hub name: the library's cache resolves it to one revision
        return _hash(model_dir)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


async def fill_reference(
    config: Config,
    prompts: Sequence[Prompt],
    rollouts: RolloutPool,
    rewards: RewardPool,
    learner: Learner,
    identity: Fingerprint,
    on_graded: Callable[[int], None] = lambda num_completions: None,
) -> ReferenceBuffer:
    """The reference stage: sample K responses a prompt, grade, split, store m correct ones per D_pef prompt.

    The engines must hold the initial policy. Log-probs come from the learner's forward pass, not the engine's,
    so that u = 1 at step 0.
    """
    num_correct: dict[str, int] = {}
    num_graded: dict[str, int] = {}
    kept: list[ReferenceSample] = []
    for start in range(0, len(prompts), PROMPTS_PER_CHUNK):
        chunk = prompts[start : start + PROMPTS_PER_CHUNK]
        collected = await collect_groups(
            rollouts,
            rewards,
            chunk,
            config.reference.num_samples,
            seed=config.seed * _SAMPLING_SALT + start,
            on_graded=on_graded,
        )
        for group in collected.groups:
            num_correct[group.prompt.prompt_id] = group.num_correct
            num_graded[group.prompt.prompt_id] = sum(result.score is not None for result in group.results)
            if group.num_correct >= config.reference.threshold:
                kept += _choose_samples(group, config.reference.stored_per_prompt, config.seed)
    scores = await learner.score([((*s.prompt_token_ids, *s.token_ids), len(s.prompt_token_ids)) for s in kept])
    split = split_prompts(num_correct, threshold=config.reference.threshold, all_wrong=config.reference.all_wrong)
    samples = [
        ReferenceSample(s.prompt_id, s.prompt_token_ids, s.token_ids, logprobs)
        for s, logprobs in zip(kept, scores, strict=True)
    ]
    return ReferenceBuffer(split, num_correct, num_graded, samples, identity, config.seed)


def _choose_samples(group: RolloutGroup, count: int, seed: int) -> list[ReferenceSample]:
    """`count` of the correct, complete responses, drawn by a seed of the prompt's own: order plays no part."""
    correct = [
        completion
        for completion, result in zip(group.completions, group.results, strict=True)
        if result.score == 1.0 and not completion.truncated
    ]
    salt = int.from_bytes(hashlib.sha256(group.prompt.prompt_id.encode()).digest()[:8], "big")
    order = np.random.default_rng([seed, _CHOICE_SALT, salt]).permutation(len(correct))
    return [
        ReferenceSample(group.prompt.prompt_id, group.prompt.token_ids, correct[i].token_ids, correct[i].logprobs)
        for i in order[:count]
    ]
