"""The parts of inputs that scores speak of, and that are changed together: numbers, pixels, cells, superpixels, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError, NotFinite
from headwater.evaluate.probes import Points
from headwater.result import FeatureScores
from headwater.result.arrays import flattened, leaves


@dataclass(frozen=True, eq=False)
class Parts:
    """What is taken away together. ``labels`` (n or 1, F): the part of each number of the (flattened) inputs, below ``count``.

    ``scores`` (n, count): summed over each part. ``present`` (n, count): parts that an example has. ``movable`` (n, F): numbers that may
    change, None for all.
    """

    labels: Tensor
    scores: np.ndarray
    present: np.ndarray
    shapes: tuple[torch.Size, ...]
    movable: Tensor | None = None

    @property
    def count(self) -> int:
        """How many, at most."""
        return self.scores.shape[1]

    @cached_property
    def each(self) -> bool:
        """Whether every number of the inputs is a part of its own, in order."""
        own = torch.arange(self.labels.shape[1], device=self.labels.device)
        return len(self.labels) == 1 and self.count == self.labels.shape[1] and torch.equal(self.labels[0], own)

    def chosen(self, mask: Tensor, rows: Tensor) -> Points:
        """Which numbers of the inputs belong to the parts of ``mask`` (m, count): one boolean tensor (m, ...) for each input."""
        flat = mask.gather(1, self.labels[rows]) if len(self.labels) > 1 else mask if self.each else mask[:, self.labels[0]]
        flat = flat if self.movable is None else flat & self.movable[rows]
        pieces = flat.split([int(np.prod(shape)) for shape in self.shapes], dim=1)
        return tuple(piece.reshape(len(mask), *shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def of(self, scores: Any) -> np.ndarray:
        """Other scores, of the inputs' own shape, summed over the same parts: (n, count)."""
        flat = torch.from_numpy(np.concatenate([flattened(np.asarray(a, dtype=np.float64)) for a in scores], 1))
        labels = self.labels.cpu().expand(len(flat), -1)
        return torch.zeros(len(flat), self.count, dtype=torch.float64).scatter_add_(1, labels, flat).numpy()


def parts_of(values: tuple[np.ndarray, ...], x: Points, parts: Any = None, movable: Tensor | None = None) -> Parts:
    """The parts of inputs that scores speak of.

    Args:
        values: scores, an array for each input. They may lack axes, or have 1 in their place: pixels with their channels summed, tokens of
            embedded texts.
        parts: None (each number of the scores is a part), a whole number c (cells of c by c places, all channels together; c in a row where
            the inputs have one axis), or labels: whole numbers of the inputs' shape without the examples, with them, or without channels.
            Several inputs: a tuple of such.
        movable: (n, F), numbers of the inputs that may change; a part of which none may is no part of that example.

    Raises InputError for shapes that do not fit, and labels that split what the scores hold together.
    """
    n = len(x[0])
    if len(values) != len(x) or any(len(v) != n for v in values):
        raise InputError(
            f"scores of shapes {[v.shape for v in values]} for inputs of shapes {[tuple(t.shape) for t in x]}",
            "one array of scores for each input, for the same examples",
            "explain these inputs, not a layer",
        )
    default, sizes = [], [int(np.prod(v.shape[1:])) for v in values]
    for k, (v, t) in enumerate(zip(values, x, strict=True)):
        default.append(_laid(v.shape[1:], tuple(t.shape[1:])).reshape(-1) + sum(sizes[:k]))
    own = torch.from_numpy(np.concatenate(default))
    flat = torch.from_numpy(np.concatenate([flattened(v) for v in values], 1).astype(np.float64))
    if not torch.isfinite(flat).all():
        raise NotFinite("scores that are NaN or infinite", "finite scores", "explain again, and look at the notes")
    shapes = tuple(t.shape[1:] for t in x)
    if parts is None:
        labels, sums = own[None], flat
    else:
        labels = _labels(parts, x)
        groups = torch.zeros(len(labels), sum(sizes), dtype=torch.long).scatter_(1, own.expand(len(labels), -1), labels)
        if not torch.equal(groups.gather(1, own.expand(len(labels), -1)), labels):
            expected = "parts of whole pixels or tokens, as the scores have them"
            raise InputError("parts that split what the scores hold together", expected, "keep the channels of a place in one part")
        sums = torch.zeros(n, int(labels.max()) + 1, dtype=torch.float64).scatter_add_(1, groups.expand(n, -1), flat)
    may = torch.ones(1, labels.shape[1], dtype=torch.bool) if movable is None else movable.cpu()
    rows = max(len(labels), len(may))
    present = torch.zeros(rows, sums.shape[1]).scatter_add_(1, labels.expand(rows, -1), may.float().expand(rows, -1)) > 0
    device = x[0].device
    return Parts(labels.to(device), sums.numpy(), present.expand(n, -1).numpy(), shapes, None if movable is None else movable.to(device))


def arrays_of(scores: Any) -> tuple[np.ndarray, ...]:
    """The arrays (n, ...) of FeatureScores, of a tensor, an array, or a tuple or dict of them."""
    held = scores.values if isinstance(scores, FeatureScores) else scores
    if isinstance(held, np.ndarray | tuple | dict):
        return tuple(_numpy(a) for a in leaves(held))
    return (_numpy(held),)


def _numpy(held: Any) -> np.ndarray:
    return held.detach().cpu().double().numpy() if isinstance(held, Tensor) else np.asarray(held, dtype=np.float64)


def _laid(mine: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
    """The number of the score that each place of an input (``whole``) belongs to."""
    numbers = np.arange(int(np.prod(mine))).reshape(mine)
    if mine == whole[: len(mine)]:
        return np.broadcast_to(numbers.reshape(mine + (1,) * (len(whole) - len(mine))), whole)
    try:
        return np.broadcast_to(numbers, whole)
    except ValueError as error:
        raise InputError(
            f"scores of shape (n, {', '.join(map(str, mine))}) for inputs (n, {', '.join(map(str, whole))})",
            "the same shape, or without channels",
            "give the scores of these inputs",
        ) from error


def _labels(parts: Any, x: Points) -> Tensor:
    """(n or 1, F) long, each input's labels after those of the inputs before it."""
    each = parts if isinstance(parts, tuple | list) and len(x) > 1 else (parts,) * len(x)
    if len(each) != len(x) or (len(x) > 1 and isinstance(parts, np.ndarray | Tensor)):
        raise InputError(f"parts for {len(each)} of {len(x)} inputs", "a tuple with parts for each", "parts=(labels, labels)")
    found, first = [], 0
    for one, t in zip(each, x, strict=True):
        labels = _cells(one, tuple(t.shape[1:])) if isinstance(one, int) and not isinstance(one, bool) else _given(one, tuple(t.shape))
        found.append(labels.reshape(len(labels), -1) + first)
        first += int(labels.max()) + 1
    rows = max(len(labels) for labels in found)
    return torch.cat([labels.expand(rows, -1) for labels in found], 1)


def _cells(size: int, shape: tuple[int, ...]) -> Tensor:
    """Labels (1, *shape) of cells over the last two axes, or the only one."""
    if size < 1 or not shape:
        raise InputError(f"parts={size} for inputs of shape (n, {', '.join(map(str, shape))})", "cells of at least one place", "parts=4, say")
    places = [torch.arange(k) // size for k in shape[-2:]]
    label = places[0] if len(places) == 1 else places[0][:, None] * (int(places[1].max()) + 1) + places[1]
    return label.expand(1, *shape)


def _given(labels: Any, shape: tuple[int, ...]) -> Tensor:
    table = torch.as_tensor(np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels))
    if table.is_floating_point() or table.dtype == torch.bool or table.numel() == 0 or bool((table < 0).any()):
        raise InputError("parts that are not whole numbers from 0", "a label for each place", "np.unique(labels, return_inverse=True)[1] makes them")
    table = table.long()
    for laid in (table if table.shape[:1] == shape[:1] and table.ndim == len(shape) else table[None], table[:, None] if table.ndim == len(shape) - 1 else table[None]):
        try:
            return laid.expand(len(laid), *shape[1:]).contiguous()
        except RuntimeError:
            continue
    raise InputError(
        f"parts of shape {tuple(table.shape)} for inputs of shape {shape}", "labels of the inputs' shape, with or without examples and channels", "check them"
    )
