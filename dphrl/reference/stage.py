"""The reference stage: sample the initial policy once, grade, split, score. A killed stage continues where it stopped.

Every chunk of prompts is written to one parquet file in `<buffer folder>.graded/` as soon as it is graded.
`identity.json` beside them says which model, data and sampling the chunks were made with. When all chunks are there,
near-perfect prompts are confirmed if the configuration asks for it. Then the prompts are split, the learner scores the
chosen responses and the buffer is put in place. The chunks stay: a run with another threshold chooses from them, and
only the learner's part, and the confirmation, are done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from dphrl.chunks import ChunkFolder
from dphrl.collect import collect_chunks, collect_groups
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed
from dphrl.fingerprint import SELECTION, Fingerprint
from dphrl.protocols import Learner, OnGraded, RewardPool, RolloutPool
from dphrl.reference.buffer import ReferenceBuffer, check_size, sample_bytes
from dphrl.reference.confirm import unconfirmed_prompts
from dphrl.reference.split import PromptCounts, is_near_perfect, split_prompts
from dphrl.rewards.watch import RewardWatch
from dphrl.types import Prompt, ReferenceSample, RolloutGroup

# Tokens that the learner gets in one call. They fill many micro-batches, so that rows of similar length share one, but
# they are few compared with the buffer itself.
SCORED_TOKENS_PER_CALL = 2**20

# A prompt, and the token ids of one of its responses that is to be stored.
Chosen = tuple[Prompt, tuple[int, ...]]

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

    num_graded: how many have a score. responses: token ids of those that are correct and not truncated.
    """

    prompt_id: str
    num_correct: int
    num_graded: int
    responses: Sequence[Sequence[int]]

    @property
    def counts(self) -> PromptCounts:
        return PromptCounts(self.num_graded, self.num_correct, len(self.responses))


class GradedResponses(ChunkFolder):
    """The graded chunks on disk, for a buffer whose fingerprint is `identity`."""

    def __init__(
        self, buffer_folder: Path, prompts: Sequence[Prompt], identity: Fingerprint, prompts_per_chunk: int
    ) -> None:
        folder = buffer_folder.with_name(buffer_folder.name + ".graded")
        super().__init__(folder, prompts, _of_sampling(identity), prompts_per_chunk, _CHUNK_SCHEMA)

    def write(self, start: int, outcomes: Sequence[PromptOutcome]) -> None:
        """Store the chunk that begins at prompt `start`."""
        self.write_rows(start, [asdict(outcome) for outcome in outcomes])

    def read(self, start: int) -> list[PromptOutcome]:
        """The outcomes that `write` stored for the chunk that begins at prompt `start`."""
        return [PromptOutcome(**row) for row in self.read_rows(start)]


def _of_sampling(identity: Fingerprint) -> Fingerprint:
    return {name: value for name, value in identity.items() if name != SELECTION}


async def fill_reference(
    config: Config,
    prompts: Sequence[Prompt],
    rollouts: RolloutPool,
    rewards: RewardPool,
    learner: Learner,
    identity: Fingerprint,
    folder: Path,
    on_graded: OnGraded = lambda num_completions, num_tokens: None,
) -> ReferenceBuffer:
    """Fill the buffer and save it in `folder`: sample, grade, split, and store the correct responses of D_pef prompts.

    K = reference.num_samples responses are sampled per prompt, of which at most reference.stored_per_prompt are stored.
    Chunks that an earlier stage left are used; on_graded counts only newly graded completions. With reference.confirm
    it counts one more for every prompt, those that need no confirmation included. The engines must hold the initial
    policy. Log-probs come from the learner's forward pass, not from the engines, so that u = 1 at step 0.

    Raises InputError as soon as the chosen responses exceed reference.max_bytes, and RewardFailedError when the reward
    gives no verdict.
    """
    reference = config.reference
    graded = GradedResponses(folder, prompts, identity, reference.prompts_per_chunk)
    watch = RewardWatch(config.reward.name)
    done = graded.claim()
    counts: dict[str, PromptCounts] = {}
    chosen_at: dict[int, list[Chosen]] = {}
    num_bytes = 0

    def settle(start: int, chunk: Sequence[Prompt]) -> None:
        nonlocal num_bytes
        of_chunk = chosen_at[start] = []
        for prompt, outcome in zip(chunk, graded.read(start), strict=True):
            watch.works |= outcome.num_graded > 0
            counts[prompt.prompt_id] = outcome.counts
            of_chunk += [(prompt, tuple(token_ids)) for token_ids in _choose(outcome, config)]
        num_bytes += _num_bytes(of_chunk, config)
        if not reference.confirm:
            check_size(num_bytes, reference)

    async def sample(start: int, chunk: Sequence[Prompt]) -> None:
        graded.write(start, await _sample_chunk(config, chunk, rollouts, rewards, watch, on_graded))
        settle(start, chunk)

    for start, chunk in graded.chunks():
        if start in done:
            settle(start, chunk)
    await collect_chunks([partial(sample, start, chunk) for start, chunk in graded.chunks() if start not in done])
    # Chunks end in any order; the buffer has the order of the prompts.
    counts = {prompt.prompt_id: counts[prompt.prompt_id] for prompt in prompts}
    chosen = [response for start in sorted(chosen_at) for response in chosen_at[start]]
    unconfirmed: frozenset[str] = frozenset()
    if reference.confirm:
        candidates = [prompt for prompt in prompts if is_near_perfect(counts[prompt.prompt_id], reference)]
        on_graded(len(prompts) - len(candidates), 0)
        unconfirmed = await unconfirmed_prompts(
            config, candidates, rollouts, rewards, watch, _of_sampling(identity), folder, on_graded
        )
        chosen = [response for response in chosen if response[0].prompt_id not in unconfirmed]
        check_size(_num_bytes(chosen, config), reference)
    split = split_prompts(counts, reference, unconfirmed)
    samples = await _score(chosen, learner, with_entropies=_with_entropies(config))
    buffer = ReferenceBuffer(split, counts, samples, identity, config.seed, watch.failures)
    buffer.save(folder, reference)
    return buffer


async def _sample_chunk(
    config: Config,
    chunk: Sequence[Prompt],
    rollouts: RolloutPool,
    rewards: RewardPool,
    watch: RewardWatch,
    on_graded: OnGraded,
) -> list[PromptOutcome]:
    # One seed for all chunks: engines make of it one for each completion, by prompt. So a continued stage samples what
    # an unbroken one would have, and chunks of another size would have the same completions.
    seed = derive_seed(config.seed, "reference")
    collected = await collect_groups(
        rollouts, rewards, chunk, config.reference.num_samples, seed=seed, on_graded=on_graded, watch=watch
    )
    # A chunk without a verdict is not stored: the stage samples it again once the reward works.
    watch.check(collected.groups)
    return [_outcome(group) for group in collected.groups]


def _outcome(group: RolloutGroup) -> PromptOutcome:
    correct = [
        completion.token_ids
        for completion, result in zip(group.completions, group.results, strict=True)
        if result.score == 1.0 and not completion.truncated
    ]
    num_graded = sum(result.score is not None for result in group.results)
    return PromptOutcome(group.prompt.prompt_id, group.num_correct, num_graded, correct)


def _choose(outcome: PromptOutcome, config: Config) -> list[Sequence[int]]:
    """The responses to store: a few of a near-perfect prompt, drawn with the prompt's own seed; none of others."""
    if not is_near_perfect(outcome.counts, config.reference):
        return []
    rng = np.random.default_rng(derive_seed(config.seed, "choice", outcome.prompt_id))
    order = rng.permutation(len(outcome.responses))
    return [outcome.responses[i] for i in order[: config.reference.stored_per_prompt]]


def _with_entropies(config: Config) -> bool:
    return config.algorithm.rehearsal_tokens == "entropy"


def _num_bytes(responses: Sequence[Chosen], config: Config) -> int:
    with_entropies = _with_entropies(config)
    return sum(sample_bytes(len(p.token_ids), len(ids), with_entropies=with_entropies) for p, ids in responses)


async def _score(chosen: Sequence[Chosen], learner: Learner, *, with_entropies: bool) -> list[ReferenceSample]:
    """The chosen responses with the learner's log-probs, and the entropies of the distributions behind them."""
    samples: list[ReferenceSample] = []
    for batch in _batches(chosen, SCORED_TOKENS_PER_CALL):
        sequences = [((*p.token_ids, *ids), len(p.token_ids)) for p, ids in batch]
        scores: Sequence[tuple[tuple[float, ...], ...]]
        scores = await learner.measure(sequences) if with_entropies else [(s,) for s in await learner.score(sequences)]
        samples += [
            ReferenceSample(prompt.prompt_id, prompt.token_ids, token_ids, *of_tokens)
            for (prompt, token_ids), of_tokens in zip(batch, scores, strict=True)
        ]
    return samples


def _batches(chosen: Sequence[Chosen], max_tokens: int) -> Iterator[Sequence[Chosen]]:
    """Consecutive parts of `chosen`, each of at most max_tokens tokens (prompts included) or of one response."""
    begin = num_tokens = 0
    for end, (prompt, token_ids) in enumerate(chosen):
        size = len(prompt.token_ids) + len(token_ids)
        if num_tokens + size > max_tokens and end > begin:
            yield chosen[begin:end]
            begin, num_tokens = end, 0
        num_tokens += size
    if begin < len(chosen):
        yield chosen[begin:]
