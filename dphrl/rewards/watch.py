"""Tells a reward that fails everywhere from one that fails on some completions, so that a run stops with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dphrl.types import Completion, Prompt, RewardResult, RolloutGroup

# A reward that has failed on so many prompts, before it gave any verdict, fails everywhere. It takes more than a
# handful, because the first prompts of a file may have a fault in common.
MAX_FAILED_PROMPTS = 32
FAILURES_TOLD = 3
# Characters of the completion and of its gold answer in the description of a failure.
TEXT_CHARS = 500


class RewardFailedError(RuntimeError):
    """The reward gives no verdict. The notes, which a traceback prints, are the first failures in full."""


class RewardWatch:
    """Sees every verdict of one stage of a run. A reward that gave a verdict in the stage is known to work.

    failures: the first FAILURES_TOLD ones of the stage, described in full.
    """

    def __init__(self, reward: str) -> None:
        """reward: the setting reward.name."""
        self._reward = reward
        self._failed: list[tuple[Prompt, RewardResult]] = []
        self.works = False
        self.failures: list[str] = []

    def see(self, prompt: Prompt, completion: Completion, result: RewardResult) -> None:
        """Raises RewardFailedError when the reward failed on MAX_FAILED_PROMPTS prompts and gave no verdict yet."""
        if result.score is not None:
            self.works = True
            self._failed.clear()
            return
        if len(self.failures) < FAILURES_TOLD:
            self.failures.append(_describe(prompt, completion, result))
        if not self.works:
            self._failed.append((prompt, result))
            if len({prompt.prompt_id for prompt, _ in self._failed}) >= MAX_FAILED_PROMPTS:
                raise self._error(self._failed)

    def failure_of(self, groups: Sequence[RolloutGroup]) -> RewardFailedError | None:
        """The error for a collection in which no completion has a verdict; None if one has, or if there is none."""
        graded = [(group.prompt, result) for group in groups for result in group.results]
        if not graded or any(result.score is not None for _, result in graded):
            return None
        return self._error(graded)

    def check(self, groups: Sequence[RolloutGroup]) -> None:
        """Raises RewardFailedError when no completion of `groups` has a verdict.

        It does not for a few prompts of a reward that is known to work: the fault may be theirs.
        """
        failure = self.failure_of(groups)
        if failure is not None and (not self.works or len(groups) >= MAX_FAILED_PROMPTS):
            raise failure

    def _error(self, failed: Sequence[tuple[Prompt, RewardResult]]) -> RewardFailedError:
        details = Counter(" ".join(result.detail.split()) for _, result in failed)
        (detail, count), *others = details.most_common()
        said = f"{detail} ({count} of them)" if others else detail
        num_prompts = len({prompt.prompt_id for prompt, _ in failed})
        error = RewardFailedError(
            f"reward.name={self._reward!r} gave no verdict on any of {_count(len(failed), 'completion')} of "
            f"{_count(num_prompts, 'prompt')}: {said}; mend the reward or what it needs (run.log has the first "
            "failures in full)"
        )
        for note in self.failures:
            error.add_note(note)
        return error


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _describe(prompt: Prompt, completion: Completion, result: RewardResult) -> str:
    lines = [
        f"The reward failed on prompt {prompt.prompt_id}: {result.detail}",
        f"  the completion begins: {completion.text[:TEXT_CHARS]!r}",
        f"  the answer: {prompt.answer[:TEXT_CHARS]!r}",
        *(f"  {line}" for line in result.trace.splitlines()),
    ]
    return "\n".join(lines)
