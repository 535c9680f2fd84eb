"""The path, taken literally: every split of a forest is a switch that is thrown at an exact rational place, and the forest is evaluated in between.

Nothing is shared with the rule under test: no intervals, no leaves' openers and closers, no rounding of places. Slow, for small forests.
"""

from fractions import Fraction
from itertools import combinations
from math import factorial

import numpy as np

from headwater.features.trees.forest import CATEGORY, DEFAULT_FIRST, NAN_IS_MISSING, ZERO_IS_MISSING

TIE = Fraction(1, 10**9)


def goes_left(forest, node, value):
    """The answer of a split, and whether it was given to a missing value or a category."""
    kind = int(forest.how[node])
    absent = np.isnan(value) and kind & (NAN_IS_MISSING | ZERO_IS_MISSING | CATEGORY)
    if absent or (kind & ZERO_IS_MISSING and abs(value) <= 1e-35):
        return bool(kind & DEFAULT_FIRST), True
    if kind & CATEGORY:
        level = int(value)
        words = forest.sets[int(forest.threshold[node])]
        return 0 <= level < 32 * len(words) and bool(int(words[level // 32]) >> (level % 32) & 1), True
    return (0.0 if np.isnan(value) else value) <= forest.cuts[node], False


def switches(forest, x, b, cuts):
    """[(place, feature, node)] of the splits whose answers at b and x differ, in order."""
    found = []
    for node in np.flatnonzero(forest.left >= 0):
        f = forest.feature[node]
        (at_b, odd_b), (at_x, odd_x) = goes_left(forest, node, b[f]), goes_left(forest, node, x[f])
        if at_b != at_x:
            start, end = (Fraction(0 if np.isnan(v) else float(v)) for v in (b[f], x[f]))
            place = Fraction(1, 2) if odd_b or odd_x else (Fraction(float(cuts[node])) - start) / (end - start)
            found.append((place, int(f), int(node)))
    return sorted(found)


def margins(forest, point, thrown=frozenset(), other=None):
    """Margins of the forest at ``point``, where the nodes in ``thrown`` answer for ``other``."""
    total = forest.base.copy()
    for t, root in enumerate(forest.roots):
        node = root
        while forest.left[node] >= 0:
            f = forest.feature[node]
            left, _ = goes_left(forest, node, (other if node in thrown else point)[f])
            node = forest.left[node] if left else forest.right[node]
        if forest.output is None:
            total += forest.value[node]
        else:
            total[forest.output[t]] += forest.value[node, 0]
    return total


def shapley(players, worth):
    """The Shapley value by its definition; worth: of a frozenset of players."""
    n, found = len(players), dict.fromkeys(players, 0.0)
    for j in players:
        for size in range(n):
            for group in combinations([k for k in players if k != j], size):
                share = factorial(size) * factorial(n - size - 1) / factorial(n)
                found[j] += share * (worth(frozenset(group) | {j}) - worth(frozenset(group)))
    return found


def along_the_path(forest, x, b, measure, cuts=None):
    """Attributions (p,) of ``measure(margins)``: the Shapley value of every place where something is thrown, in order."""
    phi, thrown = np.zeros(forest.features), frozenset()
    waiting = switches(forest, x, b, forest.cuts if cuts is None else cuts)
    while waiting:
        now = [waiting.pop(0)]
        while waiting and waiting[0][0] - now[-1][0] <= TIE:
            now.append(waiting.pop(0))
        nodes = {j: frozenset(node for _, f, node in now if f == j) for j in {f for _, f, _ in now}}
        before, seen = thrown, {}

        def worth(group, nodes=nodes, before=before, seen=seen):
            if group not in seen:
                seen[group] = measure(margins(forest, b, before.union(*(nodes[j] for j in group)), x))
            return seen[group]

        for j, gain in shapley(sorted(nodes), worth).items():
            phi[j] += gain
        thrown = thrown.union(*nodes.values())
    return phi


def interventional(forest, x, b, measure):
    """The baseline Shapley value (p,) of the whole model: features of x or of b, in all 2^p ways."""
    players = [j for j in range(forest.features) if x[j] != b[j]]
    seen = {}

    def worth(group):
        if group not in seen:
            seen[group] = measure(margins(forest, np.where(np.isin(np.arange(len(x)), list(group)), x, b)))
        return seen[group]

    phi = np.zeros(forest.features)
    for j, gain in shapley(players, worth).items():
        phi[j] = gain
    return phi
