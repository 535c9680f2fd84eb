"""The state of a training between two steps: weights, what the optimizer remembers, and buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headwater.training.replay.updates import Moments


@dataclass(frozen=True, eq=False)
class State:
    """After ``step`` steps. ``weights``: of the parameters that some stage trains. ``moments``: what the optimizer remembers of each that
    it moved. ``counts``: how often it moved each (for SGD: with momentum). ``buffers``: all of the model's. Never written to."""

    step: int
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    moments: dict[str, Moments] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory for one more of it: weights and moments, and the buffers that training changes (with the rest, an upper bound)."""
        return sum(t.numel() * t.element_size() for t in self.flat().values())

    def flat(self) -> dict[str, Tensor]:
        """All tensors by a path, for the disk."""
        out = {f"weights/{n}": t for n, t in self.weights.items()} | {f"buffers/{n}": t for n, t in self.buffers.items()}
        return out | {f"moments/{key}/{n}": t for n, held in self.moments.items() for key, t in held.items()}

    def facts(self) -> dict[str, Any]:
        """The rest, as plain JSON."""
        return {"step": self.step, "counts": self.counts}

    @classmethod
    def of(cls, flat: dict[str, Tensor], facts: dict[str, Any], device: Any) -> State:
        """The inverse of :meth:`flat` and :meth:`facts`."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "buffers": {}}
        moments: dict[str, Moments] = {}
        for path, tensor in flat.items():
            kind, _, name = path.partition("/")
            if kind == "moments":
                key, _, name = name.partition("/")
                moments.setdefault(name, {})[key] = tensor.to(device)
            else:
                parts[kind][name] = tensor.to(device)
        return cls(facts["step"], parts["weights"], parts["buffers"], moments, {n: int(c) for n, c in facts["counts"].items()})
