"""TRL's side of `e2e_vs_trl`: GRPOTrainer, which takes one step each time that it is asked.

Run by path in a process of its own, with TRL's folder and the checkout on PYTHONPATH. It imports nothing of dphrl.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.benchmarks._text_reward import reward


def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [reward(completion, "") for completion in completions]


class Timed(GRPOTrainer):  # type: ignore[misc]
    """Notes how long it sampled, and how many tokens."""

    rollout_s, num_tokens = 0.0, 0

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        completion_ids, logprobs = super()._generate_single_turn(*arguments, **options)
        self.rollout_s, self.num_tokens = time.perf_counter() - began, sum(map(len, completion_ids))
        return completion_ids, logprobs


class InTurn(TrainerCallback):  # type: ignore[misc]
    """Answers each step with its seconds, and waits to be asked for the next. What the trainer does between two steps
    counts, its logging too."""

    def __init__(self, trainer: Timed) -> None:
        self._trainer, self._began = trainer, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self._began:
            print("answer {}", flush=True)
            self._await_order()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._began
        told = {"rollout_s": self._trainer.rollout_s, "num_tokens": self._trainer.num_tokens}
        print("answer " + json.dumps({"seconds": seconds, **told}), flush=True)
        self._await_order()

    def _await_order(self) -> None:
        if not sys.stdin.readline():
            sys.exit()
        self._began = time.perf_counter()


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["num_threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokens = [tokenizer(prompt)["input_ids"] for prompt in settings["prompts"]]
    assert tokens == settings["token_ids"], "TRL would read the prompts as other tokens"
    num_rows = len(tokens) * settings["num_samples"]
    config = GRPOConfig(
        output_dir="trl",
        per_device_train_batch_size=num_rows // settings["num_parts"],
        gradient_accumulation_steps=settings["num_parts"],
        num_generations=settings["num_samples"],
        max_completion_length=settings["max_tokens"],
        # A token that nobody says ends an answer; this makes sure of it.
        generation_kwargs={"min_new_tokens": settings["max_tokens"]},
        max_steps=1_000_000,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.01,
        use_cpu=True,
        bf16=settings["autocast"],
        model_init_kwargs={"dtype": settings["weights"]},
        gradient_checkpointing=False,
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Timed(
        settings["model"],
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": settings["prompts"]}),
        processing_class=tokenizer,
    )
    trainer.add_callback(InTurn(trainer))
    trainer.train()


if __name__ == "__main__":
    main()
