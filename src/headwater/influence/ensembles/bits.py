"""Which units a mask keeps: from a counter, so that a unit's fate depends on what names it and on nothing else.

Every unit has coordinates in its layer's output (channel, row, column; or position, feature), and each axis is one word of a Philox
counter. So the fate of a unit is the same on every device, whatever the batch, and however long the other axes are: padding a
sequence changes nothing of what comes before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater.philox import philox

_WORD = 0xFFFFFFFF
AXES = 4
"""Axes with a counter word of their own; more than these are counted as one, in front."""


def kept(key: tuple[int, int], rate: float, shape: tuple[int, ...], ids: Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
    """Whether each unit is kept (with probability ``1 - rate``): booleans of ``shape``, or (n, *shape) with one draw for each of ``ids`` (n,).

    >>> from headwater.philox import key_of
    >>> key = key_of("a mask")
    >>> longer, shorter = kept(key, 0.5, (9, 4)), kept(key, 0.5, (5, 4))
    >>> bool((longer[:5] == shorter).all())
    True
    """
    if ids is not None:
        device = ids.device
    axes = (1,) * (AXES - len(shape)) + tuple(shape)
    axes = (torch.Size(axes[: len(axes) - AXES + 1]).numel(), *axes[len(axes) - AXES + 1 :])
    blocks = (*axes[:-1], -(-axes[-1] // 4))  # one counter gives four words: four neighbours on the last axis
    places = [torch.arange(size, device=device).reshape([-1 if k == axis else 1 for k in range(AXES)]).expand(blocks) for axis, size in enumerate(blocks)]
    words: Any = key if ids is None else _own_keys(key, ids)
    drawn = torch.stack(philox((places[3], places[2], places[1], places[0]), words), -1).flatten(-2)[..., : axes[-1]]
    lead = () if ids is None else (ids.shape[0],)
    return (drawn >= round(rate * 2**32)).reshape((*lead, *shape))


def _own_keys(key: tuple[int, int], ids: Tensor) -> tuple[Tensor, Tensor]:
    """A key for each id, each (n, 1, 1, 1, 1)."""
    zero = torch.zeros_like(ids)
    first, second, _, _ = philox((ids & _WORD, (ids >> 32) & _WORD, zero, zero), key)
    return first.reshape(-1, *[1] * AXES), second.reshape(-1, *[1] * AXES)
