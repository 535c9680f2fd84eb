"""Attacks on a classifier: inputs moved a little, within their box, so that it errs. They are here to test detectors with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwater.errors import InputError, NotFinite
from headwater.features.calls import Call, quiet

Suspicion = Callable[[Tensor, Tensor], Tensor]
"""``suspicion(points (m, ...), rows (m,)) -> (m,)``, differentiable: what a detector says, larger is more suspicious."""


@dataclass(frozen=True, eq=False)
class Attacked:
    """Attacked inputs.

    ``inputs`` (n, ...): at most ``size`` away from the originals, inside the box. ``fooled`` (n,): whether the model no longer gives the label.
    ``suspicion`` (n,): of the detector that was evaded, None for plain attacks. ``name``: in words.
    """

    inputs: Tensor
    fooled: Tensor
    name: str
    suspicion: Tensor | None = None

    def __repr__(self) -> str:
        return f"Attacked({self.name}: {int(self.fooled.sum())} of {len(self.fooled)} inputs fool the model)"


def fgsm(model: Any, inputs: Any, labels: Any, size: float, *, bounds: tuple[float, float] = (0.0, 1.0), batch_size: int = 256) -> Attacked:
    """One step of ``size`` along the sign of the loss's gradient (Goodfellow, Shlens, Szegedy 2014, arXiv 1412.6572).

    Args:
        model: from inputs (n, ...) to logits (n, classes); attacked in eval mode, as it is explained.
        inputs, labels: (n, ...) floating, and (n,) class numbers.
        size: how far each number may move. bounds: the box that all numbers stay in.

    Raises InputError, NotFinite.

    >>> fgsm(torch.nn.Identity(), torch.tensor([[0.5, 0.4]]), [0], size=0.1).inputs
    tensor([[0.4000, 0.5000]])
    """
    return _attack(model, inputs, labels, Walk(size, 1, size, bounds), f"FGSM of size {size:g}", batch_size, 0)


def pgd(
    model: Any,
    inputs: Any,
    labels: Any,
    size: float,
    *,
    steps: int = 20,
    step: float | None = None,
    norm: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    seed: int = 0,
) -> Attacked:
    """Projected gradient ascent of the loss from a random start (Madry et al. 2017, arXiv 1706.06083).

    Args:
        size: how far the input may move, in the ``norm``: ``math.inf`` (each number) or 2 (Euclidean, over all numbers of an example).
        steps, step: how many, and how long each; default ``2.5 size / steps``.
        seed: of the start, which depends on an example's number and the seed, not on the batch.

    Everything else as in :func:`fgsm`.
    """
    walk = Walk(size, steps, 2.5 * size / max(1, steps) if step is None else step, bounds, norm, True)
    measure = "" if norm == math.inf else ", Euclidean"
    return _attack(model, inputs, labels, walk, f"PGD of size {size:g}{measure}, {steps} steps", batch_size, seed)


def evading(
    model: Any,
    inputs: Any,
    labels: Any,
    size: float,
    suspicion: Suspicion,
    *,
    weight: float = 1.0,
    margin: float = 1.0,
    steps: int = 40,
    step: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 128,
    seed: int = 0,
) -> Attacked:
    """The adaptive attack: PGD that knows the detector and lowers its ``suspicion`` as soon as the model is fooled.

    Each step ascends ``min(best other logit - logit of the label, margin) - weight * suspicion``, and of all points met the least suspicious one
    that fools the model is kept (any that comes closest to fooling it where none does). What this finds is an upper bound on what a detector is
    worth against someone who knows it: a stronger attack may do better (Carlini and Wagner 2017, arXiv 1705.07263).

    Args:
        suspicion: see :data:`Suspicion`; ``adversarial.suspicion(detector, model, ...)`` gives the differentiable part of a detector of this room.
        weight: logits that one unit of suspicion is worth. margin: how far beyond the border is far enough.

    Everything else as in :func:`pgd`.
    """
    walk = Walk(size, steps, 2.5 * size / max(1, steps) if step is None else step, bounds, math.inf, True)
    return _attack(model, inputs, labels, walk, f"adaptive PGD of size {size:g}, {steps} steps, weight {weight:g}", batch_size, seed, Evasion(suspicion, weight, margin))


# ---- how far, and how ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How far and in which steps an attack moves; checked."""

    size: float
    steps: int
    step: float
    bounds: tuple[float, float]
    norm: float = math.inf
    random: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size < math.inf or self.steps < 1 or not 0 < self.step < math.inf:
            raise InputError(f"size={self.size}, steps={self.steps}, step={self.step}", "a size and a step above 0, and at least one step", "size=0.1, steps=20")
        if self.norm not in (2, math.inf):
            raise InputError(f"norm={self.norm}", "math.inf or 2", "leave it out for math.inf")
        if not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds={self.bounds}", "the smallest and the largest value that an input may have", "bounds=(0, 1)")

    def start(self, x: Tensor, rows: Tensor, seed: int) -> Tensor:
        """Where it begins: x, or a random point within reach of it."""
        if not self.random:
            return x
        noise = torch.stack([torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(1_000_003 * seed + int(r))) for r in rows.tolist()])
        direction = 2 * noise.to(x) - 1
        return self.within(x + self.size * (direction if self.norm == math.inf else _unit(direction)), x)

    def along(self, gradient: Tensor) -> Tensor:
        """The step that raises the aim most, in the norm."""
        return self.step * (gradient.sign() if self.norm == math.inf else _unit(gradient))

    def within(self, point: Tensor, x: Tensor) -> Tensor:
        """The nearest point that is allowed (for the Euclidean norm: first to the ball, then to the box, which only shortens the way)."""
        away = point - x
        away = away.clamp(-self.size, self.size) if self.norm == math.inf else away * (self.size / _length(away)).clamp(max=1)
        return (x + away).clamp(*self.bounds)


def _length(x: Tensor) -> Tensor:
    """Euclidean, of each example, shaped to divide x."""
    return x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny).view(-1, *(1,) * (x.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    return x / _length(x)


@dataclass(frozen=True)
class Evasion:
    """What the adaptive attack adds to the aim of fooling."""

    suspicion: Suspicion
    weight: float
    margin: float


def _attack(model: Any, inputs: Any, labels: Any, walk: Walk, name: str, batch_size: int, seed: int, evasion: Evasion | None = None) -> Attacked:
    call, y = _checked(model, inputs, labels, walk)
    found: list[tuple[Tensor, ...]] = []
    with quiet(model):
        for rows in torch.arange(call.n, device=call.device).split(batch_size):
            x, mine = call.tensors[0][rows], y[rows]
            found.append(_plain(call, x, mine, rows, walk, seed) if evasion is None else _evaded(call, x, mine, rows, walk, seed, evasion))
    points, fooled, *suspicion = (torch.cat(column) for column in zip(*found, strict=True))
    return Attacked(points, fooled, name, suspicion[0] if suspicion else None)


def _checked(model: Any, inputs: Any, labels: Any, walk: Walk) -> tuple[Call, Tensor]:
    call = Call.of(model, inputs, None)
    if len(call.tensors) != 1 or not call.tensors[0].is_floating_point() or call.tensors[0].ndim < 2:
        raise InputError("inputs that are not one floating tensor (n, ...)", "one, whose numbers can move a little", "bind the others: lambda x: model(x, lengths)")
    low, high = call.tensors[0].aminmax()
    if low < walk.bounds[0] or high > walk.bounds[1]:
        raise InputError(f"inputs from {float(low):g} to {float(high):g}, outside bounds={walk.bounds}", "inputs inside the box", "bounds=(low, high) of your data")
    y = torch.as_tensor(labels, device=call.device)
    if y.shape != (call.n,) or y.is_floating_point():
        raise InputError(f"labels of shape {tuple(y.shape)} and type {y.dtype} for {call.n} inputs", "one class number for each", "labels (n,) int64")
    with quiet(model), torch.no_grad():
        out = call((call.tensors[0][:1],), torch.zeros(1, dtype=torch.int64, device=call.device))
    if out.ndim != 2 or out.shape[1] < 2 or int(y.min()) < 0 or int(y.max()) >= out.shape[1]:
        raise InputError(f"logits of shape {tuple(out.shape)} and labels up to {int(y.max())}", "logits (n, classes) of at least two classes", "check model and labels")
    return call, y.long()


def _plain(call: Call, x: Tensor, y: Tensor, rows: Tensor, walk: Walk, seed: int) -> tuple[Tensor, Tensor]:
    point = walk.start(x, rows, seed)
    for _ in range(walk.steps):
        point = point.detach().requires_grad_()
        gradient = _gradient(F.cross_entropy(call((point,), rows), y, reduction="sum"), point)
        point = walk.within(point.detach() + walk.along(gradient), x)
    with torch.no_grad():
        return point, call((point,), rows).argmax(1) != y


def _evaded(call: Call, x: Tensor, y: Tensor, rows: Tensor, walk: Walk, seed: int, evasion: Evasion) -> tuple[Tensor, Tensor, Tensor]:
    """The least suspicious of all points met that fool the model."""
    point, best = walk.start(x, rows, seed), x.clone()
    reached = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)  # how far beyond the border, at most 0
    least = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    for k in range(walk.steps + 1):
        point = point.detach().requires_grad_()
        logits = call((point,), rows)
        ahead = logits.scatter(1, y[:, None], -math.inf).max(1).values - logits.gather(1, y[:, None])[:, 0]
        suspicion = evasion.suspicion(point, rows).to(x.dtype)
        border = ahead.detach().clamp(max=0)
        better = (border > reached) | ((border == reached) & (suspicion.detach() < least))
        best[better], reached[better], least[better] = point.detach()[better], border[better], suspicion.detach()[better]
        if k < walk.steps:
            gradient = _gradient((ahead.clamp(max=evasion.margin) - evasion.weight * suspicion).sum(), point)
            point = walk.within(point.detach() + walk.along(gradient), x)
    with torch.no_grad():
        return best, call((best,), rows).argmax(1) != y, least


def _gradient(aim: Tensor, point: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(aim, point)
    if not torch.isfinite(gradient).all():
        raise NotFinite("a gradient that is NaN or infinite on the way of an attack", "finite gradients", "attack the model in float64, or check it at the box's edges")
    return gradient
