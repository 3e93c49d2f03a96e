"""Every protocol in one process, for a debugger: transformers generates, plain torch learns, nothing is remote.

This mode is slow and exact. The rollouts sample from the same module that the learner trains, so a breakpoint works
anywhere, and the gap between engine and learner is zero by construction.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dphrl.background import in_background
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.data.schedule import completion_seed
from dphrl.learner.attention import check_rows_apart
from dphrl.learner.digest import digest_of, optimizer_tensors
from dphrl.learner.export import check_exportable
from dphrl.learner.loading import load_policy, load_reference
from dphrl.learner.lora import (
    adapter_weights,
    add_adapters,
    has_adapters,
    plain_weights,
)
from dphrl.learner.prefixes import fit_to_model
from dphrl.learner.snapshot import Snapshot
from dphrl.learner.state import MASTER, STATE_FOLDER, StoredState
from dphrl.learner.torch_engine import TorchEngine
from dphrl.learner.update import UpdateSettings, measure_sequences, run_update
from dphrl.learner.utilization import compute_of, device_name, utilization
from dphrl.priority import PriorityLock
from dphrl.processors import whole_cpus
from dphrl.protocols import OnGraded, Parts, ReferenceStore, WeightChunk, WeightPublisher, WholeReference
from dphrl.reference.stage import fill_reference
from dphrl.rewards.base import build_grader, graded_pair
from dphrl.rewards.thinking import decoder
from dphrl.tracking.sinks import Sink
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, TokenScores, TrainBatch


class InlineLearner:
    """`protocols.Learner` in this process."""

    def __init__(self, config: Config, model_dir: str) -> None:
        if config.model.dtype == "bfloat16":
            raise InputError(
                "model.dtype: bfloat16 has no float32 master weights in inline mode, so small updates would be lost; "
                "set model.dtype=float32, or run without --inline"
            )
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # By itself torch takes a thread for each processor that it sees, whatever share of them a container may use.
        torch.set_num_threads(min(torch.get_num_threads(), whole_cpus()))
        self.policy = load_policy(
            model_dir,
            config.model,
            temperature=config.rollout.temperature,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        ).to(device)
        add_adapters(self.policy.lm, config.model.lora, config.seed)
        self.layout = "inline" if config.model.lora is None else f"inline, {config.model.lora.layout}"
        reference = load_reference(model_dir, config)
        self.engine = TorchEngine(self.policy, config, None if reference is None else reference.to(device))
        settings = replace(UpdateSettings.from_config(config), ranks_per_row=1)  # this process is the only rank
        sharing = fit_to_model(settings.sharing, self.policy.lm, self.engine.forward, self.engine.device)
        self.settings = replace(settings, sharing=sharing)
        if self.settings.packed:
            check_rows_apart(self.engine.forward, self.engine.device)
        self._compute = compute_of(self.policy.lm, device_name(), self.dtype, 1)
        self.config, self.model_dir = config, model_dir
        check_exportable(self.policy.lm, model_dir)
        self._policy_version = 0

    last_update = None  # nothing is sent that it could be compared with
    dtype = "float32"

    @property
    def policy_version(self) -> int:
        return self._policy_version

    async def score(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, ...]]:
        return [logprobs for logprobs, _ in await self.measure(sequences)]

    async def measure(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[TokenScores]:
        measured = measure_sequences(sequences, self.engine, self.settings) if sequences else {}
        return [measured[i] for i in range(len(sequences))]

    async def update(self, batch: TrainBatch) -> dict[str, float]:
        began = time.perf_counter()
        metrics = run_update(batch, self.engine, self.settings)
        metrics |= utilization(self._compute, batch, time.perf_counter() - began)
        self._policy_version += 1
        return metrics

    async def publish(self) -> AsyncIterator[WeightChunk]:
        chunks: Sequence[WeightChunk] = ()  # the rollouts sample from this very module
        for chunk in chunks:
            yield chunk

    async def sent(self) -> None:
        return None

    async def copy_state(self) -> int:
        pieces, lm = [piece.copied() for piece in self.engine.pieces()], self.policy.lm
        if has_adapters(lm):
            weights = {weight.name: weight.value().detach().to("cpu", copy=True) for weight in plain_weights(lm)}
            adapters = {name: parameter.detach().to("cpu", copy=True) for name, parameter in adapter_weights(lm)}
            self._snapshot = Snapshot(pieces, weights, adapters)
        else:
            masters = {piece.name: piece.tensors[MASTER] for piece in pieces}
            weights = {weight.name: masters[weight.name].view_as(weight.base) for weight in plain_weights(lm)}
            self._snapshot = Snapshot(pieces, weights)
        return self._snapshot.num_bytes

    async def write_state(self, folder: Path) -> dict[str, str]:
        return await in_background(self._snapshot.write_state, folder)

    async def write_export(self, folder: Path) -> None:
        await in_background(self._snapshot.write_export, folder, self.policy.lm, self.model_dir)

    async def load(self, folder: Path, policy_version: int, *, weights_only: bool = False) -> None:
        with StoredState(folder / STATE_FOLDER) as stored:
            self.engine.restore(stored, weights_only=weights_only)
        self._policy_version = policy_version

    async def digest(self) -> str:
        return digest_of([*self.policy.named_parameters(), *optimizer_tensors(self.engine.optimizer.state.values())])


class InlineRollouts:
    """`protocols.RolloutPool` by transformers' generate on the learner's own module."""

    def __init__(self, learner: InlineLearner, tokenizer: Any, config: Config) -> None:
        self.learner, self.tokenizer, self.config = learner, tokenizer, config
        self._decode = decoder(tokenizer, config.reward.thinking_marks)
        lm = cast(Any, learner.policy.lm)
        self._ends = _end_token_ids(lm, tokenizer)
        # The mask leaves it out, so any token that has an embedding will do.
        num_embeddings = lm.get_input_embeddings().weight.shape[0]
        usable = (i for i in (tokenizer.pad_token_id, *self._ends) if i is not None and i < num_embeddings)
        self._pad = next(usable, 0)
        # transformers fills what a given generation configuration leaves open from the model's own, such as a penalty
        # on repetitions. Samples would then not follow the distribution that is trained, nor those of the engines.
        lm.generation_config = GenerationConfig()
        self._turns = PriorityLock()
        self._version: int | None = None  # like any engine, it serves nothing before its first refit

    async def refit(self, learner: WeightPublisher) -> Mapping[str, float]:
        assert learner is self.learner, "inline rollouts share the learner's module"
        self._version = learner.policy_version
        return {"sync/logprob_gap_mean": 0.0, "sync/logprob_gap_max": 0.0}

    async def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, greedy: bool = False, priority: int = 0
    ) -> AsyncGenerator[Sequence[Completion], None]:
        assert self._version is not None, "an engine serves nothing before it is refit"
        # Calls wait for each other, because batches of several in turn would end them all late.
        async with self._turns.taken(priority):
            async for completions in self._generate_batches(prompts, num_samples, seed, greedy):
                yield completions

    async def _generate_batches(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int, greedy: bool
    ) -> AsyncIterator[list[Completion]]:
        jobs = [(prompt, i) for prompt in prompts for i in range(num_samples)]
        size = self.config.rollout.max_concurrent_sequences
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            seeds = None if greedy else [completion_seed(seed, prompt.prompt_id, i) for prompt, i in batch]
            with torch.no_grad():
                completions = await self._generate_batch(batch, seeds)
            yield completions

    def drain_metrics(self) -> Mapping[str, float]:
        return {}

    async def _generate_batch(
        self, jobs: Sequence[tuple[Prompt, int]], seeds: Sequence[int] | None
    ) -> list[Completion]:
        """seeds: one for each job; None makes every completion greedy."""
        assert self._version is not None
        lm = cast(Any, self.learner.policy.lm)
        ends = self._ends
        pad = self._pad
        width = max(len(prompt.token_ids) for prompt, _ in jobs)
        input_ids = torch.full((len(jobs), width), pad, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, (prompt, _) in enumerate(jobs):
            input_ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, width - len(prompt.token_ids) :] = 1
        output = lm.generate(
            input_ids=input_ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            generation_config=GenerationConfig(
                max_new_tokens=self.config.rollout.max_tokens,
                eos_token_id=ends or None,
                pad_token_id=pad,
                # `SeededChoice` samples, and leaves generate no choice.
                do_sample=False,
            ),
            logits_processor=LogitsProcessorList([] if seeds is None else [SeededChoice(seeds, self.config)]),
        )
        sampled = [_cut_after_end(row, ends) for row in output[:, width:].tolist()]
        logprobs = await self.learner.score(
            [((*p.token_ids, *ids), len(p.token_ids)) for (p, _), ids in zip(jobs, sampled, strict=True)]
        )
        return [
            Completion(
                prompt.prompt_id,
                sample_index,
                tuple(ids),
                self._decode(ids),
                row_logprobs,
                "stop" if ids[-1] in ends else "length",
                self._version,
            )
            for (prompt, sample_index), ids, row_logprobs in zip(jobs, sampled, logprobs, strict=True)
        ]


class SeededChoice(LogitsProcessor):  # type: ignore[misc]
    """Samples each row's next token with random numbers of the row's own seed, and leaves that token alone possible.

    generate would draw for all rows from one generator, and a completion would depend on its place in the batch.
    """

    def __init__(self, seeds: Sequence[int], config: Config) -> None:
        """seeds: one for each row of the batch."""
        self._temperature = config.rollout.temperature
        # One number for each token suffices: it falls into the share of the distribution that one token has.
        size = config.rollout.max_tokens
        draws = [torch.rand(size, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        self._draws = iter(torch.stack(draws, dim=1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = (scores / self._temperature).softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        drawn = next(self._draws).to(scores.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _end_token_ids(lm: Any, tokenizer: Any) -> list[int]:
    declared = lm.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))


def _cut_after_end(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(token_ids):
        if token in ends:
            return token_ids[: i + 1]
    return token_ids


class InlineRewards:
    """`protocols.RewardPool` by direct calls."""

    def __init__(self, config: Config) -> None:
        self.config = config.reward
        self.grader = build_grader(config.reward)
        self.num_retries = config.reward.num_retries
        self._lock = threading.Lock()
        self._latencies_s: list[float] = []

    async def grade(self, items: Sequence[tuple[Prompt, Completion]]) -> list[RewardResult]:
        started = time.perf_counter()
        # A thread does the grading: a user's coroutines need their own event loop, and this loop should not block.
        pairs = [graded_pair(prompt, completion, self.config) for prompt, completion in items]
        results = await asyncio.to_thread(self._grade, pairs)
        self._latencies_s += [time.perf_counter() - started] * len(items)
        return results

    def drain_metrics(self) -> Mapping[str, float]:
        latencies_s, self._latencies_s = self._latencies_s, []
        if not latencies_s:
            return {}
        return {
            "reward/latency_mean_s": sum(latencies_s) / len(latencies_s),
            "reward/latency_max_s": max(latencies_s),
        }

    def _grade(self, pairs: Sequence[tuple[str, str]]) -> list[RewardResult]:
        with self._lock:
            results = self.grader.grade(pairs)
            for _ in range(self.num_retries):
                failed = [i for i, result in enumerate(results) if result.status is RewardStatus.INFRASTRUCTURE_ERROR]
                if not failed:
                    break
                for i, result in zip(failed, self.grader.grade([pairs[i] for i in failed]), strict=True):
                    results[i] = result
        return results


class InlineSystem:
    """`protocols.System` in this process. As a context it ends the reward's child process."""

    def __init__(self, config: Config, model_dir: str, tokenizer: Any) -> None:
        self.config = config
        self.learner = InlineLearner(config, model_dir)
        self.rewards = InlineRewards(config)
        self.parts = Parts(self.learner, InlineRollouts(self.learner, tokenizer, config), self.rewards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.rewards.grader.close()

    def sinks(self) -> list[Sink]:
        """An empty list: nothing here exports metrics."""
        return []

    async def start(self, on_ready: Callable[[str], None]) -> Parts:
        on_ready(f"inline: everything in this process, on {self.learner.engine.device}")
        return self.parts

    @asynccontextmanager
    async def listen(self, folder: Path) -> AsyncIterator[None]:
        yield  # one process stays one process

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: OnGraded
    ) -> tuple[ReferenceStore, Mapping[str, float]]:
        rollouts, rewards = self.parts.rollouts, self.parts.rewards
        buffer = await fill_reference(
            self.config, prompts, rollouts, rewards, self.learner, identity, folder, on_graded
        )
        return buffer, buffer.counts()

    async def adopt_reference(self, buffer: WholeReference, folder: Path) -> ReferenceStore:
        return buffer

    async def restart_learner(self, on_ready: Callable[[str], None]) -> None:
        raise AssertionError("a learner of this process is never lost alone")

    def renew_learner(self, config: Config) -> bool:
        return False  # there is no engine to keep
