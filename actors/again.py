"""Work of an actor that may be lost: another actor does it again, a bounded number of times."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from actors import last_words

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Again:
    """How lost work is told of and repeated.

    who: whose work it is. then: what happens next, for the warning. event: its name in events.jsonl, facts: what is
    known there besides the reason. max_losses: how often it may be lost; a cause that stays is no reason to go on.
    in_vain: what the error says of these attempts.
    """

    who: str
    then: str
    event: str
    max_losses: int
    in_vain: str
    facts: Mapping[str, int] = field(default_factory=dict)

    async def until_done(self, work: Callable[[int], Awaitable[T]]) -> T:
        """The result of `work`, which gets how often it was lost before: then it is to start another actor, and that
        start may be lost as well.

        Raises RuntimeError after one loss more than max_losses, and what `work` raises that is no loss.
        """
        for num_lost in itertools.count():
            try:
                return await work(num_lost)
            except Exception as error:
                if not last_words.is_loss(error):
                    raise
                last_words.keep(self.who, error)
                told = last_words.last_words(self.who, error)
                if num_lost == self.max_losses:
                    raise RuntimeError(f"{told}; {self.in_vain}") from error
                facts = {**self.facts, "reason": told}
                log.warning("%s; %s", told, self.then, extra={"event": self.event, "facts": facts})
        raise AssertionError("the loop returns or raises")
