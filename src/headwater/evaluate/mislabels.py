"""Does inspecting the most suspicious examples first find the wrong labels?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import InputError, NotFinite
from headwater.evaluate.arrays import array


@dataclass(frozen=True, eq=False)
class Detection:
    """How fast flipped labels are found (see :func:`detection_curve`).

    ``inspected``, ``found``: fractions from 0 to 1, (n + 1,): of the data looked at, and of the flipped labels met by then.
    ``auroc``: the chance that a flipped example ranks above a clean one (0.5 for chance).
    """

    inspected: np.ndarray
    found: np.ndarray
    auroc: float

    def at(self, fraction: float) -> float:
        """The fraction found after inspecting ``fraction`` of the data."""
        return float(np.interp(fraction, self.inspected, self.found))

    def __repr__(self) -> str:
        marks = ", ".join(f"{share} % finds {self.at(share / 100):.0%}" for share in (5, 10, 20))
        return f"Detection(AUROC {self.auroc:.3f}; inspecting {marks})"


def detection_curve(scores: Any, flipped: Any) -> Detection:
    """The fraction of flipped labels found against the fraction of the data inspected, in the order of falling ``scores``.

    Examples with equal scores come in random order: the curve is the expectation, a straight line across each tie, so that constant scores
    give the diagonal.

    Args:
        scores: (n,), larger is more suspicious; ``hw.influence.self_influence`` of each example, say.
        flipped: (n,) booleans, True where the label is wrong.

    Raises:
        InputError: shapes that differ, or no example of one kind. NotFinite: NaN scores.

    >>> detection_curve([3.0, 1.0, 2.0, 0.0], [True, False, False, False]).found
    array([0., 1., 1., 1., 1.])
    """
    suspicion, bad = _checked(scores, flipped)
    order = np.argsort(-suspicion, kind="stable")
    _, starts, sizes = np.unique(-suspicion[order], return_index=True, return_counts=True)
    hits = np.add.reduceat(bad[order].astype(float), starts)
    steps = np.repeat(hits / sizes, sizes)  # every member of a tie carries the tie's average
    found = np.concatenate([[0.0], np.cumsum(steps)]) / bad.sum()
    found[-1] = 1.0  # the sum of averages may miss it by a rounding
    return Detection(np.linspace(0, 1, len(bad) + 1), found, auroc(suspicion, bad))


def auroc(scores: Any, flipped: Any) -> float:
    """Area under the ROC curve: ``P(flipped above clean) + P(equal) / 2`` over pairs, by ranks (Mann-Whitney), so ties are right.

    Arguments and errors as in :func:`detection_curve`.

    >>> auroc([1.0, 1.0, 1.0], [True, False, False])
    0.5
    """
    suspicion, bad = _checked(scores, flipped)
    ordered = np.sort(suspicion)
    ranks = (np.searchsorted(ordered, suspicion, "left") + np.searchsorted(ordered, suspicion, "right") + 1) / 2
    positives, negatives = int(bad.sum()), int((~bad).sum())
    return float((ranks[bad].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _checked(scores: Any, flipped: Any) -> tuple[np.ndarray, np.ndarray]:
    suspicion, bad = array(scores).astype(np.float64), array(flipped).astype(bool)
    if suspicion.ndim != 1 or suspicion.shape != bad.shape:
        raise InputError(
            f"scores of shape {suspicion.shape} and flipped of shape {bad.shape}", "one of each per example, both (n,)", "check what you pass"
        )
    if bad.all() or not bad.any():
        raise InputError(f"{int(bad.sum())} flipped labels of {len(bad)}", "at least one flipped and one clean example", "flip some labels first")
    if np.isnan(suspicion).any():
        raise NotFinite(f"{int(np.isnan(suspicion).sum())} scores are NaN", "numbers", "trace again, and look at the warnings")
    return suspicion, bad
