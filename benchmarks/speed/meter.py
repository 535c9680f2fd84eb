"""What a contestant costs: CPU and wall seconds by stage, and peak memory, of its own process."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its ended children."""
    return time.process_time() + sum(os.times()[2:4])  # the clock of the process is finer than its ticks


def resident(peak: bool) -> float:
    """Resident memory of this process in MB: the largest since :func:`forget_peak`, or that of now."""
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak() -> None:
    """Let the peak begin at what is resident now (where the system can; elsewhere it stays that of the whole process)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists() and os.access(clear, os.W_OK):
        clear.write_text("5")


class Meter:
    """Made when libraries are imported and data and model are loaded: what is resident then is the baseline."""

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle  # waits for a device's queue before a clock is read
        self.stages: dict[str, list[float]] = {}
        self._inside: list[list[float]] = []  # time of inner stages, one entry for each stage that is open
        forget_peak()
        self.baseline = resident(peak=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book the time of the block under ``name``, without that of stages inside it."""
        self.settle()
        start = [cpu_seconds(), time.perf_counter()]
        self._inside.append([0.0, 0.0])
        try:
            yield
        finally:
            self.settle()
            spent = [cpu_seconds() - start[0], time.perf_counter() - start[1]]
            inner = self._inside.pop()
            booked = self.stages.setdefault(name, [0.0, 0.0])
            for k in range(2):
                booked[k] += spent[k] - inner[k]
                if self._inside:
                    self._inside[-1][k] += spent[k]

    def book(self, owner: Any, function: str, name: str | Callable[[int], str]) -> None:
        """Book every call of ``owner.function`` under ``name``, which may depend on the number of the call."""
        original, count = getattr(owner, function), [0]

        def timed(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            with self.stage(name if isinstance(name, str) else name(count[0])):
                return original(*args, **kwargs)

        setattr(owner, function, timed)

    def report(self) -> dict[str, Any]:
        return {
            "cpu": {name: spent[0] for name, spent in self.stages.items()},
            "wall": {name: spent[1] for name, spent in self.stages.items()},
            "peak": resident(peak=True),
            "above": resident(peak=True) - self.baseline,
        }
