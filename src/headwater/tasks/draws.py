"""Random numbers that belong to an example, not to a batch: the same whatever the batch size, order or device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**23  # probabilities held at once


class Draws:
    """A stream of random numbers for each example of a batch, keyed by (seed, example id) through the counter-based Philox.

    Every call continues the streams, so two calls give different numbers; a longer draw begins with the shorter one.
    :meth:`at` begins them again, for some of the examples.

    >>> a = Draws(seed=0, ids=[7, 3]).uniform(4)
    >>> b = Draws(seed=0, ids=[3]).uniform(2)
    >>> bool((a[1, :2] == b[0]).all())
    True
    """

    def __init__(self, seed: int, ids: Iterable[int], device: torch.device | str = "cpu") -> None:
        keys = [np.array([seed & (2**64 - 1), int(i)], dtype=np.uint64) for i in ids]
        self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self._device = device
        self._head = torch.empty(len(self._streams), 0, dtype=torch.float64)  # what the streams began with, once :meth:`at` is used

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), shape (n, *shape), float64."""
        numbers = np.stack([s.random(shape) for s in self._streams]) if self._streams else np.empty((0, *shape))
        return torch.from_numpy(numbers).to(self._device)

    def at(self, positions: Tensor) -> Draws:
        """The same streams from their beginning, for the examples at ``positions`` (a tensor, perhaps a batched one under vmap):
        however a batch is cut or how often it is run, its examples meet the same numbers."""
        return _Replay(self, positions)

    def _first(self, count: int) -> Tensor:
        """The first ``count`` numbers of every stream, (n, at least count)."""
        if count > self._head.shape[1]:
            self._head = torch.cat([self._head, Draws.uniform(self, count - self._head.shape[1]).to(self._head.device)], 1)
        return self._head

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, shape (n, *shape), float64 (by the inverse distribution function, so prefixes agree)."""
        u = self.uniform(*shape).clamp(1e-16, 1 - 1e-16)
        return torch.special.ndtri(u)

    def categorical(self, logits: Tensor) -> Tensor:
        """One class per position from ``softmax(logits)``: logits (n, ..., classes) -> (n, ...) int64."""
        classes = logits.shape[-1]
        u = self.uniform(*logits.shape[1:-1]).to(logits.device)
        step = max(1, _CHUNK // classes)  # a vocabulary in float64 at every position of a batch would not fit
        parts = zip(logits.detach().reshape(-1, classes).split(step), u.reshape(-1, 1).split(step), strict=True)
        drawn = [(part.double().softmax(-1).cumsum(-1) <= level).sum(-1).clamp_max(classes - 1) for part, level in parts]
        return torch.cat(drawn).reshape(u.shape)


class _Replay(Draws):
    """See :meth:`Draws.at`."""

    def __init__(self, whole: Draws, positions: Tensor) -> None:
        self._whole, self._positions, self._used = whole, positions, 0

    def uniform(self, *shape: int) -> Tensor:
        start, self._used = self._used, self._used + math.prod(shape)
        numbers = self._whole._first(self._used)[:, start : self._used].to(self._positions.device)
        return numbers[self._positions].reshape(*self._positions.shape, *shape)
