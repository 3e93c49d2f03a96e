"""The supervised warm start that turns random weights into a policy worth doing RL on, in under a minute.

The result is cached as a plain Hugging Face directory, so that every later start of a demo or a test is
instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dphrl.tiny import model as tiny_model
from dphrl.tiny import sql_task
from dphrl.tiny import task as factor_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Progress = Callable[[int, int], None]

# Part of the cache key. Raise it with any change of this package that changes the weights or files it writes
# but no number in the recipe; otherwise users keep an old model.
SOURCE_VERSION = 2

_TASKS = {"factor": factor_task, "sql": sql_task}

_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "recipe.json",
)
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class WarmStartRecipe:
    """Every number that decides the warm-started weights; recipes that differ have separate cache entries.

    task: "factor" or "sql". batch_size is in demonstrations. lr is AdamW's peak: reached after num_warmup_steps, then
    decayed linearly to zero.
    """

    task: str = "factor"
    num_steps: int = 295
    batch_size: int = 96
    lr: float = 3e-3
    num_warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    slip_rate: float = factor_task.SLIP_RATE
    out_of_domain_share: float = factor_task.OUT_OF_DOMAIN_SHARE
    seed: int = 0
    shape: tiny_model.TinyShape = field(default_factory=tiny_model.TinyShape)

    def __post_init__(self) -> None:
        if self.task not in _TASKS:
            raise ValueError(f"task {self.task!r} is unknown: choose one of {', '.join(_TASKS)}")

    def fingerprint(self) -> str:
        """12 hex digits over this recipe, the task's and the tokenizer's constants and `SOURCE_VERSION`."""
        covered = {
            "recipe": asdict(self),
            "task": _TASKS[self.task].fingerprint_parts(),
            "special_tokens": tiny_model.SPECIAL_TOKENS,
            "chat_template": tiny_model.CHAT_TEMPLATE,
            "max_tokens": tiny_model.MAX_TOKENS,
            "source_version": SOURCE_VERSION,
        }
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:12]


FACTOR_RECIPE = WarmStartRecipe()
# A query says less per token than a division: fewer steps reach the same precision.
SQL_RECIPE = WarmStartRecipe(
    task="sql",
    num_steps=240,
    slip_rate=sql_task.SLIP_RATE,
    out_of_domain_share=sql_task.OUT_OF_DOMAIN_SHARE,
)


def ensure_tiny_model(
    cache_dir: Path | None = None, progress: Progress | None = None, *, recipe: WarmStartRecipe | None = None
) -> Path:
    """The directory of the warm-started model, trained now if it is not cached yet.

    cache_dir: where to keep it; else $DPHRL_CACHE, else ~/.cache/dphrl. The directory in it is
    ``tiny-<task>-<fingerprint>``.
    progress: called as (steps done, steps in all) after each step; not called when the model is cached.
    Returns a plain Hugging Face directory (config, safetensors, tokenizer with chat template, generation
    config). Processes may race: each trains, the first to finish publishes, nobody ever sees a half-written
    directory. Raises OSError when the cache cannot be written.
    """
    recipe = recipe or FACTOR_RECIPE
    root = cache_dir or Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl")
    target = root.expanduser() / f"tiny-{recipe.task}-{recipe.fingerprint()}"
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because os.replace is atomic only within one file system. Made before the training,
    # so that a cache that cannot be written fails now and not a minute later.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model, tokenizer = warm_start(recipe, progress)
        _write(scratch, model, tokenizer, recipe)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def warm_start(
    recipe: WarmStartRecipe, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the tiny model on demonstrations, on the CPU in fp32; the loss covers completion tokens only.

    The same recipe gives the same weights on the same machine; the global random state and thread count are
    left as they were.
    """
    import torch

    num_threads = torch.get_num_threads()
    # One thread: sums are then in the same order everywhere, and matrices this small gain little from more,
    # while two threads that wait for each other on a busy machine were seen to take eight times as long.
    torch.set_num_threads(1)
    try:
        return _train(recipe, progress)
    finally:
        torch.set_num_threads(num_threads)


def _train(recipe: WarmStartRecipe, progress: Progress | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    import torch

    tokenizer = tiny_model.build_tokenizer(_TASKS[recipe.task].VOCABULARY)
    model = tiny_model.build_model(recipe.shape, tokenizer, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    model.train()
    with torch.enable_grad():
        for step, (input_ids_BT, labels_BT) in enumerate(_batches(recipe, tokenizer), start=1):
            # No attention mask: rows are padded on the right, where causal attention from real tokens cannot
            # look.
            logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED_LABEL
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()
            if progress is not None:
                progress(step, recipe.num_steps)
    model.eval()
    return model, tokenizer


def _lr_factor(step: int, recipe: WarmStartRecipe) -> float:
    """Linear warm-up, then linear decay to zero; `step` counts from 0."""
    rising = (step + 1) / (recipe.num_warmup_steps + 1)
    falling = (recipe.num_steps - step) / max(1, recipe.num_steps - recipe.num_warmup_steps)
    return max(0.0, min(1.0, rising, falling))


def _batches(
    recipe: WarmStartRecipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`num_steps` pairs (input_ids, labels), int64 [B, T], right-padded; labels -100 off the completion."""
    import torch

    demonstrations = _TASKS[recipe.task].make_demonstrations(
        recipe.num_steps * recipe.batch_size,
        recipe.seed,
        slip_rate=recipe.slip_rate,
        out_of_domain_share=recipe.out_of_domain_share,
    )
    for start in range(0, len(demonstrations), recipe.batch_size):
        batch = demonstrations[start : start + recipe.batch_size]
        # Through the chat template, so that training sees exactly the ids that a user's prompt will have.
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for question, _ in batch],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        completions = tokenizer([completion + tokenizer.eos_token for _, completion in batch])["input_ids"]
        length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
        input_ids_BT = torch.full((len(batch), length), tokenizer.pad_token_id)
        labels_BT = torch.full((len(batch), length), _IGNORED_LABEL)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            end = len(prompt) + len(completion)
            input_ids_BT[row, :end] = torch.tensor(prompt + completion)
            labels_BT[row, len(prompt) : end] = torch.tensor(completion)
        yield input_ids_BT, labels_BT


def _write(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: WarmStartRecipe
) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    # mkdtemp made it private to this user; a cache may be shared.
    directory.chmod(0o755)


def _publish(scratch: Path, target: Path) -> None:
    """Move `scratch` to `target` in one step; a complete directory that is already there wins."""
    try:
        os.replace(scratch, target)
        return
    except OSError:
        if _is_complete(target):
            return
        if not target.exists():
            raise
    # Something deleted part of an older entry. Its name is ours, so make room.
    shutil.rmtree(target)
    os.replace(scratch, target)


def _is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in _REQUIRED_FILES)
