"""The data that flows through the pipeline.

Axis legend, used as name suffixes on tensors everywhere in the package:

    B  rows of a micro-batch        T  token positions of a row (padded or packed)
    N  selected token positions     D  hidden size        V  vocabulary        K  samples per prompt

A *token-aligned* array holds at position t the value that belongs to token t itself; the log-probability of
token t comes from the logits at position t - 1. Log-probabilities are natural logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

JsonDict = dict[str, Any]
# Of one completion's tokens: log-probs, and entropies of the distributions they were drawn from, in nats.
TokenScores = tuple[tuple[float, ...], tuple[float, ...]]


class RewardStatus(StrEnum):
    """Why a completion got its score. `infrastructure_error` alone has none: the grader failed, not the model."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    RESOURCE_LIMIT = "resource_limit"
    INFRASTRUCTURE_ERROR = "infrastructure_error"


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The verdict on one completion: a typed status, its score, and a short human-readable detail.

    solution: the written solution in canonical form, to count different solutions; when "", the text counts.
    answer: the value of the solution in canonical form, to find the majority; when "", the solution counts.
    signal: what training uses in place of the score, for rewards that are finer than right or wrong; accuracy does
    not use it.
    trace: the traceback of a user's code that raised, for the log.
    """

    status: RewardStatus
    detail: str = ""
    solution: str = ""
    signal: float | None = None
    answer: str = ""
    trace: str = ""

    @property
    def score(self) -> float | None:
        """1 for `correct`, None for `infrastructure_error` (never a silent 0), else 0."""
        if self.status is RewardStatus.INFRASTRUCTURE_ERROR:
            return None
        return 1.0 if self.status is RewardStatus.CORRECT else 0.0

    @property
    def training_score(self) -> float | None:
        """The number that advantages are computed from: the signal if there is one, else the score."""
        return self.score if self.signal is None or self.score is None else self.signal


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenized once so that the engines and the learner see the same ids.

    token_ids: the chat-templated prompt, generation prompt included. `answer` is what the reward needs to
    grade a completion; only the reward interprets it.
    """

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    dataset: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response.

    token_ids: [num_tokens], the end-of-sequence token included when it was produced.
    logprobs: [num_tokens], of each token under the distribution it was sampled from (temperature applied).
    policy_version: the number of weight updates behind the policy that produced it; of several, the oldest one's.
    version_spans: where weights changed on the way, (policy_version, number of its tokens) from the first token to the
    last; else empty.
    """

    prompt_id: str
    sample_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def truncated(self) -> bool:
        """True when the completion ended at the token limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions of one prompt in one step, graded; `results[i]` belongs to `completions[i]`."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    results: tuple[RewardResult, ...]

    @property
    def num_correct(self) -> int:
        return sum(result.status is RewardStatus.CORRECT for result in self.results)

    @property
    def solutions(self) -> tuple[str, ...]:
        """What each completion wrote: the reward's solution, or else the text without differences in white space."""
        pairs = zip(self.completions, self.results, strict=True)
        return tuple(result.solution or " ".join(completion.text.split()) for completion, result in pairs)

    @property
    def answers(self) -> tuple[str, ...]:
        """The value that each completion votes for: the reward's answer, or else its solution."""
        return tuple(r.answer or solution for r, solution in zip(self.results, self.solutions, strict=True))

    @property
    def strategies(self) -> tuple[str, ...]:
        """How each completion solves the prompt: the reward's solution, or else its answer.

        Where a reward has no solutions, as that of mathematics, texts would all be different, so the answers count.
        """
        return tuple(r.solution or answer for r, answer in zip(self.results, self.answers, strict=True))

    @property
    def has_signal(self) -> bool:
        """Whether the training scores differ, before any length penalty; a group where they do not teaches nothing."""
        return len({r.training_score for r in self.results if r.training_score is not None}) > 1


@dataclass(frozen=True, slots=True)
class ReferenceSample:
    """A correct response of the initial policy to a near-perfect prompt.

    prompt_token_ids: [num_prompt_tokens]; token_ids, logprobs, entropies: [num_tokens].
    logprobs are those of the *learner's* own forward pass at initialisation, so that u = 1 at step 0. entropies, in
    nats, are of the distributions that the tokens were drawn from, by the same pass; () where nothing asked for them.
    """

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...] = ()


class RowKind(StrEnum):
    """Which term of the loss a row belongs to."""

    POLICY = "policy"  # an exploration row: clipped policy loss
    REFERENCE = "reference"  # a rehearsal row: eta x f-divergence


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One sequence the learner trains on, routed by its own `kind` whatever micro-batch it lands in.

    token_ids: prompt then completion. logprobs: [num completion tokens], the rollout engine's for a policy
    row, the reference policy's for a reference row.
    weight: the factor of each completion token of the row in its term's sum. It already holds the *global*
    denominator, so that no packing, micro-batching or number of ranks changes the loss.
    chosen: places in the completion, from 0, in order. In a policy row, of the tokens that the policy loss has chosen
    from the whole mini-batch, if it chooses any (`dphrl.algo.policy_losses.Choosing`); in a reference row, of those
    that count, the others having no weight (algorithm.rehearsal_tokens). None where nothing chooses.
    """

    kind: RowKind
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    logprobs: tuple[float, ...]
    weight: float
    advantage: float = 0.0
    policy_version: int = 0
    chosen: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The rows of one step: each mini-batch is one optimizer step over policy and reference rows together.

    policy_shares: of each mini-batch, the share of the policy rows' denominator that its own rows hold; less than 1
    where rows that add nothing were left out. () stands for 1 everywhere.
    """

    step: int
    policy_version: int
    minibatches: tuple[tuple[TrainRow, ...], ...]
    learning_rate: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    policy_shares: tuple[float, ...] = ()
