"""Paths from the baseline to the input, as values. The straight line is the default, and the only one with spectral convergence.

    hw.explain(model, images, target=3, path=hw.paths.blur(sigma=8.0))

A path is asked to integrate a gradient field between two ends; how points and increments are summed is ``integrate``'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.arrays import as_tensor
from headwater.features.baselines import smoothed
from headwater.features.integrate import Settings, along_curve, along_line
from headwater.features.line import Field, Integral, Line, at_least_single, check_finite

__all__ = ["blur", "custom", "guided", "straight", "sweeps", "through"]

Points = tuple[Tensor, ...]


@runtime_checkable
class Path(Protocol):
    """``integrate(f, x, b, rows, settings)``: the path integral of the gradient field f from b to x (tuples of tensors (S, ...)). ``name``: in words."""

    @property
    def name(self) -> str: ...

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral: ...


@dataclass(frozen=True)
class Straight:
    """The straight line: see :func:`straight`."""

    @property
    def name(self) -> str:
        """In words."""
        return "the straight line"

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral:
        """``(x - b) * mean of the gradient``."""
        return along_line(Line(f, x, b, rows, settings.chunk), settings)


def straight() -> Straight:
    """``b + t (x - b)``: Integrated Gradients as defined (Sundararajan, Taly, Yan 2017)."""
    return Straight()


@dataclass(frozen=True, eq=False)
class Through:
    """A polyline: see :func:`through`."""

    points: tuple[Any, ...]

    @property
    def name(self) -> str:
        """In words."""
        return f"a line through {len(self.points)} points"

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral:
        """The sum over the legs, each a straight line."""
        stops = [b, *(_stop(point, x, rows) for point in self.points), x]
        legs = [along_line(Line(f, there, here, rows, settings.chunk), settings) for here, there in pairwise(stops)]
        values = tuple(torch.stack(parts).sum(0) for parts in zip(*(leg.values for leg in legs), strict=True))
        sizes = torch.stack([leg.end - leg.start for leg in legs]).abs()
        error = (torch.stack([leg.error for leg in legs]) * sizes).sum(0) / (legs[-1].end - legs[0].start).abs().clamp_min(torch.finfo(torch.float64).tiny)
        spent = torch.stack([leg.evaluations for leg in legs]).sum(0)
        return Integral(values, legs[0].start, legs[-1].end, spent, error, torch.stack([leg.converged for leg in legs]).all(0))


def through(*points: Any) -> Through:
    """From the baseline through ``points`` to the input, in straight legs: a trajectory. Each point is one for all examples, one for each, or a
    tuple of them where there are several inputs. The tolerance, relative, holds for every leg."""
    if not points:
        raise InputError("through() of no point", "at least one", "hw.paths.straight() goes straight")
    return Through(points)


@dataclass(frozen=True, eq=False)
class Custom:
    """A path of the user's own: see :func:`custom`."""

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """In words."""
        return "a path of the user's"

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral:
        """By increments, second order."""

        def curve(s: Tensor, t: Tensor) -> Points:
            parts = []
            for xi, bi in zip(x, b, strict=True):
                point = self.function(xi[s], bi[s], t.to(at_least_single(xi).dtype).view(-1, *(1,) * (xi.ndim - 1)))
                if not isinstance(point, Tensor) or point.shape != xi[s].shape:
                    raise InputError(
                        f"a path that returned {_what(point)} for points of shape {tuple(xi[s].shape)}", "points of that shape", "return as many points as x has rows"
                    )
                parts.append(point.to(xi.dtype))
            return tuple(parts)

        one = torch.ones(1, dtype=torch.float64, device=rows.device)
        first = torch.zeros(1, dtype=torch.int64, device=rows.device)
        for point, xi in zip(curve(first, one), x, strict=True):
            scale = xi[:1].abs().max().double() + torch.finfo(torch.float32).eps
            if float((point.double() - xi[:1].double()).abs().max()) > 1e-4 * float(scale):
                raise InputError("a path that does not end at the input at t = 1", "function(x, b, 1) == x", "t runs from 0 (the baseline) to 1 (the input)")
        return along_curve(f, curve, rows, settings)


def custom(function: Callable[..., Any]) -> Custom:
    """``function(x, b, t) -> points``, for tensors x and b (m, ...) and t (m, 1, ...) from 0 to 1. It must give x at t = 1; where it begins at
    t = 0 is the baseline."""
    return Custom(function)


@dataclass(frozen=True)
class Blur:
    """From blurred to sharp: see :func:`blur`."""

    sigma: float = 8.0

    @property
    def name(self) -> str:
        """In words."""
        return f"a path from blurred (sigma {self.sigma:g}) to sharp"

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral:
        """By increments, second order. The baseline is the blurred input; b is not used."""

        def curve(s: Tensor, t: Tensor) -> Points:
            return tuple(smoothed(at_least_single(xi[s]), self.sigma * (1 - t)).to(xi.dtype) for xi in x)

        return along_curve(f, curve, rows, settings)


def blur(sigma: float = 8.0) -> Blur:
    """Blur Integrated Gradients (Xu, Venugopalan, Sundararajan 2020, arXiv 2004.03383): the path runs from the input blurred with a Gaussian of
    ``sigma`` grid steps to the input, sigma falling evenly to 0. There is no other baseline than the blurred input."""
    if sigma <= 0:
        raise InputError(f"sigma={sigma}", "above 0", "hw.paths.blur(8.0), say")
    return Blur(sigma)


@dataclass(frozen=True)
class Guided:
    """A path that avoids steep places: see :func:`guided`."""

    steps: int = 100
    fraction: float = 0.1

    @property
    def name(self) -> str:
        """In words."""
        return f"a guided path of {self.steps} steps"

    def integrate(self, f: Field, x: Points, b: Points, rows: Tensor, settings: Settings) -> Integral:
        """Step by step, batched over examples. Memory: one chunk of examples."""
        if settings.tolerance is not None:
            raise InputError(
                f"tolerance={settings.tolerance} with a guided path", "none: its points follow from each other", "choose its steps: hw.paths.guided(steps=200)"
            )
        parts = [self._walk(f, tuple(v[s] for v in x), tuple(v[s] for v in b), rows[s]) for s in torch.arange(len(rows), device=rows.device).split(settings.chunk)]
        joined = [torch.cat(column) for column in zip(*((*p.values, *p[1:]) for p in parts), strict=True)]
        return Integral(tuple(joined[: len(x)]), *joined[len(x) :])

    def _walk(self, f: Field, x: Points, b: Points, rows: Tensor) -> Integral:
        size, n = [p[0].numel() for p in x], len(rows)
        goal, origin = (torch.cat([at_least_single(p).flatten(1) for p in side], 1) for side in (x, b))

        def look(flat: Tensor) -> tuple[Tensor, Tensor]:
            points = tuple(part.reshape(n, *p.shape[1:]).to(p.dtype) for part, p in zip(flat.split(size, 1), x, strict=True))
            value, gradients = f(points, rows)
            check_finite(value, rows, torch.full((n,), 0.5, dtype=torch.float64))
            return value.double(), torch.cat([g.flatten(1) for g in gradients], 1).to(flat.dtype)

        place, total = origin.clone(), torch.zeros(goal.shape, dtype=torch.float64, device=goal.device)
        whole = (goal - origin).abs().sum(1)
        start, gradient = look(place)
        for step in range(self.steps):
            before = place
            place = _towards(place, goal, gradient, whole * (1 - (step + 1) / self.steps), self.fraction)
            # the gradient at the middle of the step, so that the sum is second order as on other paths
            _, middle = look((before + place) / 2)
            total += middle.double() * (place - before).double()
            if step + 1 < self.steps:
                _, gradient = look(place)
        end, _ = look(goal)
        values = tuple(part.reshape(n, *p.shape[1:]) for part, p in zip(total.split(size, 1), x, strict=True))
        count = torch.full((n,), 2 * self.steps + 1, dtype=torch.int64, device=goal.device)
        return Integral(values, start, end, count, torch.full_like(start, torch.nan), torch.zeros(n, dtype=torch.bool, device=goal.device))


def guided(steps: int = 100, fraction: float = 0.1) -> Guided:
    """Guided Integrated Gradients (Kapishnikov et al. 2021, arXiv 2106.09788): at each step only the ``fraction`` of unfinished features with
    the smallest gradient moves, so that the path keeps away from steep places; the L1 distance left falls evenly. Costs two gradients a
    step, one after the other. Symmetry of two functions that compute the same, and of the ends, is given up for less noise."""
    if steps < 1 or not 0 < fraction <= 1:
        raise InputError(f"guided(steps={steps}, fraction={fraction})", "at least one step, and a fraction above 0 and at most 1", "hw.paths.guided(100, 0.1)")
    return Guided(steps, fraction)


def sweeps(segments: int = 16, orders: int = 4) -> Any:
    """For functions of arrays that may jump: coordinates move one at a time, in random orders and their reverse, within each of ``segments``
    pieces of the straight path. Values alone are asked for, no gradients. See :class:`headwater.features.blackbox.Sweeps`."""
    from headwater.features.blackbox.sweeps import Sweeps

    return Sweeps(segments, orders)


def _towards(place: Tensor, goal: Tensor, gradient: Tensor, aim: Tensor, fraction: float) -> Tensor:
    """Move the features of smallest gradient until only ``aim`` (n,) of L1 distance is left."""
    for _ in range(int(np.ceil(1 / fraction)) + 2):
        gap = goal - place
        left = gap.abs().sum(1)
        short = left - aim  # how far there still is to go in this step
        open_ = gap != 0
        if not bool(((short > 1e-7 * left) & open_.any(1)).any()):
            break
        steep = torch.where(open_, gradient.abs(), torch.inf)
        rank = (fraction * open_.sum(1)).ceil().long().clamp_min(1) - 1
        limit = steep.sort(1).values.gather(1, rank[:, None])
        moving = open_ & (steep <= limit)
        room = (gap.abs() * moving).sum(1)
        share = torch.where(room > 0, (short / room.clamp_min(torch.finfo(room.dtype).tiny)).clamp(0, 1), 0.0)[:, None]
        place = torch.where(moving & (share >= 1), goal, place + share * gap * moving)
    return place if bool((aim > 0).any()) else goal.clone()


def _stop(point: Any, x: Points, rows: Tensor) -> Points:
    """A point of a polyline as tensors like x: one for all examples, or one each (picked by ``rows``)."""
    parts = point if isinstance(point, tuple | list) and len(x) > 1 else (point,)
    if len(parts) != len(x):
        raise InputError(f"a point of {len(parts)} tensors for {len(x)} inputs", "one for each input", "give a tuple")
    found = []
    for part, xi in zip(parts, x, strict=True):
        p = as_tensor(part).to(xi)
        if p.ndim == 0 or p.shape == xi.shape[1:]:
            found.append(p.expand(xi.shape))
        elif p.shape[1:] == xi.shape[1:] and len(p) > int(rows.max()):
            found.append(p[rows])
        else:
            raise InputError(
                f"a point of shape {tuple(p.shape)} for inputs of shape {tuple(xi.shape[1:])}", "one point for all examples, or one for each", "see hw.paths.through"
            )
    return tuple(found)


def _what(thing: Any) -> str:
    return f"shape {tuple(thing.shape)}" if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
