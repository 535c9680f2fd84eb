"""Scores kept apart along an axis: what each checkpoint, or each timestep, contributed to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from headwater.errors import InputError


@dataclass(frozen=True, eq=False)
class Slices:
    """``values`` (labels, queries, train), whose sum over ``labels`` is the scores; ``axis``: what the labels are.

    >>> slices = Slices("timestep", (10, 500), np.ones((2, 1, 3)))
    >>> slices[500]
    array([[1., 1., 1.]])
    """

    axis: str
    labels: tuple[float, ...]
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[float, np.ndarray]]:
        """Label by label: (label, scores (queries, train))."""
        return zip(self.labels, self.values, strict=True)

    def __getitem__(self, label: float) -> np.ndarray:
        """The scores (queries, train) of one label. Raises InputError."""
        if label not in self.labels:
            raise InputError(f"{self.axis} {label}", f"one of {list(self.labels)}", f"scores.by({self.axis!r}).labels tells them")
        return self.values[self.labels.index(label)]

    def __repr__(self) -> str:
        return f"Slices(by {self.axis}: {list(self.labels)}; {self.values.shape[1]} queries x {self.values.shape[2]:,} training examples)"

    def at(self, queries: np.ndarray) -> Slices:
        """Those of some of the queries."""
        return replace(self, values=self.values[:, queries])

    def group(self, number: np.ndarray, count: int) -> Slices:
        """Sums over training examples of the same number."""
        values = np.zeros((*self.values.shape[:2], count))
        np.add.at(values.transpose(2, 0, 1), number, self.values.transpose(2, 0, 1).astype(float))
        return replace(self, values=values)
