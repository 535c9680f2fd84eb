"""Scores in the making: accumulated in memory, saved now and then, resumed to the identical result after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headwater.store import Store

SAVE_EVERY = 20.0  # seconds


class Job:
    """The scores of several methods, (rows, columns) each, and the place that the work has reached: a chunk, a pass, an example.

    The place moves only together with the scores it stands for, so that a saved job is always consistent.
    """

    def __init__(self, store: Store, key: str, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
        self.store, self.name = store, f"jobs/{key}"
        self.place = (0, 0, 0)
        self.scores = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.resumed = store.has(self.name)
        if self.resumed:
            saved = store.read(self.name)
            self.scores = [saved[f"scores.{m}"] for m in range(len(shapes))]
            self.place = place_of(store, key)
        self._saved = time.monotonic()

    def add(self, method: int, rows: slice, columns: np.ndarray, values: Tensor) -> None:
        """Add a block of scores."""
        self.scores[method][rows.start : rows.stop, torch.as_tensor(columns)] += values.to("cpu", self.scores[method].dtype)

    def reach(self, *place: int) -> None:
        """Everything before ``place`` (chunk, pass, example) is in the scores; save it if it is time."""
        self.place = (place[0], place[1], place[2])
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.store.write(self.name, {f"scores.{m}": t for m, t in enumerate(self.scores)}, {"place": list(self.place)})
        self._saved = time.monotonic()

    def finish(self) -> None:
        """The scores are handed out: the saved state has done its duty."""
        if self.store.has(self.name):
            self.store.delete(self.name)


def place_of(store: Store, key: str) -> tuple[int, int, int]:
    """The place that interrupted work has reached; (0, 0, 0) where none was kept."""
    name = f"jobs/{key}"
    return tuple(store.meta(name)["place"]) if store.has(name) else (0, 0, 0)


def guarded(job: Job, work: Callable[[], None]) -> None:
    """Run ``work``; whatever stops it (Ctrl-C, an error, a full disk elsewhere), keep what was computed."""
    try:
        work()
    except BaseException:
        if job.place != (0, 0, 0):
            job.save()
        raise
