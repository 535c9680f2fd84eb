"""Where a path runs through a network: its inputs, the embeddings of its ids, or its layers, each as a gradient field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.calls import Call
from headwater.features.layers import Seat, Taps, neuron, replaced
from headwater.features.targets import Target

Points = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """Where the path runs: some of the inputs, and the outputs of some modules (embeddings of ids, or layers).

    ``inputs``: which inputs move. ``seats``: whose tensors move. ``ids``: for each seat the input whose embedding it is (embeddings only).
    """

    call: Call
    target: Target
    inputs: tuple[int, ...]
    seats: tuple[Seat, ...] = ()
    ids: tuple[int, ...] = ()

    def output(self, points: Points, rows: Tensor) -> Tensor:
        """What is explained, (m,), at points (m, ...)."""
        with replaced(self.seats, points[len(self.inputs) :]):
            return self.target.pick(self.call(self.filled(points, rows), rows), rows)

    def filled(self, points: Points, rows: Tensor) -> Points:
        """All inputs (m, ...) of the examples ``rows``, the moving ones at ``points``."""
        place = {i: k for k, i in enumerate(self.inputs)}
        return tuple(points[place[i]] if i in place else t[rows] for i, t in enumerate(self.call.tensors))

    def field(self, points: Points, rows: Tensor) -> tuple[Tensor, Points]:
        """The output and its gradients there."""
        at = tuple(p.detach().requires_grad_() for p in points)
        value = self.output(at, rows)
        if not value.requires_grad:
            raise independent()
        found = torch.autograd.grad(value.sum(), at, allow_unused=True)
        if all(g is None for g in found):
            raise independent()
        return value.detach(), tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, at, strict=True))

    def value(self, points: Points, rows: Tensor) -> Tensor:
        """The output there, without a graph."""
        with torch.no_grad():
            return self.output(points, rows)

    def values(self, tensors: Points, rows: Tensor, chunk: int) -> Points:
        """Where the inputs ``tensors`` (m, ...) of examples ``rows`` lie: points (m, ...)."""
        moving = tuple(tensors[i] for i in self.inputs)
        if not self.seats:
            return moving
        taps = Taps(self.seats)
        parts = []
        for s in torch.arange(len(rows), device=rows.device).split(chunk):
            with torch.no_grad(), taps.open():
                self.call(tuple(t[s] for t in tensors), rows[s])
            parts.append(tuple(t.detach().clone() for t in taps.tensors))
        return moving + tuple(torch.cat(column) for column in zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class Flow:
    """A layer met on the way: the path runs over the inputs, the increments are those of the layer (conductance).

    With ``unit`` the attributions are those of the inputs, through that unit of the layer alone (neuron conductance).
    """

    site: Site
    seats: tuple[Seat, ...]
    unit: tuple[int, ...] | None = None

    def layer(self, points: Points, rows: Tensor) -> Points:
        """The layer's values (m, ...) at points."""
        taps = Taps(self.seats)
        with torch.no_grad(), taps.open():
            self.site.output(points, rows)
        return tuple(t.detach().clone() for t in taps.tensors)

    def field(self, points: Points, rows: Tensor) -> tuple[Tensor, Points]:
        """The output, and its gradients with respect to the layer."""
        value, hidden, found = self._through(points, rows)
        return value.detach(), tuple(torch.zeros_like(h) if g is None else g for g, h in zip(found, hidden, strict=True))

    def unit_field(self, points: Points, rows: Tensor) -> tuple[Tensor, Points]:
        """The output, and the part of its gradients with respect to the points that flows through the unit."""
        at = tuple(p.detach().requires_grad_() for p in points)
        value, hidden, found = self._through(at, rows)
        unit = neuron(hidden[0], self.unit or ())
        share = torch.zeros_like(hidden[0]) if found[0] is None else found[0]
        flows = torch.autograd.grad((neuron(share, self.unit or ()).detach() * unit).sum(), at, allow_unused=True)
        return value.detach(), tuple(torch.zeros_like(p) if g is None else g for g, p in zip(flows, at, strict=True))

    def _through(self, points: Points, rows: Tensor) -> tuple[Tensor, Points, Sequence[Tensor | None]]:
        at = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in points)
        taps = Taps(self.seats)
        with taps.open():
            value = self.site.output(at, rows)
        if not value.requires_grad:
            raise independent()
        return value, taps.tensors, torch.autograd.grad(value.sum(), taps.tensors, allow_unused=True, retain_graph=True)


@dataclass(frozen=True, eq=False)
class UnitSite(Site):
    """Where the inputs move, and one unit of a layer is explained."""

    watched: tuple[Seat, ...] = ()
    unit: tuple[int, ...] = ()

    def output(self, points: Points, rows: Tensor) -> Tensor:
        """The unit's activation (m,)."""
        taps = Taps(self.watched)
        with replaced(self.seats, points[len(self.inputs) :]), taps.open():
            self.call(self.filled(points, rows), rows)
        return neuron(taps.tensors[0], self.unit)


def independent() -> InputError:
    """The error of an output that autograd cannot follow back to the input."""
    return InputError(
        "an output that does not depend on the input (as autograd sees it)",
        "an output computed from the input by differentiable operations",
        "check for .detach(), .item(), argmax, rounding or numpy inside the model; a function without gradients can be explained as a black box, on numpy arrays",
    )
