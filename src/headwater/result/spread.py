"""How much the members of an ensemble differ, and what more of them would bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headwater.errors import InputError

CORRECTIONS = (None, "benjamini-hochberg")


def significant(values: np.ndarray, stderr: np.ndarray, degrees: int, alpha: float, correction: str | None) -> np.ndarray:
    """Whether each value differs from zero by a two-sided t test at ``alpha``; see :meth:`headwater.TrainingScores.reliable`.

    A value without any error counts as certain, unless it is zero.
    """
    from scipy.special import stdtr  # the distribution function of Student's t: loaded only here, for it takes a while

    if correction not in CORRECTIONS:
        raise InputError(f"correction={correction!r}", f"one of {CORRECTIONS}", "leave it out to judge each score by itself")
    size, error = np.abs(values.astype(float)), stderr.astype(float)
    t = np.divide(size, error, out=np.where(size > 0, np.inf, 0.0), where=error > 0)
    p = 2 * stdtr(degrees, -t)
    if correction is None:
        return p <= alpha
    ordered = np.sort(p, axis=None)
    passing = np.flatnonzero(ordered <= alpha * np.arange(1, p.size + 1) / p.size)
    return p <= (ordered[passing[-1]] if len(passing) else -1.0)


class Gain(NamedTuple):
    """The standard error of a typical score, as it is and with more members (None where the members there are cannot tell)."""

    now: float | None
    one_more_variant: float | None
    one_more_model: float | None


@dataclass(frozen=True)
class Spread:
    """One-way random effects over the members of an ensemble: ``models`` independent models with ``per_model`` variants each (dropout
    masks, adapters, checkpoints; 1 where there are none).

    Args:
        between: variance of a score between models, over and above that of their variants (mean over all scores), at least 0; where each
            has one variant, what that one adds is part of it. None where there is one model.
        within: variance between the variants of a model, likewise. None where each model has one.

    The error variance of the ensemble is ``between / models + within / (models * per_model)``: variants cannot push it below
    ``between / models``, more models can (variance components of a balanced one-way layout, e.g. Searle, Casella and McCulloch 1992, 3.6).

    >>> spread = Spread(models=3, per_model=4, between=4.0, within=9.0)
    >>> round(spread.error(3, 4), 3), round(spread.error(3, 10**9), 3), round(spread.error(4, 4), 3)
    (2.083, 1.333, 1.562)
    """

    models: int
    per_model: int
    between: float | None
    within: float | None

    @property
    def members(self) -> int:
        """How many members there are in all."""
        return self.models * self.per_model

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the standard errors: units that vary independently, less one."""
        return (self.models if self.models > 1 else self.per_model) - 1

    def error(self, models: int, per_model: int) -> float | None:
        """The error variance of a score that so many members would leave; None where a component that it needs is not known.

        Of a single model only the variants' part is known: then the error is about that model, not about another training.
        """
        if self.models == 1:
            return self.within / per_model if models == 1 and self.within is not None else None
        if self.per_model == 1:
            return self.between / models if per_model == 1 and self.between is not None else None
        assert self.between is not None and self.within is not None
        return self.between / models + self.within / (models * per_model)

    def gain(self) -> Gain:
        """Standard errors now, with one more variant of every model, and with one more model of as many variants.

        >>> Spread(3, 4, 4.0, 9.0).gain()
        Gain(now=1.443..., one_more_variant=1.390..., one_more_model=1.25)
        """
        places = (self.models, self.per_model), (self.models, self.per_model + 1), (self.models + 1, self.per_model)
        return Gain(*(None if v is None else v**0.5 for v in (self.error(*place) for place in places)))

    def __str__(self) -> str:
        if self.members == 1:
            return "one member: nothing to compare"
        if self.models == 1:
            return f"{self.per_model} variants of one model: errors say how much they differ, not what another training would give"
        if self.per_model == 1:
            return f"{self.models} independent models"
        now, variant, model = self.gain()
        assert now is not None and variant is not None and model is not None
        parts = f"{self.models} independent models with {self.per_model} variants each"
        if now == 0:
            return f"{parts}, all of them equal"
        return f"{parts}; one more variant of each would shrink errors by {1 - variant / now:.0%}, one more model by {1 - model / now:.0%}"
