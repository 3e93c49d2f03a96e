"""The confirmation of near-perfect prompts: each is sampled once more, and stays near-perfect if that is right too.

The verdicts are kept in chunks in `<buffer folder>.confirmed/`, as the graded responses are beside them, so that a
killed confirmation continues. The answers themselves are not kept: what is stored for rehearsal are responses that the
split was decided by, whether prompts are confirmed or not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from dphrl.chunks import ChunkFolder
from dphrl.collect import collect_chunks, collect_groups
from dphrl.config.schema import Config
from dphrl.data.schedule import derive_seed
from dphrl.fingerprint import Fingerprint
from dphrl.fingerprint.files import hash_value
from dphrl.protocols import OnGraded, RewardPool, RolloutPool
from dphrl.rewards.watch import RewardWatch
from dphrl.types import Prompt, RolloutGroup

log = logging.getLogger(__name__)

_SCHEMA = pa.schema([("prompt_id", pa.string()), ("confirmed", pa.bool_())])


async def unconfirmed_prompts(
    config: Config,
    candidates: Sequence[Prompt],
    rollouts: RolloutPool,
    rewards: RewardPool,
    watch: RewardWatch,
    identity: Fingerprint,
    folder: Path,
    on_graded: OnGraded,
) -> frozenset[str]:
    """prompt_ids of the candidates whose one further answer is not correct and complete, or has no verdict.

    identity: of the graded responses that made these prompts near-perfect. folder: of the buffer. on_graded: gets the
    number of candidates that are settled, those of an earlier process included.
    """
    # Another threshold has other candidates. Then all of them are sampled again, so that the result is the same whether
    # or not there was another threshold before.
    identity = {**identity, "near-perfect prompts": hash_value([prompt.prompt_id for prompt in candidates])}
    # A chunk holds as many completions as one of the graded responses does.
    size = config.reference.prompts_per_chunk * config.reference.num_samples
    stored = ChunkFolder(folder.with_name(folder.name + ".confirmed"), candidates, identity, size, _SCHEMA)
    for damage in stored.damaged():
        facts = {"folder": str(stored.folder), "damage": damage}
        log.warning(
            "%s: %s; these prompts are confirmed again",
            *facts.values(),
            extra={"event": "chunk_damaged", "facts": facts},
        )
    done = stored.claim()
    on_graded(stored.num_prompts(done), 0)
    seed = derive_seed(config.seed, "confirmation")

    async def confirm(start: int, chunk: Sequence[Prompt]) -> None:
        collected = await collect_groups(rollouts, rewards, chunk, 1, seed=seed, on_graded=on_graded, watch=watch)
        watch.check(collected.groups)
        stored.write_rows(start, [_verdict(group) for group in collected.groups])

    await collect_chunks([partial(confirm, start, chunk) for start, chunk in stored.chunks() if start not in done])
    rows = [row for start, _ in stored.chunks() for row in stored.read_rows(start)]
    unconfirmed = {row["prompt_id"] for row in rows if not row["confirmed"]}
    return frozenset(unconfirmed)


def _verdict(group: RolloutGroup) -> dict[str, object]:
    (completion,), (result,) = group.completions, group.results
    return {"prompt_id": group.prompt.prompt_id, "confirmed": result.score == 1.0 and not completion.truncated}
