"""What a run needs before any part of it starts: the model's directory, its tokenizer, tokenized problems."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dphrl.config.data import DatasetConfig
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.data.chat import build_prompts
from dphrl.data.duplicates import find_repeats, num_shared
from dphrl.data.golds import CHECKED_KINDS, check_golds, refuse_or_drop, same_golds
from dphrl.data.loading import load_problems
from dphrl.data.problems import Problem
from dphrl.durable import DISK_FAULTS
from dphrl.hub import access_obstacle
from dphrl.learner.lora import check_lora
from dphrl.model_files import check_files
from dphrl.models import resolve_model
from dphrl.rewards.base import check_reward
from dphrl.tokenizer import load_tokenizer
from dphrl.tracking.console import Advance, Console
from dphrl.types import Prompt

logger = logging.getLogger(__name__)

# More golds than these take longer than a second, so that they get a progress bar.
_MANY_GOLDS = 5_000
# Rows that run.log names.
_MAX_NOTES = 200


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
    notes: what was said about the data, and which rows were dropped. They are for run.log, which a run opens later.
    """

    model_dir: str
    tokenizer: Any
    prompts: Sequence[Prompt]
    evaluations: Sequence[EvaluationSet]
    notes: Sequence[str] = ()

    def log_notes(self) -> None:
        for note in self.notes:
            logger.info("%s", note)


def prepare(config: Config, console: Console, *, model: str | None = None) -> Prepared:
    """Make or find the model (`model` in place of the config's when given), then read and tokenize the data.

    Raises InputError for what the user can correct, such as a missing path, a bad row, or a model with too few
    positions for the sequences.
    """
    try:
        check_reward(config.reward)
        model_dir = str(resolve_model(model or config.model.path))
        if os.path.isdir(model_dir):  # a hub model is downloaded whole
            check_files(Path(model_dir))
        elif obstacle := access_obstacle(model_dir):
            raise ValueError(obstacle)
        vocab_size = _check_model(config, model_dir)
        tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        if config.model.lora is not None:
            check_lora(config.model, model_dir)
        loaded = load_prompts(config.data.train, config, tokenizer, console, duplicates=config.data.duplicates)
        notes = [*loaded.notes]
        evaluations = []
        for dataset in config.data.evaluation:
            tested = load_prompts(dataset, config, tokenizer, console, duplicates="keep")
            evaluations.append(EvaluationSet(dataset.name, dataset.split, tested.prompts))
            notes += [*tested.notes, *_warn_of_shared(loaded.prompts, tested.prompts, dataset)]
        for prompts in (loaded.prompts, *(tested.prompts for tested in evaluations)):
            _check_vocabulary(prompts, vocab_size, model_dir)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise
        raise error if isinstance(error, InputError) else InputError(" ".join(str(error).split())) from error
    _warn_of_unasked_box(config, loaded.prompts)
    return Prepared(model_dir, tokenizer, loaded.prompts, evaluations, notes)


class LoadedPrompts(NamedTuple):
    prompts: list[Prompt]
    notes: list[str]


def load_prompts(
    dataset: DatasetConfig, config: Config, tokenizer: Any, console: Console, *, duplicates: str
) -> LoadedPrompts:
    """The data set's prompts, and notes for run.log. The console says how many prompts there are, how many golds were
    cleaned, and how many rows were dropped or shortened.

    duplicates: drop or keep, for a data set that does not say it itself.
    Raises ValueError for what the user can correct: bad rows, golds that cannot be graded, no prompt short enough.
    """
    problems, notes, said = _usable_problems(dataset, config, console, dataset.duplicates or duplicates)
    # Schemas are long, so thousands of prompts take a while and get a progress bar.
    with _task(console, f"tokenizing {_label(dataset)}", len(problems), dataset.kind == "text_to_sql") as advance:
        built = build_prompts(problems, tokenizer, config.data, advance)
    said += [
        (built.num_dropped, f"longer than data.max_prompt_tokens={config.data.max_prompt_tokens} dropped"),
        (built.num_lost_rows, "without some sample rows, to fit"),
        (built.num_lost_names, "with a schema trimmed by relevance (tables or columns left out), to fit"),
    ]
    counts = "".join(f", {count} {what}" for count, what in said if count)
    line = f"data {_label(dataset)}: {len(built.prompts)} prompts{counts}"
    console.info(line)
    return LoadedPrompts(built.prompts, [line, *notes])


def _usable_problems(
    dataset: DatasetConfig, config: Config, console: Console, duplicates: str
) -> tuple[list[Problem], list[str], list[tuple[int, str]]]:
    """The problems with a gold to grade against, each question once where repetitions are dropped; notes for run.log;
    and what the console says, with its numbers."""
    loaded = load_problems(dataset, config.seed)
    if dataset.kind not in CHECKED_KINDS:
        return loaded, [], []
    long = dataset.kind == "text_to_sql" or len(loaded) > _MANY_GOLDS
    with _task(console, f"checking golds of {_label(dataset)}", len(loaded), long) as advance:
        checked = check_golds(loaded, dataset.kind, config.reward, advance)
    # Of a user's own reward only the user knows which golds are equal.
    same = None if config.reward.is_custom else partial(same_golds, reward=config.reward)
    repeats = find_repeats(checked.problems, same)
    bad = [*checked.bad, *repeats.contradictory]
    refuse_or_drop(bad, len(loaded), dataset, config.data)
    problems = repeats.problems
    what = "repeat another row"
    if duplicates == "drop":
        problems = [problem for problem in problems if problem.problem_id not in repeats.repeated]
        what = "repetitions of other rows dropped"
    decorations = ", ".join(name for name, _ in checked.cleaned.most_common(3))
    said = [
        (dataset.limit if len(loaded) == dataset.limit else 0, "rows read, which is its limit"),
        (checked.num_cleaned, f"golds cleaned ({decorations})"),
        (len(bad), f"dropped without a gold to grade against, the first {bad[0].location}" if bad else ""),
        (len(repeats.repeated), what),
    ]
    return problems, [f"data {_label(dataset)}: dropped {gold}" for gold in bad[:_MAX_NOTES]], said


def _warn_of_shared(trained: Sequence[Prompt], tested: Sequence[Prompt], dataset: DatasetConfig) -> list[str]:
    if not (count := num_shared(trained, tested)):
        return []
    line = (
        f"data {_label(dataset)}: {count} of {len(tested)} prompts are in data.train too, so its results do not show "
        "what the model learned for new questions; remove them from data.train"
    )
    logger.warning("%s", line)
    return [line]


def _label(dataset: DatasetConfig) -> str:
    return f"{dataset.name} ({dataset.split})"


@contextmanager
def _task(console: Console, description: str, total: int, wanted: bool) -> Iterator[Advance]:
    """A progress bar where the work is long."""
    if not wanted:
        yield lambda count=1, num_tokens=0, /: None
        return
    with console.task(description, total) as advance:
        yield advance


def _check_model(config: Config, model_dir: str) -> int | None:
    """Returns the size of the model's vocabulary. Raises InputError when sequences are longer than the model reads, or
    when it has no such attention kernel."""
    from transformers import AutoConfig

    from dphrl.learner.attention import check_kernel

    try:
        model_config = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.model.trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The first sentence says what is wrong; how to install transformers anew follows.
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        raise InputError(f"model.path: transformers cannot read the config.json of {model_dir}: {reason}") from error
    check_kernel(config.model, model_config)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_sequence_tokens > longest:
        raise InputError(
            f"data.max_prompt_tokens + rollout.max_tokens = {config.max_sequence_tokens} exceeds the model's "
            f"{longest} positions; lower one of them"
        )
    vocab_size: int | None = getattr(model_config.get_text_config(), "vocab_size", None)
    return vocab_size


def check_width(config: Config, model_dir: str) -> None:
    """Raises InputError when engines cannot split the model over rollout.tensor_parallel workers, with what vLLM asks
    for: every worker has as many heads, columns of the MLP and rows of the embedding as the others."""
    from transformers import AutoConfig

    width = config.rollout.tensor_parallel
    if width == 1:
        return
    found = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.model.trust_remote_code).get_text_config()
    if obstacle := _split_obstacle(found, width):
        heads = getattr(found, "num_attention_heads", None) or 1
        fitting = [str(i) for i in range(1, heads + 1) if not _split_obstacle(found, i)]
        raise InputError(
            f"rollout.tensor_parallel={width}: {model_dir} has {obstacle}; choose one of {', '.join(fitting)}"
        )


# vLLM makes the vocabulary a multiple of this before it splits it.
_VOCABULARY_MULTIPLE = 64
# A model of experts has other sizes for its MLPs, and vLLM may split it by whole experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _split_obstacle(found: Any, width: int) -> str | None:
    """What of the model's configuration does not divide into `width` equal parts; None if everything does."""
    heads = getattr(found, "num_attention_heads", None)
    if heads and heads % width:
        return f"{heads} attention heads, which do not divide by it"
    kv_heads = getattr(found, "num_key_value_heads", None)
    # Where there are fewer than workers, several workers have a copy of the same one.
    if kv_heads and max(kv_heads, width) % min(kv_heads, width):
        return f"{kv_heads} key-value heads, which neither divide by it nor divide it"
    columns = getattr(found, "intermediate_size", None)
    if columns and columns % width and not any(getattr(found, name, None) for name in _EXPERTS):
        return f"intermediate_size={columns}, which does not divide by it"
    vocabulary = getattr(found, "vocab_size", None)
    if vocabulary and (padded := -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE) % width:
        return f"a vocabulary of {vocabulary} tokens, {padded} with padding, which does not divide by it"
    return None


def _check_vocabulary(prompts: Sequence[Prompt], vocab_size: int | None, model_dir: str) -> None:
    """Raises InputError when a prompt has a token for which the model has no embedding, such as one that was added to
    the tokenizer alone."""
    largest = max((max(prompt.token_ids, default=0) for prompt in prompts), default=0)
    if vocab_size is not None and largest >= vocab_size:
        text = next(prompt.text for prompt in prompts if largest in prompt.token_ids)
        raise InputError(
            f"model.path: the tokenizer of {model_dir} writes token {largest} in the prompt {text[:40]!r}, but the "
            f"model knows {vocab_size} tokens (vocab_size in its config.json); take the tokenizer that it was trained "
            "with"
        )


def _warn_of_unasked_box(config: Config, prompts: Sequence[Prompt]) -> None:
    """Where prompts ask for another form, a reward that reads boxes alone gives 0 to every answer and says nothing."""
    if config.reward.name != "math_answer" or config.reward.extraction != "boxed":
        return
    if not any(r"\boxed" in prompt.text for prompt in prompts):
        logger.warning(
            r"No prompt of %s asks for \boxed{}, and reward.extraction: boxed reads nothing else; set "
            "reward.extraction: auto, or ask for the box in data.prompt_template",
            config.data.train.name,
        )
