"""The supervised warm start that turns random weights into a policy worth doing RL on, in about a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dphrl.tiny import model as tiny_model
from dphrl.tiny.recipe import TASKS, WarmStartRecipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Progress = Callable[[int, int], None]

_IGNORED_LABEL = -100


def warm_start(
    recipe: WarmStartRecipe, progress: Progress | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the tiny model on demonstrations, on the CPU in fp32; the loss covers completion tokens only.

    The same recipe gives the same weights on the same machine; the global random state and thread count are
    left as they were.
    """
    import torch

    num_threads = torch.get_num_threads()
    # One thread adds in the same order everywhere. Matrices this small gain little from more threads, and two threads
    # that wait for each other on a busy machine were seen to take eight times as long.
    torch.set_num_threads(1)
    try:
        return _train(recipe, progress)
    finally:
        torch.set_num_threads(num_threads)


def _train(recipe: WarmStartRecipe, progress: Progress | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    import torch

    tokenizer = tiny_model.build_tokenizer(TASKS[recipe.task].vocabulary)
    model = tiny_model.build_model(recipe.shape, tokenizer, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    model.train()
    with torch.enable_grad():
        for step, (input_ids_BT, labels_BT) in enumerate(_batches(recipe, tokenizer), start=1):
            optimizer.zero_grad()
            _loss(model, input_ids_BT, labels_BT).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()
            if progress is not None:
                progress(step, recipe.num_steps)
    model.eval()
    return model, tokenizer


def demonstration_loss(model: PreTrainedModel, recipe: WarmStartRecipe, *, seed: int, num_batches: int = 10) -> float:
    """Mean loss in nats a completion token on demonstrations drawn with `seed`: how far a warm start has come."""
    import torch

    tokenizer = tiny_model.build_tokenizer(TASKS[recipe.task].vocabulary)
    batches = _batches(replace(recipe, seed=seed, num_steps=num_batches), tokenizer)
    with torch.no_grad():
        losses = [_loss(model, input_ids_BT, labels_BT).item() for input_ids_BT, labels_BT in batches]
    return sum(losses) / num_batches


def _loss(model: PreTrainedModel, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    import torch

    # No attention mask is needed: rows are padded on the right, where causal attention from real tokens cannot look.
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=_IGNORED_LABEL
    )


def _lr_factor(step: int, recipe: WarmStartRecipe) -> float:
    """Linear warm-up, then linear decay to zero; `step` counts from 0."""
    rising = (step + 1) / (recipe.num_warmup_steps + 1)
    falling = (recipe.num_steps - step) / max(1, recipe.num_steps - recipe.num_warmup_steps)
    return max(0.0, min(1.0, rising, falling))


def _batches(
    recipe: WarmStartRecipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`num_steps` pairs (input_ids, labels), int64 [B, T], right-padded; labels are -100 outside the completion."""
    import torch

    demonstrations = TASKS[recipe.task].make_demonstrations(
        recipe.num_steps * recipe.batch_size,
        recipe.seed,
        slip_rate=recipe.slip_rate,
        out_of_domain_share=recipe.out_of_domain_share,
    )
    for start in range(0, len(demonstrations), recipe.batch_size):
        batch = demonstrations[start : start + recipe.batch_size]
        # The chat template makes the prompts, so that training sees exactly the ids that a user's prompt will have.
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
