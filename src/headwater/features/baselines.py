"""Baselines: what an input is compared with. A baseline is the question ("compared with what?"), so it is a value with a name.

    hw.explain(model, images, target=3, baseline=hw.baselines.average(hw.baselines.constant(0.0), hw.baselines.constant(1.0)))

A plain number, array, tensor, tuple or dict is a baseline too: one point for all inputs, or one point for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.arrays import as_tensor

__all__ = ["average", "blur", "calibrated", "constant", "dataset", "mean", "nearest", "token", "uniform", "zeros"]


class References(NamedTuple):
    """What a baseline comes to for given inputs: K points for each.

    ``points``: for each input tensor (n, ...) a tensor (K, n, ...), or (K, 1, ...) where all examples share them. ``weights`` (K,)
    sum to 1. ``name``: in words, for the result.
    """

    points: tuple[Tensor, ...]
    weights: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.weights)


@runtime_checkable
class Baseline(Protocol):
    """``references(inputs, seed)``: the points that inputs (a tuple of tensors (n, ...)) are compared with."""

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References: ...


def references(baseline: Any, inputs: tuple[Tensor, ...], seed: int = 0, names: Sequence[str] = ()) -> References:
    """What any ``baseline=`` argument comes to: a :class:`Baseline`, None (zeros), a number, or points (one for all, or one each).

    Args:
        inputs: the tensors that are interpolated, each (n, ...).
        names: of the inputs, where they come as a dict; the baseline may then be a dict too.

    Raises InputError for points of another shape, and for values that are not finite.
    """
    if baseline is None:
        baseline = zeros()
    found = baseline.references(inputs, seed) if isinstance(baseline, Baseline) else _given(baseline, inputs, names)
    for point, x in zip(found.points, inputs, strict=True):
        if point.shape[0] != len(found) or point.shape[2:] != x.shape[1:] or point.shape[1] not in (1, len(x)):
            raise _misshapen(found.name, tuple(point.shape[2:]), x)
        if point.is_floating_point() and not torch.isfinite(point).all():
            raise InputError(f"a baseline ({found.name}) with values that are not finite", "finite numbers", "replace NaN and infinity first")
    return found


def _given(baseline: Any, inputs: tuple[Tensor, ...], names: Sequence[str]) -> References:
    if isinstance(baseline, int | float):
        return constant(baseline).references(inputs, 0)
    if isinstance(baseline, Mapping):
        if set(baseline) != set(names):
            raise InputError(f"a baseline with the keys {sorted(map(str, baseline))}", f"the keys of the inputs, {sorted(names)}", "give a point for each of them")
        parts: Sequence[Any] = [baseline[name] for name in names]
    elif isinstance(baseline, tuple | list) and (len(inputs) > 1 or len(baseline) == 1) and len(baseline) == len(inputs):
        parts = baseline
    elif len(inputs) == 1:
        parts = [baseline]
    else:
        raise InputError(f"a baseline of type {type(baseline).__name__} for {len(inputs)} inputs", "a tuple with one baseline for each", "hw.baselines.zeros() suits all")
    return References(tuple(_point(part, x) for part, x in zip(parts, inputs, strict=True)), torch.ones(1, dtype=torch.float64), "a given point")


def _point(part: Any, x: Tensor) -> Tensor:
    """One point for all examples (of shape ``x.shape[1:]``, or a number), or one each (of x's shape), as (1, 1 or n, ...)."""
    try:
        point = as_tensor(part).to(x.device)
    except (TypeError, ValueError) as error:
        raise InputError(f"a baseline of type {type(part).__name__}", "a number, an array or one of hw.baselines", "hw.baselines.zeros(), say") from error
    point = point.to(x.dtype) if x.is_floating_point() or not point.is_floating_point() else point
    if point.ndim == 0:
        return point.expand(1, 1, *x.shape[1:])
    if point.shape == x.shape:
        return point.unsqueeze(0)
    if point.shape == x.shape[1:]:
        return point.unsqueeze(0).unsqueeze(0)
    if point.shape == (1, *x.shape[1:]):
        return point.unsqueeze(0)
    raise _misshapen("a given point", tuple(point.shape), x)


def _misshapen(name: str, shape: tuple[int, ...], x: Tensor) -> InputError:
    return InputError(
        f"a baseline ({name}) of shape {shape} for inputs of shape {tuple(x.shape)}",
        f"a number, one point {tuple(x.shape[1:])} for all examples, or one for each, {tuple(x.shape)}",
        "for many points for every example: hw.baselines.dataset(points, count)",
    )


# ---- the values -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class constant:
    """The same number everywhere. In the space of the inputs as the model gets them: black of standardised images is not 0.

    >>> constant(0.5).references((torch.zeros(2, 3),), 0).points[0].shape
    torch.Size([1, 1, 3])
    """

    value: float = 0.0

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """One point, shared by all examples."""
        points = tuple(torch.full((1, 1, *x.shape[1:]), self.value, dtype=x.dtype, device=x.device) for x in inputs)
        return References(points, torch.ones(1, dtype=torch.float64), "zeros" if self.value == 0 else f"the constant {self.value:g}")


def zeros() -> constant:
    """All zeros."""
    return constant(0.0)


@dataclass(frozen=True, eq=False)
class mean:
    """The mean of a data set, (m, ...) (a tuple of them for several inputs). For one-hot columns it is a point that no data has."""

    data: Any

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """One point, shared by all examples."""
        points = tuple(column.double().mean(0, keepdim=True).to(x.dtype).unsqueeze(0) for column, x in zip(_columns(self.data, inputs), inputs, strict=True))
        return References(points, torch.ones(1, dtype=torch.float64), "the mean of the data")


@dataclass(frozen=True)
class blur:
    """Each input smoothed with a Gaussian of standard deviation ``sigma``, in grid steps, over its last two axes (its last one where it
    has two): an image without its detail, a series without its quick changes."""

    sigma: float = 4.0

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """One point for each example."""
        return References(tuple(smoothed(x, self.sigma).unsqueeze(0) for x in inputs), torch.ones(1, dtype=torch.float64), f"blurred, sigma {self.sigma:g}")


@dataclass(frozen=True)
class uniform:
    """Noise, uniform between ``low`` and ``high``: ``draws`` points, shared by all examples."""

    low: float = 0.0
    high: float = 1.0
    draws: int = 8

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """``draws`` points, which depend on the seed alone."""
        _positive(self.draws, "draws")
        numbers = torch.Generator().manual_seed(seed)
        points = tuple((self.low + (self.high - self.low) * torch.rand(self.draws, 1, *x.shape[1:], generator=numbers, dtype=torch.float64)).to(x) for x in inputs)
        return References(points, _equal(self.draws), f"{self.draws} draws of uniform noise")


@dataclass(frozen=True, eq=False)
class dataset:
    """``count`` examples drawn from a data set (m, ...) without replacement: expected gradients (Erion et al. 2019, arXiv 1906.10670), with
    quadrature along each path in place of a random point on it. The result carries a standard error over them."""

    data: Any
    count: int = 32

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """``count`` points, which depend on the seed alone."""
        columns = _columns(self.data, inputs)
        _positive(self.count, "count")
        if self.count > len(columns[0]):
            raise InputError(f"count={self.count} of {len(columns[0])} examples", "at most as many as there are", f"count={len(columns[0])} takes all")
        rows = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(seed))[: self.count]
        points = tuple(column[rows.to(column.device)].to(x).unsqueeze(1) for column, x in zip(columns, inputs, strict=True))
        return References(points, _equal(self.count), f"{self.count} examples of the data")


@dataclass(frozen=True, eq=False)
class calibrated:
    """All examples of ``data`` with weights such that the weighted mean of their ``scores`` (m,) (the model's outputs for them) is
    ``value``: a decision threshold, say. Weights are ``exp(t * score)``, normalised: of all weights with that mean, the closest to equal."""

    data: Any
    scores: Any
    value: float

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """As many points as the data has."""
        columns = _columns(self.data, inputs)
        scores = as_tensor(self.scores).cpu().double().numpy().ravel()
        if len(scores) != len(columns[0]):
            raise InputError(f"{len(scores)} scores for {len(columns[0])} examples", "the model's output for each of them", "scores=model(data)")
        points = tuple(column.to(x).unsqueeze(1) for column, x in zip(columns, inputs, strict=True))
        return References(points, torch.from_numpy(_tilted(scores, self.value)), f"{len(scores)} examples weighted to a mean output of {self.value:g}")


@dataclass(frozen=True, eq=False)
class nearest:
    """For each input the nearest example (Euclidean) of ``data`` whose label is another one: why this class and not that one?

    Args:
        data: (m, ...). labels: (m,). of: (n,) the labels of the inputs that are explained.
    """

    data: Any
    labels: Any
    of: Any

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """One point for each example."""
        columns = _columns(self.data, inputs)
        labels, of = (as_tensor(v).cpu() for v in (self.labels, self.of))
        if len(labels) != len(columns[0]) or len(of) != len(inputs[0]):
            raise InputError(
                f"{len(labels)} labels for {len(columns[0])} examples and {len(of)} for {len(inputs[0])} inputs",
                "one each",
                "nearest(data, labels, of=labels of the inputs)",
            )
        rows = torch.stack([_nearest(inputs, columns, k, labels != of[k]) for k in range(len(of))])
        points = tuple(column[rows].to(x).unsqueeze(0) for column, x in zip(columns, inputs, strict=True))
        return References(points, torch.ones(1, dtype=torch.float64), "the nearest example of another class")


@dataclass(frozen=True)
class token:
    """For text: the embedding of one token at every position that is not special. ``which``: "mask", "pad", "unk", a token id, or "zero"
    for the zero embedding."""

    which: str | int = "pad"


@dataclass(frozen=True, eq=False)
class Average:
    """Several baselines at once: see :func:`average`."""

    members: tuple[Any, ...]
    weights: tuple[float, ...] | None = None

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """The points of all members."""
        found = [references(member, inputs, seed + k) for k, member in enumerate(self.members)]
        shares = self.weights or (1 / len(found),) * len(found)
        n = len(inputs[0])
        each = any(part.shape[1] != 1 for one in found for part in one.points)
        points = tuple(torch.cat([one.points[i].expand(-1, n if each else 1, *x.shape[1:]) for one in found]) for i, x in enumerate(inputs))
        weights = torch.cat([share * one.weights for share, one in zip(shares, found, strict=True)])
        return References(points, weights / weights.sum(), "the average over " + ", ".join(one.name for one in found))


def average(*baselines: Any, weights: Sequence[float] | None = None) -> Average:
    """Several baselines at once: attributions are averaged, and their spread is reported as ``stderr``.

    >>> average(0.0, 1.0).references((torch.zeros(2, 3),), 0).name
    'the average over zeros, the constant 1'
    """
    if not baselines:
        raise InputError("average() of no baseline", "at least one", "hw.baselines.average(0.0, 1.0)")
    if weights is not None and (len(weights) != len(baselines) or min(weights) < 0 or sum(weights) <= 0):
        raise InputError(f"weights={list(weights)} for {len(baselines)} baselines", "one each, none negative", "leave them out for equal weights")
    return Average(baselines, None if weights is None else tuple(float(w) / sum(weights) for w in weights))


# ---- their mathematics ----------------------------------------------------------------------------------------------------------


def smoothed(x: Tensor, sigma: float | Tensor) -> Tensor:
    """x (n, ...) convolved with a Gaussian over its last two axes (its last one where it has two), edges repeated.

    ``sigma``: one for all, or (n,). Exact zero leaves x as it is. Separable, the kernel cut at four sigma or at the width of the axis.
    """
    widths = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").expand(len(x))
    axes = range(max(1, x.ndim - 2), x.ndim)
    for axis in axes:
        kernel = torch.stack([_gaussian(x.shape[axis], float(width)) for width in widths.tolist()]).to(x)
        x = torch.einsum("noi,n...i->n...o", kernel, x.movedim(axis, -1)).movedim(-1, axis)
    return x


def _gaussian(size: int, sigma: float) -> Tensor:
    """The matrix (size, size) that smooths an axis; each row sums to 1, what would fall outside lands on the edge."""
    if sigma <= 0:
        return torch.eye(size, dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64)
    reach = min(int(4 * sigma) + 1, 4 * size)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    landing = (place[:, None] + offsets).clamp(0, size - 1).long()
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, landing, (weights / weights.sum()).expand(size, -1))


def _tilted(scores: np.ndarray, value: float) -> np.ndarray:
    from scipy.optimize import brentq

    low, high = float(scores.min()), float(scores.max())
    if not low < value < high:
        raise InputError(f"value={value:g} and scores from {low:g} to {high:g}", "a value between them", "no weights give a mean outside the scores")
    unit = (scores - value) / (high - low)

    def weights(t: float) -> np.ndarray:
        w = np.exp(t * unit - np.max(t * unit))
        return cast(np.ndarray, w / w.sum())

    reach = 1.0
    while not weights(-reach) @ unit < 0 < weights(reach) @ unit:
        reach *= 2
    return weights(brentq(lambda t: weights(t) @ unit, -reach, reach, xtol=1e-14))


def _nearest(inputs: tuple[Tensor, ...], columns: tuple[Tensor, ...], k: int, other: Tensor) -> Tensor:
    if not other.any():
        raise InputError(f"data in which every example has the label of input {k}", "some of another class", "add them to data= and labels=")
    distance = sum(((column.double() - x[k].double().to(column.device)).flatten(1) ** 2).sum(1).cpu() for column, x in zip(columns, inputs, strict=True))
    return torch.where(other, cast(Tensor, distance), torch.inf).argmin()


def _columns(data: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A data set as one tensor for each input, checked against its shape."""
    parts = tuple(data.values()) if isinstance(data, Mapping) else tuple(data) if isinstance(data, tuple | list) and len(inputs) > 1 else (data,)
    columns = tuple(as_tensor(part) for part in parts)
    for column, x in zip(columns, inputs, strict=len(columns) == len(inputs)):
        if column.shape[1:] != x.shape[1:] or not len(column):
            raise InputError(
                f"baseline data of shape {tuple(column.shape)} for inputs of shape {tuple(x.shape)}",
                f"(m, {', '.join(map(str, x.shape[1:]))})",
                "give examples like the inputs",
            )
    return columns


def _equal(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def _positive(value: int, name: str) -> None:
    if value < 1:
        raise InputError(f"{name}={value}", "at least 1", f"{name}=8, say")
