"""The noise of an event, made from its seed by a counter (:mod:`headwater.philox`): the same in any batch, order, precision and device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.philox import Key, key_of, normals, philox, words

NOISE = key_of("headwater", "noise", 1)
"""The stream that all noise comes from: row = the event's seed."""
OFFSETS = key_of("headwater", "noise offset", 1)
DROPPED = key_of("headwater", "condition dropped", 1)
_WORD = 0xFFFFFFFF
_KEPT = 2**22  # numbers of shared noise that are remembered from batch to batch


def noise_of(seeds: Tensor, shape: torch.Size, dtype: torch.dtype, device: Any) -> Tensor:
    """The noise (n, k, *shape) of the seeds (n, k): standard normal, drawn once for each seed, wherever it occurs. In ``dtype``, cast from
    numbers that do not depend on it."""
    count = math.prod(shape)
    if len(seeds) > 1 and bool((seeds == seeds[:1]).all()):  # shared by all examples: one copy, seen n times
        return _shared(tuple(seeds[0].tolist()), count, dtype, str(device)).view(1, seeds.shape[1], *shape).expand(len(seeds), -1, *shape)
    unique, where = torch.unique(seeds, return_inverse=True)
    if len(unique) == seeds.numel():
        return _drawn(seeds.flatten(), count, dtype, device).view(*seeds.shape, *shape)
    return _drawn(unique, count, dtype, device)[where.to(device)].view(*seeds.shape, *shape)


def offset_by(eps: Tensor, seeds: Tensor, offset: float) -> Tensor:
    """Noise (n, k, channels, ...) with ``offset`` times one standard normal number for each event and channel added."""
    own = normals(OFFSETS, seeds.flatten().to(eps.device), range(eps.shape[2]), dtype=eps.dtype)
    return eps + offset * own.view(*eps.shape[:3], *[1] * (eps.ndim - 3))


def _drawn(seeds: Tensor, count: int, dtype: torch.dtype, device: Any) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return normals(NOISE, seeds.to(device), range(count), dtype=wide).to(dtype)


def _shared(seeds: tuple[int, ...], count: int, dtype: torch.dtype, device: str) -> Tensor:
    make = _remembered if len(seeds) * count <= _KEPT else _remembered.__wrapped__
    return make(seeds, count, dtype, device)


@lru_cache(maxsize=4)
def _remembered(seeds: tuple[int, ...], count: int, dtype: torch.dtype, device: str) -> Tensor:
    return _drawn(torch.tensor(seeds), count, dtype, device)


def seeds_of(key: Key, ids: np.ndarray, events: list[tuple[int, int]]) -> Tensor:
    """A seed below 2**62 for each of ``ids`` and each of ``events`` (timestep, draw), (n, k)."""
    who = torch.from_numpy(np.array(ids, dtype=np.int64))[:, None]
    t, draw = torch.tensor(events, dtype=torch.int64).T[:, None]
    shape = (len(who), len(events))
    counter = tuple(word.expand(shape) for word in (who & _WORD, who >> 32, t, draw))
    first, second, _, _ = philox(counter, key)  # type: ignore[arg-type]
    return ((first >> 1) << 31) + (second >> 1)


def dropped(seeds: Tensor, probability: float) -> Tensor:
    """Which events leave the condition out, (n, k): decided by their seeds."""
    found = words(DROPPED, seeds.flatten(), range(1))[:, 0]
    return (found.double() / 2**32 < probability).view(seeds.shape)
