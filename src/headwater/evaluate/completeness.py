"""Do the values of an explanation sum to what they must?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of, written
from headwater.result import FeatureScores
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class Completeness:
    """The completeness gap of every example (see :func:`completeness`).

    ``absolute``, ``relative`` (n,): ``|Σφ - (f(x) - f(b))|``, and over ``|f(x) - f(b)|``. ``error`` (n,): the estimated error of the values, or
    None. ``tolerance``: relative; ``met`` (n,): whether it is met, ``mean``: the share that meets
    it, with its interval.
    """

    absolute: np.ndarray
    relative: np.ndarray
    error: np.ndarray | None
    tolerance: float
    met: np.ndarray
    mean: Mean
    method: str

    @property
    def share(self) -> float:
        """The share of examples that meet the tolerance."""
        return self.mean.mean

    @property
    def rows(self) -> dict[str, tuple[float, float, float]]:
        """Median, 95th percentile and worst of the absolute gap, the relative one and, where it is known, the estimated error."""
        found = {"absolute residual": self.absolute, "relative residual": self.relative}
        found |= {} if self.error is None else {"estimated error": self.error}
        return {name: tuple(map(float, np.percentile(v, [50, 95, 100], method="higher"))) for name, v in found.items()}  # type: ignore[misc]

    def __repr__(self) -> str:
        said = "; ".join(f"{name} {written(m)} median, {written(p)} p95, {written(w)} worst" for name, (m, p, w) in self.rows.items())
        return f"Completeness({self.method}: {self.mean} of {len(self.met)} examples within {self.tolerance:g}; {said}; good: all within; necessary, not sufficient)"

    @property
    def table(self) -> report.Table:
        """For a report."""
        return report.Table(("", "median", "95th percentile", "worst"), tuple((name, *map(written, row)) for name, row in self.rows.items()))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example: absolute, relative, error, met. Needs pandas."""
        error = np.full(len(self.met), np.nan) if self.error is None else self.error
        return pandas_library().DataFrame({"example": np.arange(len(self.met)), "absolute": self.absolute, "relative": self.relative, "error": error, "met": self.met})


def completeness(scores: FeatureScores, tolerance: float = 1e-2, *, bootstrap: int = 1000, seed: int = 0) -> Completeness:
    """``Σφ = f(x) - f(b)`` (Sundararajan et al. 2017, arXiv 1703.01365, Proposition 1): how far is each example from it?

    Good: every relative residual within the tolerance; exact integrators reach round-off. It is *necessary, not sufficient*: any numbers with the
    right sum pass, and errors of opposite sign cancel. On networks with kinks the error of the values is 1.6 to 3.3 times the residual at a
    fixed number of points, and about ten times where the residual itself is the stopping rule; so the estimated error stands beside it.

    Args:
        tolerance: relative to ``|f(x) - f(b)|``. Where that is 0 only an exact sum meets it. ``bootstrap``, ``seed``: of the interval.

    >>> e = FeatureScores(np.array([[1.0, -0.5]]), np.array([0.001]), np.array([16]), np.array([2.0]), np.array([1.501]), "by hand", "f", "zeros")
    >>> completeness(e).share
    1.0
    """
    if not scores.n:
        raise InputError("scores of no examples", "at least one example", "explain some inputs")
    if not tolerance >= 0:
        raise InputError(f"tolerance={tolerance}", "at least 0", "tolerance=1e-2")
    relative = scores.relative_residual
    met = relative <= tolerance
    return Completeness(np.abs(scores.residual), relative, scores.error, tolerance, met, mean_of(met.astype(float), bootstrap, seed), scores.method)
