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
LN2 = 0.6931471805599453


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
                first = _goes_first(x[i, f], nodes[node].c, kinds[node], starts, words) if general else x[i, f] <= nodes[node].c
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
    nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, root: int, tree: int, xb: np.ndarray, general: bool,
    sides: np.ndarray, places: np.ndarray, held: np.ndarray, times: np.ndarray, count: int, at: np.ndarray, what: np.ndarray, members: np.ndarray,
) -> int:  # fmt: skip
    """One tree, one pair: the same walk as :func:`walk`, written down. Each occupied leaf box is listed where it opens and where it closes.

    at (touches,): the place; what (touches, 4): the leaf, its tree, and where its members begin and end; members: twice the feature, plus 1
    where it must have moved for the box to be occupied (0: must not have moved). Returns the new count of touches, or -1 where they do not fit.
    """
    node, depth, waiting, s, e = np.int64(root), 0, 0, 0.0, np.inf
    while True:
        while nodes[node].f >= 0:
            f, c, child = np.int64(nodes[node].f), nodes[node].c, np.int64(nodes[node].k)
            b, to = xb[f, 0], xb[f, 1]
            a = (c - b) * xb[f, 2] + GRID
            if general:
                first_b = _goes_first(b, c, kinds[node], starts, words)
                first_x = _goes_first(to, c, kinds[node], starts, words)
                a = _place(a, b, to, c, xb[f, 2], kinds[node])
            else:
                first_b, first_x = b <= c, to <= c
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
        for moved in range(1, -1, -1):
            when = s if moved else e
            if when < GRID or when == np.inf or (moved == 0 and s == e):
                continue
            end = what[count - 1, 3] if count else 0
            if count == len(at) or end + depth > len(members):
                return -1
            at[count] = when
            what[count, 0], what[count, 1], what[count, 2] = np.int64(nodes[node].c), tree, end
            for d in range(depth):
                if places[d] == when and (sides[d] & 1 == moved or s == e):
                    members[end] = sides[d]
                    end += 1
            what[count, 3] = end
            count += 1
        if waiting == 0:
            return count
        waiting -= 1
        depth = held[waiting, 1]
        sides[depth] ^= 1
        depth += 1
        node, s, e = held[waiting, 0], times[waiting, 0], times[waiting, 1]


@njit(nogil=True, cache=True)
def touches(
    nodes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, words: np.ndarray, roots: np.ndarray, deepest: int,
    x: np.ndarray, points: np.ndarray, i: int, general: bool, at: np.ndarray, what: np.ndarray, members: np.ndarray,
) -> int:  # fmt: skip
    """What all trees do on the path of row i; see :func:`_touches`."""
    xb = _pairs(x[i : i + 1], points[:1] if points.shape[1] == 1 else points[:1, i : i + 1])[0]
    sides, places = np.empty(deepest + 1, np.int64), np.empty(deepest + 1)
    held, times = np.empty((deepest + 1, 2), np.int64), np.empty((deepest + 1, 2))
    count = 0
    for t in range(len(roots)):
        count = _touches(nodes, kinds, starts, words, roots[t], t, xb, general, sides, places, held, times, count, at, what, members)
        if count < 0:
            return -1
    return count


@njit(nogil=True, cache=True)
def _linked(m: np.ndarray, weights: np.ndarray, kind: int, slope: float) -> float:
    """``Σ weights link(m)``, as :class:`headwater.features.trees.forest.Link` has it."""
    total, norm, top = 0.0, 0.0, -np.inf
    for k in range(len(m)):
        top = max(top, slope * m[k])
    for k in range(len(m)):
        z = slope * m[k]
        value = z
        if kind == 1:
            value = 1 / (1 + np.exp(-z))
        elif kind == 2:
            value = np.exp(z - top)
            norm += value
        elif kind == 3:
            value = np.exp(z)
        elif kind == 4:
            value = -np.exp(-z * LN2)
        total += weights[k] * value
    return total / norm if kind == 2 else total


@njit(nogil=True, cache=True)
def _slope(m: np.ndarray, weights: np.ndarray, kind: int, slope: float, k: int, linked: float) -> float:
    """The derivative of :func:`_linked`, whose value is ``linked``, by margin k."""
    z = slope * m[k]
    if kind == 1:
        return weights[k] * slope / (2 + np.exp(z) + np.exp(-z))
    if kind == 2:
        norm = 0.0
        for other in range(len(m)):
            norm += np.exp(slope * m[other] - z)
        return slope * (weights[k] - linked) / norm
    if kind == 3:
        return weights[k] * slope * np.exp(z)
    return weights[k] * slope * (LN2 * np.exp(-z * LN2) if kind == 4 else 1.0)


@njit(nogil=True, cache=True)
def _add(m: np.ndarray, values: np.ndarray, output: np.ndarray, what: np.ndarray, scale: float) -> None:
    if len(output):
        m[output[what[1]]] += scale * values[what[0], 0]
    else:
        for k in range(values.shape[1]):
            m[k] += scale * values[what[0], k]


@njit(nogil=True, cache=True)
def _needs(group: np.ndarray, what: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(touches, 2): how many features must have moved for each box of a corner, and how many must not."""
    found = np.zeros((len(group), 2), np.int64)
    for g in range(len(group)):
        for z in range(what[group[g], 2], what[group[g], 3]):
            found[g, 0 if members[z] & 1 else 1] += 1
    return found


@njit(nogil=True, cache=True)
def diagonal(
    group: np.ndarray, what: np.ndarray, members: np.ndarray, who: np.ndarray, values: np.ndarray, output: np.ndarray, start: np.ndarray,
    weights: np.ndarray, kind: int, slope: float, quadrature: np.ndarray, gains: np.ndarray,
) -> None:  # fmt: skip
    """The diagonal formula: ``∫ ∂/∂m link(m(t)) ∂_j m(t) dt``, m(t) the multilinear margin with every feature moved by t.

    quadrature (2, g): nodes and weights on [0, 1].
    """
    needs = _needs(group, what, members)
    m, rates = np.empty(len(start)), np.empty((len(gains), len(start)))
    for q in range(quadrature.shape[1]):
        t = quadrature[0, q]
        m[:] = start
        rates[:] = 0.0
        for g in range(len(group)):
            one = what[group[g]]
            inside, outside = needs[g, 0], needs[g, 1]
            _add(m, values, output, one, t**inside * (1 - t) ** outside - (1.0 if inside == 0 else 0.0))
            for z in range(one[2], one[3]):
                rate = t ** (inside - 1) * (1 - t) ** outside if members[z] & 1 else -(t**inside) * (1 - t) ** (outside - 1)
                _add(rates[who[members[z] >> 1]], values, output, one, rate)
        linked = _linked(m, weights, kind, slope)
        for k in range(len(start)):
            slopes = quadrature[1, q] * _slope(m, weights, kind, slope, k, linked)
            for j in range(len(gains)):
                gains[j] += slopes * rates[j, k]


@njit(nogil=True, cache=True)
def enumerated(
    group: np.ndarray, what: np.ndarray, members: np.ndarray, who: np.ndarray, values: np.ndarray, output: np.ndarray, start: np.ndarray,
    weights: np.ndarray, kind: int, slope: float, gains: np.ndarray,
) -> None:  # fmt: skip
    """The Shapley value of the corner game on the linked output, by all sets of features that have moved."""
    count = len(gains)
    masks = np.zeros((len(group), 2), np.int64)
    for g in range(len(group)):
        for z in range(what[group[g], 2], what[group[g], 3]):
            masks[g, 0 if members[z] & 1 else 1] |= np.int64(1) << who[members[z] >> 1]
    worth, m = np.empty(1 << count), np.empty(len(start))
    for chosen in range(1 << count):
        m[:] = start
        for g in range(len(group)):
            occupied = (chosen & masks[g, 0]) == masks[g, 0] and (chosen & masks[g, 1]) == 0
            if occupied != (masks[g, 0] == 0):
                _add(m, values, output, what[group[g]], 1.0 if occupied else -1.0)
        worth[chosen] = _linked(m, weights, kind, slope)
    for chosen in range(1 << count):
        size = 0
        for j in range(count):
            size += (chosen >> j) & 1
        share = _share(size + 1, count - size - 1)
        for j in range(count):
            if (chosen >> j) & 1 == 0:
                gains[j] += share * (worth[chosen | (1 << j)] - worth[chosen])


@njit(nogil=True, cache=True)
def merged(
    order: np.ndarray, begin: int, at: np.ndarray, what: np.ndarray, members: np.ndarray, who: np.ndarray, values: np.ndarray, output: np.ndarray, m: np.ndarray,
    weights: np.ndarray, kind: int, slope: float, most: int, phi: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    """From the touch ``order[begin]`` on, place after place: moves the margins ``m`` and adds to ``phi`` (p,) what the features change.

    Stops at a corner of more than ``most`` features. Returns where that corner begins and ends in ``order`` and how many features it has
    (``who`` numbers them), or three times the end.
    """
    k, count = begin, 0
    now = _linked(m, weights, kind, slope)
    while k < len(order):
        last = k + 1
        while last < len(order) and at[order[last]] == at[order[k]]:
            last += 1
        group = order[k:last]
        who[:] = -1
        count = 0
        for g in group:
            for z in range(what[g, 2], what[g, 3]):
                if who[members[z] >> 1] < 0:
                    who[members[z] >> 1] = count
                    count += 1
        if count > most:
            return k, last, count
        gains = np.zeros(count)
        if count > 1:
            enumerated(group, what, members, who, values, output, m, weights, kind, slope, gains)
        arrive(group, what, members, values, output, m)
        later = _linked(m, weights, kind, slope)
        if count == 1:
            gains[0] = later - now
        for j in range(len(who)):
            if who[j] >= 0:
                phi[j] += gains[who[j]]
        now, k = later, last
    return k, k, k


@njit(nogil=True, cache=True)
def arrive(group: np.ndarray, what: np.ndarray, members: np.ndarray, values: np.ndarray, output: np.ndarray, m: np.ndarray) -> None:
    """Move the margins past a corner: boxes that only open are occupied after it, boxes that only close no more."""
    for g in group:
        opens, closes = False, False
        for z in range(what[g, 2], what[g, 3]):
            opens |= members[z] & 1 == 1
            closes |= members[z] & 1 == 0
        if opens != closes:
            _add(m, values, output, what[g], 1.0 if opens else -1.0)
