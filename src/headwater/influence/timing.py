"""How long work will take, told before it is done: from calls that are warm, of what is left."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import torch

CALLS = 3
"""So many calls are timed at most."""
ENOUGH = 0.5
"""Seconds: no further call is begun once those that count have taken so long."""


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of one call of ``work`` among many: the median of a few, after one that is not counted.

    The first call pays for what is made once: imports, memory from the system, the choice of kernels. It may take ten times as long.
    """
    work()
    taken: list[float] = []
    while len(taken) < CALLS and sum(taken) < ENOUGH:
        started = _now()
        work()
        taken.append(_now() - started)
    return statistics.median(taken)


def _now() -> float:
    """The clock once the GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Pieces:
    """What is left of work in many pieces, from those that have ended. The first of each worker and kind are cold, and forgotten as soon
    as there are others.

    Args:
        kinds: of every piece; pieces of a kind take about as long as each other.
        at_once: how many are worked at together.

    >>> pieces = Pieces(["model"] * 5)
    >>> pieces.ended("model", 8.0), pieces.left  # it has news
    (True, 32.0)
    >>> pieces.ended("model", 1.0), pieces.left
    (True, 3.0)
    >>> pieces.ended("model", 1.1), round(pieces.left, 2)  # it has none
    (False, 2.1)
    """

    NEWS = 1.25
    """Estimates that differ by this factor are worth telling."""

    def __init__(self, kinds: Iterable[Hashable], at_once: int = 1) -> None:
        self.waiting, self.at_once = Counter(kinds), at_once
        self._taken: dict[Hashable, list[float]] = {}
        self._told: dict[Hashable, float] = {}

    def ended(self, kind: Hashable, seconds: float | None) -> bool:
        """Count a piece, which took so long (None: it failed, and tells nothing); whether :attr:`left` is other than was thought."""
        self.waiting[kind] -= 1
        if seconds is None:
            return False
        self._taken.setdefault(kind, []).append(seconds)
        now, before = self._seconds(self._pace()), self._seconds(self._told)
        if now <= 0 or (self._told and max(now, before) <= self.NEWS * min(now, before)):
            return False
        self._told = self._pace()
        return True

    @property
    def left(self) -> float:
        """Seconds for all that has not ended."""
        return self._seconds(self._pace())

    @property
    def warm(self) -> bool:
        """Whether what is told comes from pieces that were not the first."""
        return any(len(taken) > self.at_once for taken in self._taken.values())

    def _pace(self) -> dict[Hashable, float]:
        return {kind: statistics.median(taken[self.at_once :] or taken) for kind, taken in self._taken.items()}

    def _seconds(self, pace: dict[Hashable, float]) -> float:
        """A kind of which none has ended is taken for the slowest of the others."""
        slowest = max(pace.values(), default=0.0)
        return sum(-(-count // self.at_once) * pace.get(kind, slowest) for kind, count in self.waiting.items())
