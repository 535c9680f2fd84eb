"""Carried queries of layers applied once per example, taken apart: a multiple of the query's own outer product, and the rest, which lies
on the few coordinates where curvature acts.

Carrying a query back through later segments makes a full matrix of it, which costs a full inner product with every example. But what
training contracts is only what lies along large eigenvalues: elsewhere the matrix stays a multiple of the query's gradient
``out in^T``, whose product with an example's ``g a^T`` is that of its factors, ``(out . g)(in . a)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.capture import BlockGradient
from headwater.influence.vectors import Factored, Side, Whole, factors, is_rank_one
from headwater.linalg.operators import room

SAMPLE = 512
"""Examples from whose squared coordinates it is told which of them matter."""


@dataclass(frozen=True)
class Parted:
    """``like`` (queries), factors of the multiple; ``rest`` (queries, k) on the coordinates ``pairs`` (2, k): rows of out and in."""

    like: Factored
    pairs: Tensor
    rest: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rest)

    def dot(self, gradient: BlockGradient) -> Tensor:
        """(queries, n)."""
        if not is_rank_one(gradient):
            return gradient.dot(self.whole())
        g, a = (t.to(self.rest.dtype) for t in factors(gradient))
        total = (self.like.out @ g.mT) * (self.like.inner @ a.mT)
        g, a = g.mT.contiguous(), a.mT.contiguous()
        step = max(1, room(total) // max(1, *total.shape))
        for i in range(0, self.rest.shape[1], step):
            part = slice(i, i + step)
            total.addmm_(self.rest[:, part], g.index_select(0, self.pairs[0, part]).mul_(a.index_select(0, self.pairs[1, part])))
        return total

    def whole(self) -> Tensor:
        """(queries, *shape)."""
        flat = self.like.whole().flatten(1)
        flat[:, self.pairs[0] * self.shape[-1] + self.pairs[1]] += self.rest
        return flat.reshape(len(self), *self.shape)


def parted(side: Whole, raw: Factored, energy: Tensor, tolerance: float) -> Side | Parted:
    """``side`` taken apart, both in one basis; itself where that would save nothing.

    What is left out of the rest changes scores by at most ``tolerance`` of their size (root mean square), for examples whose squared
    coordinates are ``energy`` (out, in) in the mean and that differ independently.
    """
    values, own, weight = side.values.flatten(1), raw.whole().flatten(1), energy.flatten().double()
    quiet = weight.argsort()[: len(weight) // 2]
    multiple = (values[:, quiet] * own[:, quiet]).sum(1) / own[:, quiet].square().sum(1).clamp_min(torch.finfo(own.dtype).tiny)
    rest = values - multiple.unsqueeze(1) * own
    lost = rest.square().mean(0).double() * weight
    order = lost.argsort()
    allowed = tolerance**2 * float((values.square().mean(0).double() * weight).sum())
    kept = order[int((lost[order].cumsum(0) <= allowed).sum()) :].sort().values
    if len(kept) > len(weight) // 4:
        return side
    width = energy.shape[1]
    pairs = torch.stack([kept // width, kept % width])
    return Parted(Factored(raw.out * multiple.unsqueeze(1), raw.inner), pairs, rest[:, kept].contiguous(), side.values.shape[1:])
