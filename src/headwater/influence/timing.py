"""How long work will take, told before it is done: from calls that are warm, of what is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

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
