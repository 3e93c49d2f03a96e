"""PromQL for the families that actors.prometheus exports: what the dashboard and the alert rules share."""

from __future__ import annotations

from actors.prometheus import FAMILIES, RAY_PREFIX, Family

BY_NAME = {family.name: family for family in FAMILIES}


def series(name: str, *matchers: str) -> str:
    """The selector of an exported metric, as Ray names it. Raises KeyError for a name that no run exports."""
    chosen = f"{{{', '.join(matchers)}}}" if matchers else ""
    return f"{RAY_PREFIX}{BY_NAME[name].name}{chosen}"


def newest(name: str, *matchers: str, by: str = "", before: str = "") -> str:
    """A gauge by its tags or by those in `by`, now or `before` ago.

    Ray's own labels (node, session, worker) are aggregated away: a resumed run has other values of them, but should
    continue the same line.
    """
    offset = f" offset {before}" if before else ""
    return f"max by ({by or tags_of(name)}) ({series(name, *matchers)}{offset})"


def counted(name: str, window: str, *matchers: str, by: str = "") -> str:
    """What a counter has counted in a window, by its tags or by those in `by`.

    Ray exports a counter from its first count on. increase() sees no rise in a series that begins at 1, so a run's
    first loss would be none: of a series that is younger than the window, the value itself is what was counted.
    """
    one = series(name, *matchers)
    return f"sum by ({by or tags_of(name)}) (({one} unless {one} offset {window}) or increase({one}[{window}]))"


def mean(name: str, window: str, *matchers: str, before: str = "") -> str:
    """A gauge's mean over a window by its tags; of one that ended `before` ago."""
    offset = f" offset {before}" if before else ""
    return f"max by ({tags_of(name)}) (avg_over_time({series(name, *matchers)}[{window}]{offset}))"


def quantile(family: Family, q: float, window: str, *matchers: str) -> str:
    """A quantile of a histogram's values in a window, by the family's tags."""
    chosen = f"{{{', '.join(matchers)}}}" if matchers else ""
    buckets = f"{RAY_PREFIX}{family.name}_bucket{chosen}"
    return f"histogram_quantile({q:g}, sum by ({tags_of(family.name)}, le) (rate({buckets}[{window}])))"


def tags_of(name: str) -> str:
    """The tags of a family, as PromQL lists them."""
    return ", ".join(BY_NAME[name].tags)
