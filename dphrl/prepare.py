"""What a run needs before any part of it starts: the model's directory, its tokenizer, tokenized problems."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dphrl.config.data import DatasetConfig
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.data.chat import build_prompts
from dphrl.data.loading import load_problems
from dphrl.data.text_to_sql import check_golds
from dphrl.models import load_tokenizer, resolve_model
from dphrl.rewards.base import check_reward
from dphrl.tracking.console import Console
from dphrl.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSet:
    """One data set that evaluations sample and grade; its results are named by `name` and `split`."""

    name: str
    split: str
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found. prompts: those to train on.

    model_dir: an HF directory, or a hub name, which transformers and vLLM resolve in the same way.
    """

    model_dir: str
    tokenizer: Any
    prompts: Sequence[Prompt]
    evaluations: Sequence[EvaluationSet]


def prepare(config: Config, console: Console, *, model: str | None = None) -> Prepared:
    """Make or find the model (`model` in place of the config's when given), then read and tokenize the data.

    Raises InputError for what the user can correct, such as a missing path, a bad row, or a model with too few
    positions for the sequences.
    """
    try:
        check_reward(config.reward)
        model_dir = str(resolve_model(model or config.model.path))
        tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        _check_length(config, model_dir)
        prompts = load_prompts(config.data.train, config, tokenizer, console)
        evaluations = [
            EvaluationSet(dataset.name, dataset.split, load_prompts(dataset, config, tokenizer, console))
            for dataset in config.data.evaluation
        ]
    except (ValueError, OSError) as error:
        raise error if isinstance(error, InputError) else InputError(" ".join(str(error).split())) from error
    _warn_of_unasked_box(config, prompts)
    return Prepared(model_dir, tokenizer, prompts, evaluations)


def load_prompts(dataset: DatasetConfig, config: Config, tokenizer: Any, console: Console) -> list[Prompt]:
    """The data set's prompts; says how many there are, and how many were dropped or shortened.

    Raises ValueError for what the user can correct: bad rows, gold queries that do not run, no prompt short enough.
    """
    problems = load_problems(dataset, config.seed)
    notes = []
    if dataset.kind == "text_to_sql":
        label = f"{dataset.name} ({dataset.split})"
        with console.task(f"running gold queries of {label}", len(problems)) as advance:
            problems, num_invalid = check_golds(problems, dataset, config.reward.timeout_s, advance)
        notes.append((num_invalid, "dropped, their gold query does not run"))
        # Schemas are long, so thousands of prompts take a while and get a progress bar.
        with console.task(f"tokenizing {label}", len(problems)) as advance:
            built = build_prompts(problems, tokenizer, config.data, advance)
    else:
        built = build_prompts(problems, tokenizer, config.data)
    notes += [
        (built.num_dropped, f"longer than data.max_prompt_tokens={config.data.max_prompt_tokens} dropped"),
        (built.num_lost_rows, "without some sample rows, to fit"),
        (built.num_lost_names, "with a schema trimmed by relevance (tables or columns left out), to fit"),
    ]
    said = "".join(f", {count} {note}" for count, note in notes if count)
    console.info(f"data {dataset.name} ({dataset.split}): {len(built.prompts)} prompts{said}")
    return built.prompts


def _check_length(config: Config, model_dir: str) -> None:
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.model.trust_remote_code)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_sequence_tokens > longest:
        raise InputError(
            f"data.max_prompt_tokens + rollout.max_tokens = {config.max_sequence_tokens} exceeds the model's "
            f"{longest} positions; lower one of them"
        )


def _warn_of_unasked_box(config: Config, prompts: Sequence[Prompt]) -> None:
    """Where prompts ask for another form, a reward that reads boxes alone gives 0 to every answer and says nothing."""
    if config.reward.name != "math_answer" or config.reward.extraction != "boxed":
        return
    if not any("boxed" in prompt.text for prompt in prompts):
        logger.warning(
            r"No prompt of %s asks for \boxed{}, and reward.extraction: boxed reads nothing else; set "
            "reward.extraction: auto, or ask for the box in data.prompt_template",
            config.data.train.name,
        )
