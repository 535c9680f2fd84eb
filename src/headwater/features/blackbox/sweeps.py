"""Path sweeps: attributions of a function that may jump, from values alone.

The straight path is cut in segments. Within each, coordinates move one at a time from its start to its end, in a random order and then in
the reverse of it, and each is credited with the change it brings. All changes of an order add up to f(x) - f(b) exactly, so completeness
proves nothing here: the spread over orders tells the error. One segment is baseline Shapley by permutations (Castro, Gómez, Tejada 2009);
many approach Integrated Gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import InputError

Array = np.ndarray
Values = Callable[[Array, Array], Array]
"""(points (m, F), which example each belongs to (m,)) -> (m,)."""


@dataclass(frozen=True)
class Sweeps:
    """Move coordinates one at a time, ``segments`` pieces of the path, ``orders`` random orders (each with its reverse).

    Costs ``segments (1 + 2 orders (F - 1)) + 1`` calls for an example with F features that differ from the baseline.

    >>> Sweeps(segments=4, orders=2).calls(10)
    149
    """

    segments: int = 16
    orders: int = 4

    def __post_init__(self) -> None:
        if self.segments < 1 or self.orders < 1:
            raise InputError(f"{self}", "at least one segment and one order", "Sweeps(segments=16, orders=4)")

    def calls(self, features: int) -> int:
        """For one example with so many features that differ from the baseline."""
        return self.segments * (1 + 2 * self.orders * max(0, features - 1)) + 1


def swept(values: Values, x: Array, b: Array, how: Sweeps, seed: int, chunk: int, tell: Callable[[int], Any]) -> Array:
    """Attributions (orders, n, F) of the paths from b to x, both (n, F). ``tell(count)`` is called as examples pass a segment."""
    d, n = x - b, len(x)
    moved = np.flatnonzero((d != 0).any(0))
    found = np.zeros((how.orders, *x.shape))
    corners = [b + k / how.segments * d for k in range(how.segments)] + [x]
    at = np.stack([values(corner, np.arange(n)) for corner in corners])
    tell(len(at) * n)
    if not len(moved):
        return found
    chance = [np.random.default_rng([seed, order]) for order in range(how.orders)]
    for k in range(how.segments):
        for order, numbers in enumerate(chance):
            there = numbers.permutation(x.shape[1])  # over all columns, so that an example's answer does not depend on its neighbours
            there = there[np.isin(there, moved)]
            for sequence in (there, there[::-1]):
                inner = _climb(values, corners[k], corners[k + 1], sequence, chunk)
                steps = np.diff(np.concatenate([at[k][:, None], inner, at[k + 1][:, None]], 1), axis=1)
                found[order][:, sequence] += steps / 2
            tell(2 * (len(there) - 1) * n)
    return np.where(d == 0, 0.0, found)


def _climb(values: Values, low: Array, high: Array, sequence: Array, chunk: int) -> Array:
    """f (n, F' - 1) after the first, the second, ... coordinate of the sequence has moved, without the last."""
    n, count = len(low), len(sequence) - 1
    place = np.full(low.shape[1], -1)  # a column that nobody moves stands at its end already
    place[sequence] = np.arange(count + 1)
    out = np.empty((n, count))
    pairs = np.arange(n * count)
    for part in np.array_split(pairs, max(1, -(-len(pairs) // chunk))) if len(pairs) else ():
        row, done = np.divmod(part, count)
        points = np.where(place <= done[:, None], high[row], low[row])
        out.ravel()[part] = values(points, row)
    return out
