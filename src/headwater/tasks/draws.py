"""Random numbers that belong to an example, not to a batch: the same whatever the batch size, order or device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Draws:
    """A stream of random numbers for each example of a batch, keyed by (seed, example id) through the counter-based Philox.

    Every call continues the streams, so two calls give different numbers; a longer draw begins with the shorter one.

    >>> a = Draws(seed=0, ids=[7, 3]).uniform(4)
    >>> b = Draws(seed=0, ids=[3]).uniform(2)
    >>> bool((a[1, :2] == b[0]).all())
    True
    """

    def __init__(self, seed: int, ids: Iterable[int], device: torch.device | str = "cpu") -> None:
        self._streams = [np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), int(i)])) for i in ids]
        self._device = device

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), shape (n, *shape), float64."""
        return torch.from_numpy(np.stack([s.random(shape) for s in self._streams])).to(self._device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, shape (n, *shape), float64 (by the inverse distribution function, so prefixes agree)."""
        u = self.uniform(*shape).clamp(1e-16, 1 - 1e-16)
        return torch.special.ndtri(u)

    def categorical(self, logits: Tensor) -> Tensor:
        """One class per position from ``softmax(logits)``: logits (n, ..., classes) -> (n, ...) int64."""
        cumulative = logits.detach().double().softmax(-1).cumsum(-1)
        u = self.uniform(*logits.shape[1:-1]).to(logits.device)
        return (cumulative < u.unsqueeze(-1)).sum(-1).clamp_max(logits.shape[-1] - 1)
