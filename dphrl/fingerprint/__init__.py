"""A fingerprint decides whether stored work may be used again: it has one hash for each thing the work depends on.

The reference buffer, chunks of unfinished work, evaluations and checkpoints all carry such hashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dphrl.config.data import RewardConfig
from dphrl.config.schema import Config
from dphrl.fingerprint.code import hash_code
from dphrl.fingerprint.files import hash_contents, hash_value
from dphrl.fingerprint.model import hash_model, hub_revision
from dphrl.types import JsonDict, Prompt

Fingerprint = Mapping[str, str]
# The part of a fingerprint that may change without new sampling: it decides which of the sampled responses are stored,
# and what of them.
SELECTION = "selection"
# What `changed_parts` tells of a fingerprint that has not the same parts.
OTHER_VERSION = "what a fingerprint holds"
# The parts that decide what a policy that starts from the model samples, and what verdict that gets.
SAMPLED_AND_GRADED = (
    *("model weights", "tokenizer", "generation settings", "prompts", "databases", "reward", "reward code"),
)


def fingerprint(config: Config, model_dir: str, prompts: Sequence[Prompt], learner_dtype: str) -> dict[str, str]:
    """One hash per thing that decides a buffer's content, so that a mismatch can say which one changed."""
    reference, rollout = config.reference, config.rollout
    sampling = [reference.num_samples, rollout.temperature, rollout.max_tokens, config.seed]
    # The text names the rule of the split. It changes with the rule, so that a buffer of an older rule is split anew.
    # Earlier versions rounded logits to bfloat16.
    head = ["float32 logits"] if learner_dtype == "bfloat16" else []
    selection = ["complete of graded", reference.threshold, reference.confirm, reference.all_wrong]
    # Only where they are asked for, so that buffers of earlier versions serve all other runs.
    entropies = ["entropies"] if config.algorithm.rehearsal_tokens == "entropy" else []
    return {
        **input_hashes(config, model_dir, prompts),
        "sampling": hash_value(sampling),
        SELECTION: hash_value([*selection, reference.stored_per_prompt, *entropies]),
        "reward": hash_value(
            config.reward.model_dump(include={"name", "params", "extraction", "thinking_marks", "timeout_s"})
        ),
        "learner numerics": hash_value([learner_dtype, config.model.attention, config.learner.packing, *head]),
    }


def input_hashes(config: Config, model_dir: str, prompts: Sequence[Prompt]) -> dict[str, str]:
    """One hash per thing that the configuration only names: its content may change while the configuration does not."""
    return {
        **hash_model(model_dir),
        **_hash_prompts(prompts),
        "reward code": hash_code(reward_modules(config.reward)),
    }


def _hash_prompts(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Databases count by name and content, wherever they lie; a gold query's result is in neither prompt nor answer."""
    asked: list[tuple[str, Sequence[int], object]] = []
    databases: set[Path] = set()
    for prompt in prompts:
        answer: object = prompt.answer
        if (fields := _sql_answer(prompt.answer)) is not None:
            path = Path(fields["db"])
            databases.add(path)
            answer = fields | {"db": path.name}
        asked.append((prompt.prompt_id, prompt.token_ids, answer))
    found = sorted(path for path in databases if path.is_file())
    contents = sorted(zip([path.name for path in found], hash_contents(found), strict=True))
    return {"prompts": hash_value(asked), "databases": hash_value(contents)}


def _sql_answer(answer: str) -> JsonDict | None:
    """The fields of an answer of text-to-SQL; None for the answer of another task."""
    try:
        fields = json.loads(answer) if answer.startswith("{") else None
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("db"), str) and "gold_sql" in fields else None


def reward_modules(reward: RewardConfig) -> tuple[str, ...]:
    """The modules whose code gives the verdicts of a reward; they import the others."""
    if reward.is_custom:
        return "dphrl.rewards.custom", reward.name.partition(":")[0]
    return (f"dphrl.rewards.{reward.name}",)


def changed_parts(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Names of the parts of `wanted` that `stored` differs in; empty when the stored work may be reused.

    If `stored` lacks one, another version wrote it, whose other parts may be hashes of something else too.
    """
    if not wanted.keys() <= stored.keys():
        return [OTHER_VERSION]
    return [name for name in wanted if stored[name] != wanted[name]]


def blind_spots(model_dir: str) -> list[str]:
    """What a fingerprint cannot see in this run, a line each for the user."""
    if Path(model_dir).is_dir() or hub_revision(model_dir):
        return []
    return [
        f"NOTE: {model_dir} is not in this machine's Hugging Face cache, so its revision is not known, and another one "
        "will not be noticed"
    ]
