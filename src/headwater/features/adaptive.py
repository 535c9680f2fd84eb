"""As few gradients as an example needs: Gauss-Legendre while f is smooth along the line, then bisection where its gradient jumps.

Two kinds of model, two ways to know that one has seen enough, both for nothing since every gradient comes with the value of f:

- **Smooth** (GELU, tanh): the polynomial through the slopes predicts f from node to node; where it is right everywhere, the rule is exact
  (``line.unseen``). Levels of 8, 16 and 32 points, and on by doubling while that pays.
- **Piecewise linear** (ReLU): the gradient is constant between kinks and jumps at them. Between two nodes with one kink the tangents of f
  meet exactly at the kink, so each gradient is given the stretch on which it really holds. What cannot be known is how several kinks
  lie within one gap. A jump at a random place of a gap of width h errs by ``h |jump| / sqrt(12)`` (root mean square), and errors of
  gaps add in squares. Where f has no kinks its gradient changes evenly over a gap and errs less: by how much less is seen along the line,
  where the change of f says how far the trapezoid ``h (D + D') / 2`` is off. The gaps with the largest ``h |jump|`` are bisected.

All gradients of the levels stay in use when the bisection begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.features.line import Integral, Line, unseen
from headwater.features.quadrature import Rule, gauss_legendre

LEVELS = (8, 16, 32)
RANDOM = 12**-0.5  # root mean square distance of a random place in a gap from its middle, in widths
PAYS = 10.0  # doubling the points is spectral convergence where it divides the error by this
CANCELLED = 0.01  # of the whole way up and down that f goes: a net change smaller than this is judged against the way instead
STORE = 2**28  # bytes of gradients kept at once: examples are worked off in groups that fit


@dataclass
class Seen:
    """What is known of one example: places t (K,), values f (K,), slopes D (K,) and products of gradient and d, a (K, F), sorted by t."""

    t: np.ndarray
    f: np.ndarray
    a: Tensor
    slopes: np.ndarray

    @classmethod
    def of(cls, t: np.ndarray, f: np.ndarray, a: Tensor) -> Seen:
        order = np.argsort(t, kind="stable")
        a = a[torch.from_numpy(order).to(a.device)]
        return cls(t[order], f[order], a, a.double().sum(1).cpu().numpy())

    def with_(self, t: np.ndarray, f: np.ndarray, a: Tensor) -> Seen:
        return Seen.of(np.concatenate([self.t, t]), np.concatenate([self.f, f]), torch.cat([self.a, a]))

    @property
    def jumps(self) -> np.ndarray:
        """(K - 1,) width of each gap times how much the integrand changes over it."""
        return np.diff(self.t) * self.a.diff(dim=0).double().square().sum(1).sqrt().cpu().numpy()

    @property
    def evenness(self) -> float:
        """How far off trapezoids are, as a share of ``h |D' - D|``: about 1 / sqrt(12) where f has kinks at random places, much less where it is smooth.
        In between, where a few gaps may have been lucky, kinks are assumed."""
        width, bend = np.diff(self.t), np.diff(self.slopes)
        off = width * (self.slopes[:-1] + self.slopes[1:]) / 2 - np.diff(self.f)
        turned = float((width**2 * bend**2).sum())
        share = float(np.sqrt((off**2).sum() / turned)) if turned else RANDOM
        return share if share < RANDOM / 3 else RANDOM

    @property
    def scale(self) -> float:
        """What a relative tolerance of completeness is relative to."""
        way = float(np.abs(np.diff(self.f)).sum())
        noise = float(torch.finfo(self.a.dtype).eps) * float(np.abs(self.f).max())
        return max(abs(self.f[-1] - self.f[0]), CANCELLED * way, 1e4 * noise)

    def integral(self) -> Tensor:
        """(F,) each product times the stretch of the line on which it holds, from tangent to tangent."""
        stretches = np.diff(np.concatenate([[0.0], meetings(self.t, self.f, self.slopes, self.a.dtype), [1.0]]))
        return torch.from_numpy(stretches).to(self.a.device) @ self.a.double()


def meetings(t: np.ndarray, f: np.ndarray, slopes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """(K - 1,) where the tangents of f at neighbouring nodes meet; the middle of the gap where they do not meet within it, or where
    rounding would decide.

    >>> meetings(np.array([0.0, 1.0]), np.array([0.0, 0.75]), np.array([0.0, 1.0]), torch.float64)
    array([0.25])
    """
    width, bend = np.diff(t), slopes[:-1] - slopes[1:]
    noise = 8 * float(torch.finfo(dtype).eps) * max(float(np.abs(f).max()), float(np.abs(slopes).max()))
    safe = np.abs(bend) * width > 64 * noise
    place = t[:-1] + (np.diff(f) - slopes[1:] * width) / np.where(safe, bend, 1.0)
    inside = safe & (place >= t[:-1]) & (place <= t[1:])
    return np.where(inside, place, (t[:-1] + t[1:]) / 2)


def adaptive(line: Line, tolerance: float, budget: int) -> Integral:
    """Integrate every example to a relative ``tolerance``, of its completeness and of the estimated error of its attributions.

    Examples that miss it when the budget is spent keep their best answer, and ``converged`` is False.
    """
    work = Work(line, tolerance, budget)
    width = sum(d[0].numel() for d in line.d)
    group = max(1, STORE // (budget * width * max(d.element_size() for d in line.d)))
    for part in torch.arange(len(line), device=line.rows.device).split(group):
        work.settle(part)
    start, end, error = (torch.from_numpy(v).to(work.flat.device) for v in (work.start, work.end, work.error))
    spent, converged = (torch.from_numpy(v).to(work.flat.device) for v in (work.spent, work.converged))
    return Integral(line.unflatten(work.flat), start, end, spent, error, converged)


class Work:
    """The examples of a line on their way to a tolerance, and the answers of those that have arrived."""

    def __init__(self, line: Line, tolerance: float, budget: int) -> None:
        self.line, self.tolerance, self.budget = line, tolerance, budget
        size, device = len(line), line.rows.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.flat = torch.zeros(size, sum(d[0].numel() for d in line.d), dtype=wide, device=device)
        self.start, self.end, self.error = (np.zeros(size) for _ in range(3))
        self.spent, self.converged = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool)
        self.seen: dict[int, Seen] = {}
        self.unseen = np.full(size, np.inf)  # of the last Gaussian level
        self.gain = np.zeros(size)  # by what factor that level improved on the one before

    def settle(self, part: Tensor) -> None:
        """Examples ``part`` (S,), from the first level to the last bisection."""
        left = part.tolist()
        self._look_at(left, np.array([0.0, 1.0]))
        for i in left:
            self.start[i], self.end[i] = self.seen[i].f[[0, -1]]
        for n in LEVELS:
            able = self._affordable(left, n)
            left = [i for i in left if i not in set(able)] + self._level(able, gauss_legendre(n))
        n = 2 * LEVELS[-1]
        while smooth := self._affordable([i for i in left if self.gain[i] >= PAYS], n):
            left = [i for i in left if i not in set(smooth)] + self._level(smooth, gauss_legendre(n))
            n *= 2
        while left:
            left = self._bisect(left)
        self.seen.clear()

    def _affordable(self, ids: list[int], n: int) -> list[int]:
        return [i for i in ids if self.spent[i] + n <= self.budget]

    def _look_at(self, ids: list[int], t: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """The same places t (K,) of several examples: f (S, K) and products (S, K, F), which are remembered."""
        device = self.flat.device
        s = torch.tensor(ids, device=device).repeat_interleave(len(t))
        f, a = self.line.products(s, torch.from_numpy(t).to(device).repeat(len(ids)))
        values, products = f.cpu().numpy().reshape(len(ids), -1), a.view(len(ids), len(t), -1)
        for k, i in enumerate(ids):
            self.seen[i] = self.seen[i].with_(t, values[k], products[k]) if i in self.seen else Seen.of(t, values[k], products[k])
            self.spent[i] += len(t)
        return values, products

    def _level(self, ids: list[int], rule: Rule) -> list[int]:
        """Integrate with one more Gaussian rule; those that still miss the tolerance, by it and by all nodes together, are returned."""
        if not ids:
            return []
        f, a = self._look_at(ids, rule.nodes)
        weights = torch.from_numpy(rule.weights).to(a.device)
        values = torch.einsum("k,skf->sf", weights.to(self.flat.dtype), a.to(self.flat.dtype))
        slopes = a.double().sum(2) if a.device.type != "mps" else a.sum(2)
        start, end = torch.from_numpy(self.start[ids]), torch.from_numpy(self.end[ids])
        error = unseen(rule, start, end, torch.from_numpy(f.T.copy()), slopes.cpu().double().T).numpy()
        residual = np.abs(values.sum(1).cpu().double().numpy() - (end - start).numpy())
        left = []
        for k, i in enumerate(ids):
            scale = self.seen[i].scale
            self.gain[i], self.unseen[i] = self.unseen[i] / max(error[k], 1e-300), error[k]
            if error[k] <= self.tolerance and residual[k] <= self.tolerance * scale:
                self._arrive(i, values[k], error[k], met=True)
            elif not self._enough(i):
                left.append(i)
        return left

    def _enough(self, i: int) -> bool:
        """Whether all nodes of an example together meet the tolerance, each on its own stretch of the line; its answer either way."""
        seen = self.seen[i]
        values = seen.integral()
        norm = float(values.double().square().sum().sqrt())
        error = seen.evenness * float(np.sqrt((seen.jumps**2).sum())) / norm if norm else 0.0
        residual = abs(float(values.sum()) - (self.end[i] - self.start[i]))
        met = error <= self.tolerance and residual <= self.tolerance * seen.scale
        self._arrive(i, values, error, met)
        return met

    def _bisect(self, ids: list[int]) -> list[int]:
        """Halve the worst gaps of each example: a quarter as many new nodes as it has, at least eight, as many as it can afford."""
        places = {i: self._worst(i) for i in ids}
        going = [i for i in ids if len(places[i])]
        if not going:
            return []
        device = self.flat.device
        s = torch.tensor([i for i in going for _ in places[i]], device=device)
        f, a = self.line.products(s, torch.from_numpy(np.concatenate([places[i] for i in going])).to(device))
        counts = [len(places[i]) for i in going]
        for i, values, products in zip(going, np.split(f.cpu().numpy(), np.cumsum(counts)[:-1]), a.split(counts), strict=True):
            self.seen[i] = self.seen[i].with_(places[i], values, products)
            self.spent[i] += len(values)
        return [i for i in going if not self._enough(i)]

    def _worst(self, i: int) -> np.ndarray:
        seen = self.seen[i]
        count = min(max(8, len(seen.t) // 4), self.budget - self.spent[i], len(seen.t) - 1)
        worst = np.argsort(-seen.jumps, kind="stable")[: max(count, 0)]
        return (seen.t[worst] + seen.t[worst + 1]) / 2

    def _arrive(self, i: int, values: Tensor, error: float, met: bool) -> None:
        self.flat[i] = values
        self.error[i], self.converged[i] = error, met
        if met:
            self.seen.pop(i, None)
