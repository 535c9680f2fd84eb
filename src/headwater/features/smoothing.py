"""Noise on the input: SmoothGrad-style averaging of any attribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from headwater.errors import InputError
from headwater.tasks.draws import Draws


@dataclass(frozen=True)
class Smooth:
    """Explain noisy copies of each input and average (Smilkov et al. 2017, arXiv 1706.03825). The result carries a standard error.

    Args:
        draws: copies of each input.
        spread: standard deviation of the noise, as a share of the input's range (its largest minus its smallest value).

    Attributions then sum to the mean output of the noisy copies minus the output at the baseline.

    >>> Smooth(draws=4, spread=0.1)
    Smooth(draws=4, spread=0.1)
    """

    draws: int = 16
    spread: float = 0.1

    def __post_init__(self) -> None:
        if self.draws < 1 or self.spread < 0:
            raise InputError(f"Smooth(draws={self.draws}, spread={self.spread})", "at least one draw, and a spread of at least 0", "hw.Smooth(16, 0.1)")

    def noisy(self, x: Tensor, rows: Sequence[int], draw: int, seed: int) -> Tensor:
        """Copy number ``draw`` of x (m, ...): the noise of an example depends on its number in ``rows``, the draw and the seed alone."""
        low, high = x.flatten(1).double().aminmax(dim=1)
        noise = Draws(seed * 1_000_003 + draw, rows, x.device).normal(*x.shape[1:])
        return (x.double() + noise * (self.spread * (high - low)).view(-1, *(1,) * (x.ndim - 1))).to(x.dtype)
