"""Which examples each retrained model gets to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headwater.errors import InputError


@dataclass(frozen=True, eq=False)
class Subsets:
    """A list of subsets of ``n`` training examples.

    Args:
        n: how many examples there are in all.
        members: for each subset the ids that are *kept*, sorted.
        kind: in words, how they were drawn (it goes to the report).
        seed: what they were drawn with, None where nothing was drawn.
    """

    n: int
    members: tuple[np.ndarray, ...]
    kind: str
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.members[index]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.members)

    def removed(self, index: int) -> np.ndarray:
        """The ids that subset ``index`` goes without."""
        return np.setdiff1d(np.arange(self.n), self.members[index], assume_unique=True)

    def mask(self) -> np.ndarray:
        """Booleans, shape (subsets, n): True where the example is kept."""
        mask = np.zeros((len(self), self.n), dtype=bool)
        for row, kept in zip(mask, self.members, strict=True):
            row[kept] = True
        return mask

    def sums(self, values: np.ndarray, removed: bool = False) -> np.ndarray:
        """Sums of ``values`` (queries, n) over each subset's kept (or removed) examples, shape (subsets, queries), in float64."""
        chosen = (self.removed(i) for i in range(len(self))) if removed else iter(self)
        return np.stack([values[:, ids].sum(axis=1, dtype=np.float64) for ids in chosen])

    def take(self, indices: Sequence[int] | np.ndarray) -> Subsets:
        """Only some of the subsets."""
        return Subsets(self.n, tuple(self.members[int(i)] for i in indices), self.kind, self.seed)

    def __repr__(self) -> str:
        return f"Subsets({len(self)} of {self.n} examples: {self.kind})"


def halves(n: int, count: int, seed: int = 0, *, fraction: float = 0.5) -> Subsets:
    """``count`` random subsets that keep ``fraction`` of ``n`` examples each: the standard material of the LDS (Park et al. 2023, alpha = 0.5).

    The first subsets do not depend on ``count``, so that a bank of 20 can later be grown to 50.

    Raises:
        InputError: where nothing would be kept or removed.

    >>> halves(6, 2, seed=0).mask().sum(axis=1)
    array([3, 3])
    """
    keep = round(fraction * n)
    if not 0 < keep < n:
        raise InputError(
            f"fraction={fraction} of {n} examples", "at least one example kept and one removed", "use a fraction between 0 and 1, such as 0.5"
        )
    drawn = tuple(np.sort(_generator(seed, i).choice(n, keep, replace=False)) for i in range(_positive(count)))
    return Subsets(n, drawn, f"random subsets keeping {keep} of {n}", seed)


def leave_out(n: int, count: int, size: int | float = 1, seed: int = 0) -> Subsets:
    """``count`` subsets that each go without ``size`` random examples (an int), or without a fraction ``size`` of them (a float below 1).

    With ``size=1`` no example is left out twice, so ``leave_out(n, n)`` is complete leave-one-out.

    Raises:
        InputError: ``size`` leaves nothing to train on, or ``count`` exceeds ``n`` with ``size=1``.

    >>> sorted(int(leave_out(4, 4).removed(i)[0]) for i in range(4))
    [0, 1, 2, 3]
    """
    out = max(1, round(size * n)) if isinstance(size, float) else int(size)
    if not 0 < out < n:
        raise InputError(
            f"size={size} of {n} examples", "at least one example removed and one kept", "give a number of examples, or a fraction below 1"
        )
    if out == 1 and _positive(count) > n:
        raise InputError(f"count={count} different examples to leave out, of {n}", f"count up to {n}", f"use leave_out({n}, {n})")
    if out == 1:
        groups = [_generator(seed, 0).permutation(n)[:count][i : i + 1] for i in range(count)]
    else:
        groups = [_generator(seed, i).choice(n, out, replace=False) for i in range(_positive(count))]
    return Subsets(n, removing(n, groups).members, f"leaving out {out} of {n}", seed)


def removing(n: int, groups: Iterable[Sequence[int] | np.ndarray]) -> Subsets:
    """Subsets that go without chosen examples, one subset for each group of ids (the strongest proponents of a query, say).

    Raises:
        InputError: an id outside 0 ... n-1, or a group that leaves nothing.

    >>> removing(5, [[4], [0, 1]]).members
    (array([0, 1, 2, 3]), array([2, 3, 4]))
    """
    members = []
    for group in groups:
        ids = np.unique(np.asarray(group, dtype=np.int64))
        if len(ids) == 0 or len(ids) >= n or ids[0] < 0 or ids[-1] >= n:
            raise InputError(
                f"the group {np.asarray(group).tolist()[:8]} of examples to remove",
                f"one or more ids between 0 and {n - 1}, not all of them",
                "check the ids",
            )
        members.append(np.setdiff1d(np.arange(n), ids, assume_unique=True))
    _positive(len(members))
    return Subsets(n, tuple(members), "without chosen examples")


def _generator(seed: int, index: int) -> np.random.Generator:
    """One stream per subset, so that a longer list begins like a shorter one."""
    return np.random.default_rng([seed, index])


def _positive(count: int) -> int:
    if count < 1:
        raise InputError(f"{count} subsets", "at least one", "ask for count=50 or so")
    return count
