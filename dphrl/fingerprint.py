"""A fingerprint decides whether stored work may be used again: it has one hash for each thing the work depends on.

The reference buffer, chunks of unfinished work, evaluations and checkpoints all carry such hashes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dphrl.config.schema import Config
from dphrl.types import Prompt

Fingerprint = Mapping[str, str]
# The part of a fingerprint that may change without new sampling: it decides which of the sampled responses are stored.
SELECTION = "selection"


def fingerprint(config: Config, model_dir: str, prompts: Sequence[Prompt], learner_dtype: str) -> dict[str, str]:
    """One hash per thing that decides a buffer's content, so that a mismatch can say which one changed."""
    reference, rollout = config.reference, config.rollout
    sampling = [reference.num_samples, rollout.temperature, rollout.max_tokens, config.seed]
    return {
        "model weights": hash_model(model_dir),
        "tokenizer": hash_files(model_dir, ("tokenizer*", "*.jinja", "vocab*", "merges*")),
        "prompts": hash_value([(p.prompt_id, p.token_ids, p.answer) for p in prompts]),
        "sampling": hash_value(sampling),
        SELECTION: hash_value([reference.threshold, reference.stored_per_prompt, reference.all_wrong]),
        "reward": hash_value(config.reward.model_dump(include={"name", "params", "extraction", "timeout_s"})),
        "learner numerics": hash_value([learner_dtype, config.model.attention, config.learner.packing]),
    }


def changed_parts(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Names of the parts of `wanted` that `stored` lacks or differs in; empty when the stored work may be reused."""
    return [name for name in wanted if stored.get(name) != wanted[name]]


@functools.lru_cache(maxsize=4)
def hash_model(model_dir: str) -> str:
    """Hash of the weights and configuration in an HF directory, or of the name alone for a hub model.

    The result is cached, so a process reads the large files once.
    """
    return hash_files(model_dir, ("*.safetensors", "*.bin", "config.json"))


def hash_value(value: object) -> str:
    """16 hex digits over the JSON form of `value`."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def hash_files(model_dir: str, patterns: Sequence[str]) -> str:
    """16 hex digits over the names and contents of the matching files."""
    folder = Path(model_dir)
    if not folder.is_dir():  # a hub name, which the library's cache resolves to one revision
        return hash_value(model_dir)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
