"""Members' contributions as one answer with a standard error, by the method's own rule.

A rule f takes the mean of each part: the mean of scores for most methods, ``mean(kernel) * mean(weight)`` for TRAK. Errors are the
jackknife's: with ``t = f(mean over all)`` and ``t_(-u)`` the same without unit u, the pseudo-values ``p_u = U t - (U - 1) t_(-u)``
vary as single units would, and ``stderr = sd(p) / sqrt(U)`` (Efron and Stein 1981). For means p_u is the unit's own score, so that the
error is the ordinary ``sd / sqrt(U)``. Units are what varies independently: models where there are several, else a model's members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from headwater.result.spread import Spread

Arrays = dict[str, np.ndarray]
Read = Callable[[], Arrays]
"""Gives a member's arrays: read when they are needed, so that few are in memory at a time."""
Rule = Callable[[Sequence[Arrays]], np.ndarray]


def combine(rule: Rule, models: Sequence[Sequence[Read]]) -> tuple[np.ndarray, np.ndarray | None, Spread]:
    """Values (queries, train), their standard errors in that shape (None for a single member), and how much members differ.

    ``models``: the members of each independent model, as many for each, in an order that does not depend on how they were given.
    Sums are made in float64, the answer has the members' own precision.
    """
    per_model = len(models[0])
    assert all(len(members) == per_model for members in models), "an unbalanced ensemble"
    first = models[0][0]()
    if len(models) * per_model == 1:
        return rule([first]), None, Spread(1, 1, None, None)
    sums = [_summed(members) for members in models]
    total, count = _added(sums), len(models) * per_model
    theta = rule([_mean(total, count)])
    between = within = error = None
    if per_model > 1:
        each = [_variance(_pseudo(rule, (read() for read in members), 1, total, count, theta), per_model) for members in models]
        within, error = float(np.mean([v.mean() for v in each])), each[0]
    if len(models) > 1:
        error = _variance(_pseudo(rule, iter(sums), per_model, total, count, theta), len(models))
        between = max(0.0, float(error.mean()) - (within or 0.0) / per_model)
    assert error is not None
    kind, units = np.result_type(*first.values()), len(models) if len(models) > 1 else per_model
    return theta.astype(kind), np.sqrt(error / units).astype(kind), Spread(len(models), per_model, between, within)


def _summed(members: Sequence[Read]) -> Arrays:
    """The sum of each part over members."""
    total: Arrays = {}
    for read in members:
        for name, array in read().items():
            total[name] = total[name] + array if name in total else array.astype(np.float64)
    return total


def _added(sums: Sequence[Arrays]) -> Arrays:
    return {name: np.sum([s[name] for s in sums], axis=0) for name in sums[0]}


def _mean(total: Arrays, count: int) -> Arrays:
    return {name: array / count for name, array in total.items()}


def _pseudo(rule: Rule, units: Iterable[Arrays], size: int, total: Arrays, count: int, theta: np.ndarray) -> Iterator[np.ndarray]:
    """The pseudo-value of each unit, less ``theta``: a unit is the sum of ``size`` of the ``count`` members."""
    others = count - size
    for unit in units:
        without = rule([_mean({name: total[name] - unit[name] for name in total}, others)])
        yield (theta - without) * (others / size)


def _variance(deviations: Iterator[np.ndarray], count: int) -> np.ndarray:
    """The variance of ``count`` deviations from about their mean, entry by entry."""
    first = next(deviations)
    total, square = first.copy(), first**2
    for deviation in deviations:
        total += deviation
        square += deviation**2
    return np.maximum(0.0, square - total**2 / count) / (count - 1)
