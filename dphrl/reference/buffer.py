"""The reference buffer: what the initial policy already solves, sampled once and rehearsed at every step.

On disk: `manifest.json` (the fingerprint and the split's counts), `counts.parquet` (every prompt's number of
correct responses and its part) and `samples.parquet` (the stored responses with the learner's log-probs).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import InputError
from dphrl.config.reference import ReferenceConfig
from dphrl.data.schedule import derive_seed, step_indices
from dphrl.fingerprint import Fingerprint
from dphrl.reference.split import Split
from dphrl.types import ReferenceSample


@dataclass(frozen=True)
class ReferenceBuffer:
    """A filled buffer. It implements `protocols.WholeReference`; it is immutable, so it may be shared and reused.

    num_correct, num_graded: responses per prompt_id. seed: the run's seed.
    """

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
        """The seed of the order in which steps see the samples."""
        return derive_seed(self.seed, "rehearsal")

    @property
    def num_bytes(self) -> int:
        """Size of the samples as arrays; see `sample_bytes`."""
        return sum(sample_bytes(len(s.prompt_token_ids), len(s.token_ids)) for s in self.samples)

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
            "num_bytes": self.num_bytes,
            "mean_correct": sum(self.num_correct.values()) / graded if graded else 0.0,
        }

    def save(self, folder: Path) -> None:
        """Write all files, then put the folder in place with one rename: a reader sees all of it or nothing."""
        staging, retired = (folder.with_name(folder.name + suffix) for suffix in (".new", ".old"))
        for leftover in (staging, retired):
            shutil.rmtree(leftover, ignore_errors=True)
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
        # The old folder moves aside in one rename: a kill during its deletion could leave a manifest without samples.
        if folder.exists():
            os.replace(folder, retired)
        os.replace(staging, folder)
        shutil.rmtree(retired, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> ReferenceBuffer:
        """The buffer that `save` wrote. Raises OSError or ValueError when it is missing or not whole."""
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


def sample_bytes(num_prompt_tokens: int, num_tokens: int) -> int:
    """Bytes of one stored sample as arrays: 4 for each prompt token id, completion token id and log-prob."""
    return 4 * (num_prompt_tokens + 2 * num_tokens)


def check_size(num_bytes: int, reference: ReferenceConfig) -> None:
    """Raises InputError when num_bytes, the size of the samples to store, exceeds reference.max_bytes."""
    if num_bytes > reference.max_bytes:
        raise InputError(
            f"reference.max_bytes={reference.max_bytes}: the samples to rehearse take {num_bytes} bytes; lower "
            f"reference.stored_per_prompt={reference.stored_per_prompt}, or raise the bound (neither samples anew)"
        )


def _to_row(sample: ReferenceSample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in _SCHEMA.names}


def _from_row(row: dict[str, Any]) -> ReferenceSample:
    return ReferenceSample(
        row["prompt_id"], tuple(row["prompt_token_ids"]), tuple(row["token_ids"]), tuple(row["logprobs"])
    )
