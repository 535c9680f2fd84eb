"""Means over examples with their interval: every judgement of attributions here ends in one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over examples, and the 95 % interval ``low`` ... ``high`` of a bootstrap that redraws examples (NaN where there are fewer than two).

    ``examples``: how many entered. The interval covers the choice of examples; not that of the model, its training or the baseline.

    >>> Mean(0.5, 0.25, 0.75, 8)
    0.500 [0.250, 0.750]
    """

    mean: float
    low: float
    high: float
    examples: int

    def __repr__(self) -> str:
        interval = "no interval" if np.isnan(self.low) else f"{written(self.low)}, {written(self.high)}"
        return f"{written(self.mean)} [{interval}]"

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The interval as the report's bars take it: both ends or neither."""
        return (None, None) if np.isnan(self.low) else (self.low, self.high)


def mean_of(values: np.ndarray, bootstrap: int = 1000, seed: int = 0) -> Mean:
    """The mean of ``values`` (n,) and its interval; NaN marks examples for which nothing is defined, and they are left out.

    >>> mean_of(np.array([1.0, 1.0, np.nan]))
    1.000 [1.000, 1.000]
    """
    kept = values[~np.isnan(values)]
    if len(kept) < 2:
        return Mean(float(kept.mean()) if len(kept) else float("nan"), float("nan"), float("nan"), len(kept))
    rng, step = np.random.default_rng(seed), max(1, 2**22 // len(kept))
    blocks = [kept[rng.integers(len(kept), size=(min(step, bootstrap - done), len(kept)))].mean(1) for done in range(0, bootstrap, step)]
    low, high = np.percentile(np.concatenate(blocks), [2.5, 97.5])
    return Mean(float(kept.mean()), float(low), float(high), len(kept))


def written(value: float) -> str:
    """Three places, or three digits where that would say 0.

    >>> written(0.5), written(3e-9), written(12345.0)
    ('0.500', '3e-09', '1.23e+04')
    """
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
