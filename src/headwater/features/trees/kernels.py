"""The compiled loops over trees. Imports numba, so only functions that walk import this module.

A packed node is 16 bytes: ``c`` the threshold (at a leaf its value), ``f`` the feature (-1 at a leaf), ``k`` the first of its two children,
which lie side by side. A value goes to the first child if ``value <= c``. Where data hold missing values, or splits ask for categories
(``general``), ``kinds`` says how each node decides; see :mod:`headwater.features.trees.forest`.

A place on the path is ``GRID + a``, from GRID at the baseline to GRID + 1 at the input: in float64 such numbers are 2^-32 apart, so adding
GRID rounds a to that grid, and crossings that are equal up to round-off are equal there. Rounding keeps the order, and only the order counts.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32

DEFAULT_FIRST, ZERO_IS_MISSING, NAN_IS_MISSING, CATEGORY = 1, 2, 4, 8
TINY = 1.0000000180025095e-35  # LightGBM's kZeroThreshold, a float32
GRID = 1.5 * 2.0**20


@njit(nogil=True, cache=True, inline="always")
def _is_missing(v: float, kind: int) -> bool:
    if v != v:
        return (kind & (ZERO_IS_MISSING | NAN_IS_MISSING | CATEGORY)) != 0
    return (kind & ZERO_IS_MISSING) != 0 and -TINY <= v <= TINY


@njit(nogil=True, cache=True, inline="always")
def _goes_first(v: float, c: float, kind: int, starts: np.ndarray, words: np.ndarray) -> bool:
    if _is_missing(v, kind):
        return (kind & DEFAULT_FIRST) != 0
    if kind & CATEGORY:
        if v <= -1.0 or v >= 2147483648.0:
            return False
        level = np.int64(v)
        word = starts[np.int64(c)] + (level >> 5)
        return word < starts[np.int64(c) + 1] and ((words[word] >> uint32(level & 31)) & uint32(1)) != 0
    if v != v:  # a library that reads NaN as zero
        v = 0.0
    return v <= c


@njit(nogil=True, cache=True)
def leaves(nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, roots: np.ndarray, x: np.ndarray, general: bool, found: np.ndarray) -> None:
    """``found`` (n, trees): the packed place of the leaf that each row of ``x`` (n, p) falls into."""
    for t in range(len(roots)):
        for i in range(len(x)):
            node = roots[t]
            f = nodes[node].f
            while f >= 0:
                if general:
                    first = _goes_first(x[i, f], nodes[node].c, kinds[node], starts, words)
                else:
                    first = x[i, f] <= nodes[node].c
                node = nodes[node].k + (0 if first else 1)
                f = nodes[node].f
            found[i, t] = node


@njit(nogil=True, cache=True)
def _share(n: int, m: int) -> float:
    """``(n-1)! m! / (n+m)!``: what each of n players gets that must have moved, where m others must not have."""
    share = 1.0 / n
    for k in range(1, m + 1):
        share *= k / (n + k)
    return share


@njit(nogil=True, cache=True)
def _corner(sides: np.ndarray, places: np.ndarray, depth: int, s: float, e: float, opened: int, closed: int, v: float, phi: np.ndarray) -> None:
    """A leaf whose box several features open at s, or close at e, or which is occupied at one point only: the Shapley value of the local game."""
    if s == e:
        gain, loss = v * _share(opened, closed), v * _share(closed, opened)
    else:
        gain, loss = v / max(opened, 1), v / max(closed, 1)
    for d in range(depth):
        if sides[d] & 1:
            if places[d] == s:
                phi[sides[d] >> 1] += gain
        elif places[d] == e:
            phi[sides[d] >> 1] -= loss


@njit(nogil=True, cache=True)
def _seen(sides: np.ndarray, places: np.ndarray, depth: int, f: int, a: float) -> int:
    """On which side feature f is that crosses at a: 1 the input's, 0 the baseline's, -1 where it has not been asked yet."""
    for d in range(depth):
        if sides[d] >> 1 == f and places[d] == a:
            return sides[d] & 1
    return -1


@njit(nogil=True, cache=True)
def _pairs(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n * K, p, 3): baseline, input, and 1 / (input - baseline) of every pair (0 where they are equal). NaN counts as zero in the last."""
    n, p = x.shape
    count = len(points)
    found = np.empty((n * count, p, 3))
    for i in range(n):
        for q in range(count):
            for j in range(p):
                b, to = points[q, i if points.shape[1] > 1 else 0, j], x[i, j]
                step = (0.0 if to != to else to) - (0.0 if b != b else b)
                found[i * count + q, j, 0], found[i * count + q, j, 1] = b, to
                found[i * count + q, j, 2] = 1.0 / step if step != 0.0 else 0.0
    return found


@njit(nogil=True, cache=True)
def walk(
    nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, roots: np.ndarray, deepest: int,
    x: np.ndarray, points: np.ndarray, weights: np.ndarray, general: bool, total: np.ndarray, spread: np.ndarray,
) -> None:  # fmt: skip
    """A block of rows against a block of baselines, the trees in the outer loop so that each stays in the cache.

    x (n, p); points (K, 1 or n, p); weights (K,). total (n, p): the weighted sum of the attributions over the baselines.
    spread (2, n, p): ``Σ w² d`` and ``Σ w² d²`` with d the distance from their weighted mean.
    """
    n, p = x.shape
    count = len(weights)
    xb = _pairs(x, points)
    phi = np.zeros((n * count, p + 1))  # the last column takes what no feature opens or closes
    sides, places = np.empty(deepest + 1, np.int64), np.empty(deepest + 1)
    held, times = np.empty((deepest + 1, 6), np.int64), np.empty((deepest + 1, 2))
    one, zero = np.uint64(1), np.uint64(0)  # unsigned: numba then leaves out what makes negative indices count from the end
    nobody = np.int64(p)
    for t in range(len(roots)):
        root = np.uint64(roots[t])
        for pair in range(np.uint64(n * count)):
            node, depth, waiting = root, zero, zero
            s, opener, opened = 0.0, nobody, np.int64(0)
            e, closer, closed = np.inf, nobody, np.int64(0)
            while True:
                f = np.int64(nodes[node].f)
                while f >= 0:
                    c, b, to = nodes[node].c, xb[pair, np.uint64(f), 0], xb[pair, np.uint64(f), 1]
                    child = np.uint64(nodes[node].k)
                    a = (c - b) * xb[pair, np.uint64(f), 2] + GRID
                    if general:
                        second_b = np.uint64(not _goes_first(b, c, kinds[node], starts, words))
                        second_x = np.uint64(not _goes_first(to, c, kinds[node], starts, words))
                        a = _place(a, b, to, c, xb[pair, np.uint64(f), 2], kinds[node])
                    else:
                        second_b, second_x = np.uint64(not b <= c), np.uint64(not to <= c)
                    # One branch that is seldom taken, instead of several that are hard to predict: only where both children have a part
                    # of [s, e] must one of them wait.
                    crosses = second_b ^ second_x
                    before = np.uint64(a < s) & crosses
                    if (before | np.uint64(a > e) | (crosses ^ one)) != zero:
                        node = child + (second_b ^ before)
                        f = np.int64(nodes[node].f)
                        continue
                    if a in (s, e):
                        side = _seen(sides, places, depth, f, a)
                        if side >= 0:
                            node = child + (second_x if side == 1 else second_b)
                            f = np.int64(nodes[node].f)
                            continue
                    sides[depth], places[depth] = 2 * f + 1, a
                    held[waiting, 0], held[waiting, 1], held[waiting, 2], held[waiting, 3] = child + second_b, depth, opener, opened
                    times[waiting, 0], times[waiting, 1] = s, a
                    if a < e:
                        held[waiting, 4], held[waiting, 5] = f, 1
                    else:
                        held[waiting, 4], held[waiting, 5] = closer, closed + 1
                    waiting += one
                    depth += one
                    node = child + second_x
                    if a > s:
                        s, opener, opened = a, f, np.int64(1)
                    else:
                        opened += 1
                    f = np.int64(nodes[node].f)
                v = nodes[node].c
                if (opened > 1) | (closed > 1) | (s == e):
                    _corner(sides, places, depth, s, e, opened, closed, v, phi[pair])
                else:
                    phi[pair, np.uint64(opener)] += v
                    phi[pair, np.uint64(closer)] -= v
                if waiting == zero:
                    break
                waiting -= one
                depth = np.uint64(held[waiting, 1])
                sides[depth] ^= 1
                depth += one
                node, opener, opened, closer, closed = np.uint64(held[waiting, 0]), held[waiting, 2], held[waiting, 3], held[waiting, 4], held[waiting, 5]
                s, e = times[waiting, 0], times[waiting, 1]
    _averages(phi, weights, total, spread)


@njit(nogil=True, cache=True)
def _place(a: float, b: float, to: float, c: float, per_step: float, kind: int) -> float:
    """Where a split is crossed that may ask for categories or missing values: those switch halfway."""
    if kind & CATEGORY or _is_missing(b, kind) or _is_missing(to, kind):
        return GRID + 0.5
    return c * per_step + GRID if b != b else a


@njit(nogil=True, cache=True)
def _averages(phi: np.ndarray, weights: np.ndarray, total: np.ndarray, spread: np.ndarray) -> None:
    n, p = total.shape
    count = len(weights)
    weight = weights.sum()
    for i in range(n):
        for j in range(p):
            mean = 0.0
            for q in range(count):
                mean += weights[q] * phi[i * count + q, j]
            total[i, j] = mean
            first, second = 0.0, 0.0
            for q in range(count):
                off = phi[i * count + q, j] - mean / weight
                first += weights[q] ** 2 * off
                second += weights[q] ** 2 * off * off
            spread[0, i, j], spread[1, i, j] = first, second


# ---- through a link: the jumps of all trees, merged ---------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def _touches(
    nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, root: int, tree: int, deepest: int, xb: np.ndarray, general: bool,
    at: list, leaf: list, owner: list, begin: list, members: list,
) -> None:  # fmt: skip
    """One tree, one pair: the same walk as :func:`walk`, written down. Each occupied leaf box is listed where it opens and where it closes.

    at: the place; leaf: the leaf; owner: its tree; members[begin[k]:begin[k + 1]]: twice the feature, plus 1 where it must have moved
    for the box to be occupied (0: must not have moved).
    """
    sides, places = np.empty(deepest + 1, np.int64), np.empty(deepest + 1)
    held, times = np.empty((deepest + 1, 2), np.int64), np.empty((deepest + 1, 2))
    node, depth, waiting, s, e = np.int64(root), 0, 0, 0.0, np.inf
    while True:
        while nodes[node].f >= 0:
            f, c, child = np.int64(nodes[node].f), nodes[node].c, np.int64(nodes[node].k)
            b, to = xb[f, 0], xb[f, 1]
            a = (c - b) * xb[f, 2] + GRID
            first_b, first_x = b <= c, to <= c
            if general:
                first_b = _goes_first(b, c, kinds[node], starts, words)
                first_x = _goes_first(to, c, kinds[node], starts, words)
                a = _place(a, b, to, c, xb[f, 2], kinds[node])
            child_b, child_x = child + (0 if first_b else 1), child + (0 if first_x else 1)
            if first_b == first_x or a > e:
                node = child_b
                continue
            if a < s:
                node = child_x
                continue
            side = _seen(sides, places, depth, f, a) if a in (s, e) else -1
            if side >= 0:
                node = child_x if side == 1 else child_b
                continue
            sides[depth], places[depth] = 2 * f + 1, a
            held[waiting, 0], held[waiting, 1] = child_b, depth
            times[waiting, 0], times[waiting, 1] = s, a
            waiting += 1
            depth += 1
            node, s = child_x, a
        for when, moved in ((s, 1), (e, 0)):
            if when < GRID or when == np.inf or (moved == 0 and s == e):
                continue
            for d in range(depth):
                if places[d] == when and (sides[d] & 1 == moved or s == e):
                    members.append(sides[d])  # noqa: PERF401
            at.append(when)
            leaf.append(np.int64(nodes[node].c))
            owner.append(tree)
            begin.append(len(members))
        if waiting == 0:
            return
        waiting -= 1
        depth = held[waiting, 1]
        sides[depth] ^= 1
        depth += 1
        node, s, e = held[waiting, 0], times[waiting, 0], times[waiting, 1]


@njit(nogil=True, cache=True)
def _linked(m: np.ndarray, weights: np.ndarray, kind: int, slope: float) -> float:
    """``Σ weights link(m)``, as :class:`headwater.features.trees.forest.Link` has it."""
    total = 0.0
    if kind == 2:
        top, norm = m.max(), 0.0
        for k in range(len(m)):
            e = np.exp(slope * (m[k] - top))
            norm += e
            total += weights[k] * e
        return total / norm
    for k in range(len(m)):
        z = slope * m[k]
        value = z
        if kind == 1:
            value = 1 / (1 + np.exp(-z))
        elif kind == 3:
            value = np.exp(z)
        elif kind == 4:
            value = -np.exp2(-z)
        total += weights[k] * value
    return total


@njit(nogil=True, cache=True)
def _add(m: np.ndarray, values: np.ndarray, output: np.ndarray, leaf: int, tree: int, scale: float) -> None:
    if values.shape[1] == 1 and len(output):
        m[output[tree]] += scale * values[leaf, 0]
    else:
        for k in range(values.shape[1]):
            m[k] += scale * values[leaf, k]


@njit(nogil=True, cache=True)
def _slopes(
    group: np.ndarray, leaf: np.ndarray, owner: np.ndarray, begin: np.ndarray, members: np.ndarray, who: np.ndarray, count: int, values: np.ndarray, output: np.ndarray,
    start: np.ndarray, weights: np.ndarray, kind: int, slope: float, nodes: np.ndarray, shares: np.ndarray, low: float, high: float, phi: np.ndarray,
) -> None:  # fmt: skip
    """The diagonal formula over [low, high]: ``∫ ∂/∂m link(m(t)) ∂_j m(t) dt``, m(t) the multilinear margin with every feature moved by t."""
    outputs = len(start)
    for g in range(len(nodes)):
        t = low + (high - low) * nodes[g]
        m = start.copy()
        rates = np.zeros((count, outputs))
        for k in group:
            inside, outside = 0, 0
            for z in range(begin[k], begin[k + 1]):
                if members[z] & 1:
                    inside += 1
                else:
                    outside += 1
            _add(m, values, output, leaf[k], owner[k], t**inside * (1 - t) ** outside - (1.0 if inside == 0 else 0.0))
            for z in range(begin[k], begin[k + 1]):
                if members[z] & 1:
                    _add(rates[who[members[z] >> 1]], values, output, leaf[k], owner[k], t ** (inside - 1) * (1 - t) ** outside)
                else:
                    _add(rates[who[members[z] >> 1]], values, output, leaf[k], owner[k], -(t**inside) * (1 - t) ** (outside - 1))
        slopes = np.empty(outputs)
        if kind == 2:
            share = np.exp(slope * (m - m.max()))
            share /= share.sum()
            slopes[:] = slope * share * (weights - (weights * share).sum())
        else:
            for k in range(outputs):
                z = slope * m[k]
                if kind == 1:
                    slopes[k] = weights[k] * slope / (2 + np.exp(z) + np.exp(-z))
                elif kind == 3:
                    slopes[k] = weights[k] * slope * np.exp(z)
                else:
                    slopes[k] = weights[k] * (slope * np.log(2.0) * np.exp2(-z) if kind == 4 else slope)
        for j in range(count):
            phi[j] += (high - low) * shares[g] * (slopes * rates[j]).sum()


@njit(nogil=True, cache=True)
def linked(
    nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, roots: np.ndarray, deepest: int,
    x: np.ndarray, point: np.ndarray, margins: np.ndarray, general: bool, values: np.ndarray, output: np.ndarray, weights: np.ndarray, kind: int, slope: float,
    most: int, quadrature: np.ndarray, phi: np.ndarray,
) -> int:  # fmt: skip
    """Attributions of ``Σ weights link(margins)``. x (n, p); point (1 or n, p); margins (n, outputs) at the baselines; phi (n, p), zeros.

    Jumps of all trees at one place are one corner game, played on the linked output: its Shapley value by enumeration up to ``most`` features,
    above that the diagonal formula, in panels that are halved until the sum is complete to 1e-12. quadrature (2, g): nodes and weights on
    [0, 1]. Returns how many corners took the diagonal formula.
    """
    n, p = x.shape
    diagonal = 0
    who = np.empty(p, np.int64)
    for i in range(n):
        xb = _pairs(x[i : i + 1], point[i if len(point) > 1 else 0].reshape(1, 1, p))[0]
        at, leaf_, owner_, begin_, members_ = [0.0], [np.int64(0)], [0], [0], [np.int64(0)]
        at.pop()  # the lists begin with one element to have a type
        leaf_.pop()
        owner_.pop()
        members_.pop()
        for t in range(len(roots)):
            _touches(nodes, kinds, starts, words, roots[t], t, deepest, xb, general, at, leaf_, owner_, begin_, members_)
        if len(at) == 0:
            continue
        place, leaf, owner, begin = np.array(at), np.array(leaf_), np.array(owner_), np.array(begin_)
        members = np.array(members_)
        order = np.argsort(place)
        m = margins[i].copy()
        now = _linked(m, weights, kind, slope)
        k = 0
        while k < len(order):
            last = k + 1
            while last < len(order) and place[order[last]] == place[order[k]]:
                last += 1
            group = order[k:last]
            k = last
            who[:] = -1
            count = 0
            for g in group:
                for z in range(begin[g], begin[g + 1]):
                    if who[members[z] >> 1] < 0:
                        who[members[z] >> 1] = count
                        count += 1
            after = m.copy()
            for g in group:
                opens, closes = False, False
                for z in range(begin[g], begin[g + 1]):
                    opens |= members[z] & 1 == 1
                    closes |= members[z] & 1 == 0
                if opens != closes:
                    _add(after, values, output, leaf[g], owner[g], 1.0 if opens else -1.0)
            later = _linked(after, weights, kind, slope)
            if count == 1:
                phi[i, members[begin[group[0]]] >> 1] += later - now
            else:
                gains = np.zeros(count)
                if count <= most:
                    _enumerated(group, leaf, owner, begin, members, who, count, values, output, m, weights, kind, slope, gains)
                else:
                    diagonal += 1
                    panels = 1
                    while True:
                        gains[:] = 0.0
                        for panel in range(panels):
                            _slopes(
                                group, leaf, owner, begin, members, who, count, values, output, m, weights, kind, slope, quadrature[0], quadrature[1],
                                panel / panels, (panel + 1) / panels, gains,
                            )  # fmt: skip
                        if abs(gains.sum() - (later - now)) < 1e-12 or panels >= 256:
                            break
                        panels *= 2
                for j in range(p):
                    if who[j] >= 0:
                        phi[i, j] += gains[who[j]]
            m, now = after, later
    return diagonal


@njit(nogil=True, cache=True)
def _enumerated(
    group: np.ndarray, leaf: np.ndarray, owner: np.ndarray, begin: np.ndarray, members: np.ndarray, who: np.ndarray, count: int, values: np.ndarray, output: np.ndarray,
    start: np.ndarray, weights: np.ndarray, kind: int, slope: float, gains: np.ndarray,
) -> None:  # fmt: skip
    """The Shapley value of the corner game on the linked output, by all 2^count sets of features that have moved."""
    inside, outside = np.zeros(len(group), np.int64), np.zeros(len(group), np.int64)
    for g in range(len(group)):
        for z in range(begin[group[g]], begin[group[g] + 1]):
            bit = np.int64(1) << who[members[z] >> 1]
            if members[z] & 1:
                inside[g] |= bit
            else:
                outside[g] |= bit
    worth = np.empty(1 << count)
    for chosen in range(1 << count):
        m = start.copy()
        for g in range(len(group)):
            occupied = 1.0 if (chosen & inside[g]) == inside[g] and (chosen & outside[g]) == 0 else 0.0
            change = occupied - (1.0 if inside[g] == 0 else 0.0)
            if change != 0.0:
                _add(m, values, output, leaf[group[g]], owner[group[g]], change)
        worth[chosen] = _linked(m, weights, kind, slope)
    for chosen in range(1 << count):
        size = 0
        for j in range(count):
            size += (chosen >> j) & 1
        share = _share(size + 1, count - size - 1)
        for j in range(count):
            if (chosen >> j) & 1 == 0:
                gains[j] += share * (worth[chosen | (1 << j)] - worth[chosen])
