"""The reference stage: sample the initial policy once, grade, split, score. A killed one continues where it was.

Every chunk of prompts leaves one parquet file in `<buffer folder>.partial/` as soon as it is graded, beside
`identity.json`, which says for what model, data and sampling the chunks hold. Only when all chunks are there
does the learner score the chosen responses; then the buffer is put in place and the partial folder removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dphrl.algo.partition import split_prompts
from dphrl.buffer import Fingerprint, ReferenceBuffer, changed_parts, check_size, sample_bytes
from dphrl.collect import collect_groups
from dphrl.config import Config
from dphrl.data.schedule import derive_seed
from dphrl.protocols import Learner, RewardPool, RolloutPool
from dphrl.types import Prompt, ReferenceSample, RolloutGroup

# Tokens handed to the learner in one call: many micro-batches' worth, so that rows of like length find each other,
# yet little beside the buffer itself.
SCORED_TOKENS_PER_CALL = 2**20

_CHUNK_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("num_correct", pa.int32()),
        ("num_graded", pa.int32()),
        ("responses", pa.list_(pa.list_(pa.int32()))),
    ]
)


@dataclass(frozen=True, slots=True)
class PromptOutcome:
    """What the stage keeps of one prompt's K responses.

    num_graded: those with a score. responses: token ids of the correct ones chosen for the buffer, none unless the
    prompt is near-perfect; their log-probs come last, from the learner.
    """

    prompt_id: str
    num_correct: int
    num_graded: int
    responses: Sequence[Sequence[int]]


class UnfinishedStage:
    """The graded chunks on disk. Looking changes nothing; `claim` makes the folder this stage's own.

    One stage at a time. A chunk is there whole or not at all, so a kill at any moment costs one chunk.
    """

    def __init__(
        self, buffer_folder: Path, prompts: Sequence[Prompt], identity: Fingerprint, prompts_per_chunk: int
    ) -> None:
        self.folder = buffer_folder.with_name(buffer_folder.name + ".partial")
        self._chunks = {
            start: prompts[start : start + prompts_per_chunk] for start in range(0, len(prompts), prompts_per_chunk)
        }
        # The chunk size decides seeds and file boundaries, so chunks of two sizes never mix. It is no part of the
        # buffer's own fingerprint: a finished buffer is as good whatever the size was.
        self._identity = {**identity, "prompts per chunk": str(prompts_per_chunk)}

    def chunks(self) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """(index of the first prompt, prompts) of every chunk, in order."""
        yield from self._chunks.items()

    def changed(self) -> list[str]:
        """Names of what keeps the chunks found from being continued; empty when nothing does, or none are there."""
        stored = self._stored_identity()
        return changed_parts(stored, self._identity) if stored else []

    def num_done(self) -> int:
        """Prompts of the complete chunks that may be continued; chunks behind a gap do not count."""
        if not self._stored_identity() or self.changed():
            return 0
        done = 0
        for start, chunk in self.chunks():
            if not self._is_whole(start, len(chunk)):
                break
            done += len(chunk)
        return done

    def claim(self) -> int:
        """Keep the chunks that may be continued, discard all others; returns `num_done`."""
        done = self.num_done()
        if not done:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path = self.folder / "identity.json"
            aside = path.with_suffix(".aside")
            aside.write_text(json.dumps({"fingerprint": self._identity}, indent=2) + "\n")
            os.replace(aside, path)
        return done

    def write(self, start: int, outcomes: Sequence[PromptOutcome]) -> None:
        """Store the chunk that begins at prompt `start`."""
        # A name of this process's own: an actor may outlive its killed driver for seconds and still be writing.
        aside = self._path(start).with_suffix(f".{os.getpid()}.aside")
        pq.write_table(pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], _CHUNK_SCHEMA), aside)
        os.replace(aside, self._path(start))

    def read(self, start: int) -> list[PromptOutcome]:
        """What `write` stored."""
        return [PromptOutcome(**row) for row in pq.read_table(self._path(start), schema=_CHUNK_SCHEMA).to_pylist()]

    def remove(self) -> None:
        """The buffer is in place and the chunks have served."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, start: int) -> Path:
        return self.folder / f"chunk_{start:08d}.parquet"

    def _is_whole(self, start: int, num_prompts: int) -> bool:
        # A rename outlives a killed process, not always a machine that lost power: hence the look inside.
        try:
            return bool(pq.read_metadata(self._path(start)).num_rows == num_prompts)
        except (OSError, ValueError):
            return False

    def _stored_identity(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / "identity.json").read_text())["fingerprint"])
        except (OSError, ValueError):
            return {}


async def fill_reference(
    config: Config,
    prompts: Sequence[Prompt],
    rollouts: RolloutPool,
    rewards: RewardPool,
    learner: Learner,
    identity: Fingerprint,
    folder: Path,
    on_graded: Callable[[int], None] = lambda num_completions: None,
) -> ReferenceBuffer:
    """Sample K responses a prompt, grade, split, store m correct ones per D_pef prompt; save the buffer in `folder`.

    Continues an unfinished stage of the same identity; on_graded hears of newly graded completions only. The
    engines must hold the initial policy. Log-probs come from the learner's forward pass, not the engine's, so that
    u = 1 at step 0. Raises InputError as soon as the chosen responses exceed reference.max_bytes.
    """
    unfinished = UnfinishedStage(folder, prompts, identity, config.reference.prompts_per_chunk)
    done = unfinished.claim()
    num_bytes = 0
    for start, chunk in unfinished.chunks():
        if start >= done:
            unfinished.write(start, await _sample_chunk(config, chunk, start, rollouts, rewards, on_graded))
        # Read back rather than kept: until all are there, one chunk is in memory.
        for prompt, outcome in zip(chunk, unfinished.read(start), strict=True):
            num_bytes += sum(sample_bytes(len(prompt.token_ids), len(ids)) for ids in outcome.responses)
        check_size(num_bytes, config.reference)
    buffer = await _finish(config, unfinished, learner, identity)
    buffer.save(folder)
    unfinished.remove()
    return buffer


async def _sample_chunk(
    config: Config,
    chunk: Sequence[Prompt],
    start: int,
    rollouts: RolloutPool,
    rewards: RewardPool,
    on_graded: Callable[[int], None],
) -> list[PromptOutcome]:
    # Of config.seed and the chunk's place alone: a continued stage samples what an uninterrupted one would have.
    seed = derive_seed(config.seed, "reference", start)
    collected = await collect_groups(
        rollouts, rewards, chunk, config.reference.num_samples, seed=seed, on_graded=on_graded
    )
    return [_outcome(group, config) for group in collected.groups]


def _outcome(group: RolloutGroup, config: Config) -> PromptOutcome:
    near_perfect = group.num_correct >= config.reference.threshold
    return PromptOutcome(
        group.prompt.prompt_id,
        group.num_correct,
        sum(result.score is not None for result in group.results),
        _choose_responses(group, config.reference.stored_per_prompt, config.seed) if near_perfect else [],
    )


def _choose_responses(group: RolloutGroup, count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` of the correct, complete responses, drawn by a seed of the prompt's own: order plays no part."""
    correct = [
        completion.token_ids
        for completion, result in zip(group.completions, group.results, strict=True)
        if result.score == 1.0 and not completion.truncated
    ]
    order = np.random.default_rng(derive_seed(seed, "choice", group.prompt.prompt_id)).permutation(len(correct))
    return [correct[i] for i in order[:count]]


async def _finish(
    config: Config, unfinished: UnfinishedStage, learner: Learner, identity: Fingerprint
) -> ReferenceBuffer:
    """Split by all chunks' counts, score all chosen responses."""
    num_correct: dict[str, int] = {}
    num_graded: dict[str, int] = {}
    chosen: list[tuple[Prompt, tuple[int, ...]]] = []
    for start, chunk in unfinished.chunks():
        for prompt, outcome in zip(chunk, unfinished.read(start), strict=True):
            num_correct[prompt.prompt_id], num_graded[prompt.prompt_id] = outcome.num_correct, outcome.num_graded
            chosen += [(prompt, tuple(token_ids)) for token_ids in outcome.responses]
    samples: list[ReferenceSample] = []
    for batch in _batches(chosen, SCORED_TOKENS_PER_CALL):
        scores = await learner.score([((*p.token_ids, *ids), len(p.token_ids)) for p, ids in batch])
        samples += [
            ReferenceSample(prompt.prompt_id, prompt.token_ids, token_ids, logprobs)
            for (prompt, token_ids), logprobs in zip(batch, scores, strict=True)
        ]
    split = split_prompts(num_correct, threshold=config.reference.threshold, all_wrong=config.reference.all_wrong)
    return ReferenceBuffer(split, num_correct, num_graded, samples, identity, config.seed)


def _batches(
    chosen: Sequence[tuple[Prompt, tuple[int, ...]]], max_tokens: int
) -> Iterator[Sequence[tuple[Prompt, tuple[int, ...]]]]:
    """Runs of `chosen` in order, each of at most max_tokens tokens (prompts counted) or of one response."""
    begin = num_tokens = 0
    for end, (prompt, token_ids) in enumerate(chosen):
        size = len(prompt.token_ids) + len(token_ids)
        if num_tokens + size > max_tokens and end > begin:
            yield chosen[begin:end]
            begin, num_tokens = end, 0
        num_tokens += size
    if begin < len(chosen):
        yield chosen[begin:]
