"""The reference buffer: what the initial policy already solves, sampled once and rehearsed at every step.

On disk: `manifest.json` (the fingerprint, the split's rule and counts, the reward's first failures), `counts.parquet`
(of every prompt how many responses have a verdict, are correct, are complete too, and its part) and `samples.parquet`
(the stored responses with the learner's log-probs, and with entropies where they were asked for). `checksums.json` has
the size and checksum of each.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.config.loading import InputError
from dphrl.config.reference import ReferenceConfig
from dphrl.data.schedule import derive_seed, step_indices
from dphrl.durable import SEAL, damage, put_in_place, seal
from dphrl.fingerprint import Fingerprint
from dphrl.reference.split import PromptCounts, Split
from dphrl.types import ReferenceSample

# Of what the split and the choice of the stored responses are a function, besides the responses.
_RULE = {"num_samples", "threshold", "confirm", "all_wrong", "stored_per_prompt"}


@dataclass(frozen=True)
class ReferenceBuffer:
    """A filled buffer. It implements `protocols.WholeReference`; it is immutable, so it may be shared and reused.

    verdicts: counts by prompt_id. seed: the run's seed. failures: the first failures of the reward, described in full,
    in the process that filled the buffer.
    """

    split: Split
    verdicts: Mapping[str, PromptCounts]
    samples: Sequence[ReferenceSample]
    fingerprint: Fingerprint
    seed: int
    failures: Sequence[str] = field(default=(), compare=False)

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
        return sum(
            sample_bytes(len(s.prompt_token_ids), len(s.token_ids), with_entropies=bool(s.entropies))
            for s in self.samples
        )

    @property
    def has_entropies(self) -> bool:
        return any(sample.entropies for sample in self.samples)

    async def sample(self, step: int, num_rows: int) -> list[ReferenceSample]:
        indices = step_indices(len(self.samples), step, num_rows, self.schedule_seed)
        return [self.samples[i] for i in indices]

    def counts(self) -> dict[str, float]:
        """The split in numbers, for the manifest and the console."""
        verdicts = self.verdicts.values()
        num_graded = sum(of_prompt.num_graded for of_prompt in verdicts)
        num_correct = sum(of_prompt.num_correct for of_prompt in verdicts)
        return {
            "num_prompts": len(self.verdicts),
            "num_near_perfect": len(self.split.near_perfect),
            "num_exploration": len(self.split.exploration),
            "num_dropped": len(self.split.dropped),
            "num_truncated": len(self.split.truncated),
            "num_nothing_storable": sum(not self.verdicts[i].num_complete for i in self.split.truncated),
            "num_unconfirmed": len(self.split.unconfirmed),
            "num_without_verdict": sum(not of_prompt.num_graded for of_prompt in verdicts),
            "num_graded": num_graded,
            "num_stored_samples": len(self.samples),
            "num_stored_tokens": sum(len(sample.token_ids) for sample in self.samples),
            "num_bytes": self.num_bytes,
            "mean_correct": num_correct / num_graded if num_graded else 0.0,
        }

    def save(self, folder: Path, reference: ReferenceConfig) -> None:
        """Write all files, then put the folder in place with one rename: a reader sees all of it or nothing.

        reference: the settings that the split followed.
        """
        staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, table in (("counts", self._counts_table()), ("samples", self._samples_table())):
            pq.write_table(table, staging / f"{name}.parquet", write_page_checksum=True)
        manifest = {
            "fingerprint": dict(self.fingerprint),
            "seed": self.seed,
            "rule": reference.model_dump(include=_RULE),
            "split": self.counts(),
            "failures": list(self.failures),
            "entropies": self.has_entropies,
            "sealed": True,
        }
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        seal(staging)
        put_in_place(staging, folder)

    def _counts_table(self) -> pa.Table:
        split = self.split
        part = dict.fromkeys(split.near_perfect, "near_perfect") | dict.fromkeys(split.dropped, "dropped")
        reason = dict.fromkeys(split.truncated, "truncated") | dict.fromkeys(split.unconfirmed, "unconfirmed")
        rows = [
            {"prompt_id": i, **asdict(counts), "part": part.get(i, "exploration"), "reason": reason.get(i, "")}
            for i, counts in self.verdicts.items()
        ]
        return pa.Table.from_pylist(rows, _COUNTS_SCHEMA)

    def _samples_table(self) -> pa.Table:
        schema = _schema(with_entropies=self.has_entropies)
        rows = [{name: getattr(sample, name) for name in schema.names} for sample in self.samples]
        return pa.Table.from_pylist(rows, schema)

    @classmethod
    def load(cls, folder: Path) -> ReferenceBuffer:
        """The buffer that `save` wrote. Raises DamagedBufferError, which names the file, when one is missing or not as
        it was written."""
        manifest = check_whole(folder)
        with _explained(folder / _MANIFEST):
            counts, seed, failures = manifest["split"], int(manifest["seed"]), list(manifest["failures"])
            num_prompts, num_samples = counts["num_prompts"], counts["num_stored_samples"]
            schema = _schema(with_entropies=bool(manifest.get("entropies", False)))  # older versions stored none
        rows = _read_table(folder / "counts.parquet", _COUNTS_SCHEMA, num_prompts)
        samples = _read_table(folder / "samples.parquet", schema, num_samples)

        def those(column: str, value: str) -> tuple[str, ...]:
            return tuple(row["prompt_id"] for row in rows if row[column] == value)

        return cls(
            split=Split(
                *(those("part", part) for part in ("near_perfect", "exploration", "dropped")),
                *(those("reason", reason) for reason in ("truncated", "unconfirmed")),
            ),
            verdicts={
                row["prompt_id"]: PromptCounts(row["num_graded"], row["num_correct"], row["num_complete"])
                for row in rows
            },
            samples=[
                ReferenceSample(row["prompt_id"], *(tuple(row[name]) for name in schema.names[1:])) for row in samples
            ],
            fingerprint=manifest["fingerprint"],
            seed=seed,
            failures=failures,
        )


class DamagedBufferError(InputError):
    """A file of a stored buffer is not what was written. It names the file, and what is wrong."""


_MANIFEST = "manifest.json"

_COUNTS_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("num_graded", pa.int32()),
        ("num_correct", pa.int32()),
        ("num_complete", pa.int32()),
        ("part", pa.string()),
        ("reason", pa.string()),
    ]
)

_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
    ]
)


def _schema(*, with_entropies: bool) -> pa.Schema:
    return _SCHEMA.append(pa.field("entropies", pa.list_(pa.float32()))) if with_entropies else _SCHEMA


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stored buffer; an older version's may lack all but the fingerprint.

    Raises DamagedBufferError, which names the file, when it cannot be read.
    """
    with _explained(folder / _MANIFEST):
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        dict(manifest["fingerprint"])
        return manifest


def check_whole(folder: Path) -> dict[str, Any]:
    """The manifest. Raises DamagedBufferError when any file of the buffer is not as it was written."""
    manifest = read_manifest(folder)
    # Older versions wrote no checksums; then those of the parquet files' pages are all there is.
    if (manifest.get("sealed") or (folder / SEAL).exists()) and (problem := damage(folder)) is not None:
        raise DamagedBufferError(f"{folder}: the reference buffer is damaged ({problem})")
    return manifest


def _read_table(path: Path, schema: pa.Schema, num_rows: int) -> list[dict[str, Any]]:
    with _explained(path):
        table = pq.read_table(path, page_checksum_verification=True)
        if table.schema != schema or table.num_rows != num_rows:
            raise ValueError(f"{table.num_rows} rows of {', '.join(table.column_names)}; the manifest says {num_rows}")
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise  # it names the file, which need not be damaged
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise DamagedBufferError(f"{path}: the reference buffer is damaged ({reason})") from error


def sample_bytes(num_prompt_tokens: int, num_tokens: int, *, with_entropies: bool = False) -> int:
    """Bytes of one stored sample as arrays: 4 for each prompt token id, completion token id, log-prob and entropy."""
    return 4 * (num_prompt_tokens + (3 if with_entropies else 2) * num_tokens)


def check_size(num_bytes: int, reference: ReferenceConfig) -> None:
    """Raises InputError when num_bytes, the size of the samples to store, exceeds reference.max_bytes."""
    if num_bytes > reference.max_bytes:
        raise InputError(
            f"reference.max_bytes={reference.max_bytes}: the samples to rehearse take {num_bytes} bytes; lower "
            f"reference.stored_per_prompt={reference.stored_per_prompt}, or raise the bound (neither samples anew)"
        )
