"""Holding a replay against the record, step by step: losses, gradients' norms, and weights at every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.training.replay.player import Gradient, Player
from headwater.training.replay.script import Move
from headwater.training.replay.state import State


@dataclass(frozen=True)
class Departure:
    """The first sign that a replay left the record. ``steps``: (first, last) step that can be to blame; ``what``: "norm" of the gradient
    or "weights"; ``found`` and ``recorded``: the norms, or for weights ``found`` their distance relative to how far training had gone."""

    steps: tuple[int, int]
    what: str
    found: float
    recorded: float


@dataclass
class Witness:
    """Watches one sweep from the first step on.

    Rounding is forgiven up to ``tolerance``: of gradient norms relative to the largest so far, of weights relative to how far training
    has moved them. Default ``3 sqrt(eps)`` of the weights' precision (1e-3 in float32, 4e-8 in float64): differences in the order of
    additions start at eps and grow along a training, while an unrecorded dropout mask, clipping or augmentation shows at once and large.

    ``next``: the step that it waits for (states made again later are not looked at twice). ``worst``: the largest distance met. ``exact``:
    whether every recorded weight and buffer was met to the last bit (norms are summed in another order: not counted). ``losses``: the
    largest distance of recorded losses, relative to the largest loss (None: none was recorded); it is reported and fails nothing, as loops
    log losses in units of their own.
    """

    player: Player
    tolerance: float
    next: int = 1
    worst: float = 0.0
    exact: bool = True
    losses: float | None = None
    norms: int = 0
    checkpoints: list[int] = field(default_factory=list)
    _largest_norm: float = 0.0
    _largest_loss: float = 0.0
    _good: int = 0

    @classmethod
    def of(cls, player: Player, tolerance: float | None) -> Witness:
        """With the default tolerance of the model's precision."""
        kinds = [p.dtype for p in player.model.parameters() if p.is_floating_point()]
        eps = max(torch.finfo(kind).eps for kind in kinds)
        return cls(player, 3 * eps**0.5 if tolerance is None else tolerance)

    def gradient(self, move: Move, gradient: Gradient) -> Departure | None:
        """Hold a step's gradient against the record."""
        if not np.isnan(move.loss):
            self._largest_loss = max(self._largest_loss, abs(move.loss), abs(gradient.loss))
            self.losses = max(self.losses or 0.0, abs(gradient.loss - move.loss) / (self._largest_loss or 1.0))
        if np.isnan(move.norm) or not move.moved:
            return None
        found = gradient.norm
        self._largest_norm = max(self._largest_norm, found, move.norm)
        self.norms += 1
        if not abs(found - move.norm) <= self.tolerance * self._largest_norm:
            return Departure((move.step, move.step), "norm", found, move.norm)
        self._good = move.step
        return None

    def state(self, state: State) -> Departure | None:
        """Hold the state after a step against its checkpoint, if there is one."""
        self.next = state.step + 1
        if state.step not in self.player.run.checkpoints or state.step == 0:
            return None
        then, held = self.player.run.weights(0), self.player.run.weights(state.step)
        now = {**state.weights, **state.buffers}
        self.exact &= all(_same(t, held[n]) for n, t in now.items() if n in held)
        apart, gone = distance(state.weights, held), distance(held, then, state.weights)
        off = apart / gone if gone else apart
        self.worst = max(self.worst, off) if not np.isnan(off) else np.nan
        start = self.checkpoints[-1] if self.checkpoints else 0
        self.checkpoints.append(state.step)
        return None if off <= self.tolerance else Departure((min(max(start, self._good) + 1, state.step), state.step), "weights", off, 0.0)

    def report(self) -> dict[str, Any]:
        """What was compared and how near it was, as plain JSON."""
        return {"checkpoints": self.checkpoints, "norms": self.norms, "bit_for_bit": self.exact, "weights_apart": self.worst, "losses_apart": self.losses}

    def __str__(self) -> str:
        how = "bit for bit" if self.exact else f"within {self.worst:.1e} of the distance that training moved them"
        losses = "" if self.losses is None else f", losses within {self.losses:.1e}"
        return f"the replay meets {len(self.checkpoints)} checkpoints {how}{losses}"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to("cpu"), b)


def distance(a: dict[str, Tensor], b: dict[str, Tensor], names: Any = None) -> float:
    """Of two sets of tensors, over ``names`` (default: those of the first)."""
    found = [torch.linalg.vector_norm(a[n].to("cpu").double() - b[n].to("cpu").double()) for n in (names or a)]
    return float(torch.linalg.vector_norm(torch.stack(found)))
