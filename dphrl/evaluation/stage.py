"""Evaluation: sample and grade every data set, and sum up. A killed evaluation continues where it stopped.

The graded completions of every chunk of prompts are written to one parquet file in `<result>.partial/<data set>/` as
soon as the chunk is graded. The folder is deleted when the result is in place.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dphrl.chunks import ChunkFolder
from dphrl.collect import collect_chunks, collect_groups, one_failure
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed
from dphrl.evaluation.differences import compare, self_retention
from dphrl.evaluation.estimators import count_groups, describe_samples, summarize
from dphrl.evaluation.results import Summary
from dphrl.evaluation.strategies import count_strategies
from dphrl.fingerprint import SAMPLED_AND_GRADED, Fingerprint, fingerprint
from dphrl.fingerprint.files import hash_value
from dphrl.prepare import EvaluationSet
from dphrl.protocols import OnGraded, Parts
from dphrl.rewards.watch import RewardWatch
from dphrl.tracking.console import Console
from dphrl.tracking.tracker import write_samples
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup

# A kill loses what engines are at, in whole chunks.
PROMPTS_PER_CHUNK = 256

# Texts are stored as bytes: those of a reward may hold lone surrogates, which UTF-8 cannot encode. Floats are stored in
# full precision, so that sums of stored values equal sums of the original ones to the last digit.
_COMPLETIONS = pa.list_(
    pa.struct(
        [
            ("sample_index", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("text", pa.binary()),
            ("logprobs", pa.list_(pa.float64())),
            ("finish_reason", pa.binary()),
            ("policy_version", pa.int64()),
            ("status", pa.binary()),
            ("detail", pa.binary()),
            ("solution", pa.binary()),
            ("signal", pa.float64()),
            ("answer", pa.binary()),
        ]
    )
)
CHUNK_SCHEMA = pa.schema([("sampled", _COMPLETIONS), ("greedy", _COMPLETIONS)])


@dataclass(frozen=True)
class PartialResult:
    """Where chunks are kept until the result is in place, and what decides their content besides the settings.

    model_dir: directory of the weights that are evaluated or that the run started from. policy: which policy of the run
    is evaluated.
    """

    folder: Path
    model_dir: str
    policy: str = "initial"

    @classmethod
    def beside(cls, result: Path, model_dir: str, policy: str = "initial") -> PartialResult:
        """The chunks of the evaluation whose result will be written to the file `result`."""
        return cls(result.with_name(result.name + ".partial"), model_dir, policy)

    def identity(self, config: Config, prompts: Sequence[Prompt], dtype: str) -> Fingerprint:
        """One entry for each thing that decides what is sampled on `prompts` and how it is graded."""
        parts = fingerprint(config, self.model_dir, prompts, dtype)
        rollout = config.rollout
        sampling = [config.evaluation.num_samples, rollout.temperature, rollout.max_tokens, config.seed]
        shared = {name: parts[name] for name in SAMPLED_AND_GRADED}
        return {**shared, "policy": self.policy, "dtype": dtype, "sampling": hash_value(sampling)}

    def remove(self) -> None:
        """Delete the chunks, because the result is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Evaluation:
    """What to measure of a policy, and what to keep.

    label: the policy's name on the console. base: the base model's summaries, which retention is measured against.
    partial: where chunks of a killed evaluation may lie and where this one keeps its chunks; the code that writes the
    result removes it afterwards. samples_folder: where the graded samples go, one .jsonl file per data set; greedy
    completions are not written.
    """

    config: Config
    sets: Sequence[EvaluationSet]
    label: str
    base: Sequence[Summary] = ()
    partial: PartialResult | None = None
    samples_folder: Path | None = None


async def evaluate_sets(evaluation: Evaluation, parts: Parts, console: Console) -> list[Summary]:
    """Pass@k of the engines' present policy on every data set, and what differs from the base prompt by prompt.

    Each prompt gets evaluation.num_samples completions at training temperature and a greedy one. Raises
    RewardFailedError when the reward fails on the first prompts of a set, so many that it fails everywhere.
    """
    summaries = []
    known = {summary["dataset"]: summary for summary in evaluation.base}
    for chosen in evaluation.sets:
        sampled, greedy = await _grade_set(evaluation, chosen, parts, console)
        if evaluation.samples_folder is not None:
            write_samples(evaluation.samples_folder / f"{chosen.name}.jsonl", sampled)
        base = known[chosen.name]["per_prompt"] if chosen.name in known else None
        base_counts = base and [(row["prompt_id"], row["num_samples"], row["num_correct"]) for row in base]
        counts, ks = count_groups(sampled), evaluation.config.evaluation.k
        solved = [num_correct if num_graded else None for _, num_graded, num_correct in count_groups(greedy)]
        graded = [num_correct for num_correct in solved if num_correct is not None]
        share = sum(graded) / len(graded) if graded else None
        summary = summarize(chosen.name, chosen.split, counts, ks, share, base_counts)
        for row, num_correct in zip(summary["per_prompt"], solved, strict=True):
            row["greedy"] = num_correct
        if (strategies := count_strategies(sampled, evaluation.config.reward.name)) is not None:
            for row, of_prompt in zip(summary["per_prompt"], strategies, strict=True):
                row |= of_prompt
        # From counts alone, a set on which every grading failed would look like one without samples.
        summary["num_ungraded"] = sum(len(group.results) for group in sampled) - sum(n for _, n, _ in counts)
        summary["self_retention"] = self_retention(summary["per_prompt"])
        if base is not None:
            summary["difference"] = compare(base, summary["per_prompt"], ks)
        summaries.append(summary | describe_samples(sampled, ks))
    return summaries


async def _grade_set(
    evaluation: Evaluation, chosen: EvaluationSet, parts: Parts, console: Console
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """Groups of num_samples completions, and groups of one greedy completion, both in the order of the prompts."""
    config, partial, what = evaluation.config, evaluation.partial, f"{evaluation.label} on {chosen.name}"
    prompts, size = chosen.prompts, PROMPTS_PER_CHUNK
    stored, done = None, frozenset[int]()
    if partial is not None:
        identity = partial.identity(config, prompts, parts.learner.dtype)
        stored = ChunkFolder(partial.folder / chosen.name, prompts, identity, size, CHUNK_SCHEMA)
        done = _claim(stored, len(prompts), what, console)
    watch = RewardWatch(config.reward.name)
    starts = range(0, len(prompts), size)
    chunks: dict[int, tuple[list[RolloutGroup], list[RolloutGroup]]] = {}
    for start in done:
        assert stored is not None
        chunks[start] = groups = from_rows(prompts[start : start + size], stored.read_rows(start))
        watch.works |= any(result.score is not None for group in groups[0] for result in group.results)
    num_done = sum(len(sampled) for sampled, _ in chunks.values())
    left = (len(prompts) - num_done) * (config.evaluation.num_samples + 1)
    with console.task(f"evaluating {what}", left) as advance:

        async def grade(start: int) -> None:
            chunks[start] = await _grade_chunk(config, prompts[start : start + size], parts, watch, advance)
            if stored is not None:
                stored.write_rows(start, to_rows(*chunks[start]))

        await collect_chunks([functools.partial(grade, start) for start in starts if start not in done])
    in_order = [chunks[start] for start in starts]
    return [group for sampled, _ in in_order for group in sampled], [best for _, greedy in in_order for best in greedy]


def _claim(stored: ChunkFolder, num_prompts: int, what: str, console: Console) -> frozenset[int]:
    """Take over the chunks of a killed evaluation, and say so; returns where they begin."""
    if changed := stored.changed():
        console.info(
            f"unfinished evaluation in {stored.folder} is not continued, starting over: {', '.join(changed)} changed"
        )
    for damage in stored.damaged():
        console.info(f"unfinished evaluation in {stored.folder}: {damage}; these prompts are evaluated again")
    if done := stored.claim():
        console.info(f"evaluating {what}: continuing, {stored.num_prompts(done)} of {num_prompts} prompts done")
    return done


async def _grade_chunk(
    config: Config,
    chunk: Sequence[Prompt],
    parts: Parts,
    watch: RewardWatch,
    advance: OnGraded,
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    # One seed for all chunks: engines make of it one for each completion, by prompt, so a continued evaluation samples
    # what an unbroken one would.
    seed = derive_seed(config.seed, "evaluation")
    rollouts, rewards = parts.rollouts, parts.rewards

    async def collect(num_samples: int, *, greedy: bool) -> list[RolloutGroup]:
        collected = await collect_groups(
            rollouts, rewards, chunk, num_samples, seed=seed, greedy=greedy, on_graded=advance, watch=watch
        )
        return collected.groups

    # The greedy completions are few and go with the others.
    with one_failure():
        async with asyncio.TaskGroup() as collecting:
            sampled = collecting.create_task(collect(config.evaluation.num_samples, greedy=False))
            greedy = collecting.create_task(collect(1, greedy=True))
    return sampled.result(), greedy.result()


# ------------------------------------------------------------------------------------- groups as rows


def to_rows(sampled: Sequence[RolloutGroup], greedy: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """One row of CHUNK_SCHEMA for each prompt; both arguments have the groups of the same prompts in the same order."""
    return [
        {"sampled": _completions_to_rows(group), "greedy": _completions_to_rows(best)}
        for group, best in zip(sampled, greedy, strict=True)
    ]


def _completions_to_rows(group: RolloutGroup) -> list[dict[str, Any]]:
    fields = [asdict(c) | asdict(r) for c, r in zip(group.completions, group.results, strict=True)]
    return [
        {k: v.encode("utf-8", "surrogatepass") if isinstance(v, str) else v for k, v in row.items() if k != "prompt_id"}
        for row in fields
    ]


def from_rows(
    prompts: Sequence[Prompt], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
    """The groups that `to_rows` was given. The identity of the chunks ensures that `prompts` are those of the rows."""
    sampled = [_to_group(prompt, row["sampled"]) for prompt, row in zip(prompts, rows, strict=True)]
    return sampled, [_to_group(prompt, row["greedy"]) for prompt, row in zip(prompts, rows, strict=True)]


def _to_group(prompt: Prompt, rows: Sequence[Mapping[str, Any]]) -> RolloutGroup:
    completions, results = [], []
    for stored in rows:
        row: dict[str, Any] = {
            k: v.decode("utf-8", "surrogatepass") if isinstance(v, bytes) else v for k, v in stored.items()
        }
        completions.append(
            Completion(
                prompt.prompt_id,
                row["sample_index"],
                tuple(row["token_ids"]),
                row["text"],
                tuple(row["logprobs"]),
                row["finish_reason"],
                row["policy_version"],
            )
        )
        status = RewardStatus(row["status"])
        results.append(RewardResult(status, row["detail"], row["solution"], row["signal"], row["answer"]))
    return RolloutGroup(prompt, tuple(completions), tuple(results))
