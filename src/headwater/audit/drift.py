"""Does the model still use its inputs as it did? A two-sample test between the explanations of then and now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.audit.logistic import Logistic
from headwater.errors import InputError
from headwater.evaluate.means import Mean, written
from headwater.evaluate.mislabels import auroc
from headwater.evaluate.parts import arrays_of, parts_of
from headwater.result import FeatureScores
from headwater.result.views import part_name, views


@dataclass(frozen=True, eq=False)
class Drift:
    """Whether explanations of now can be told from those of then (see :func:`drift`).

    ``auc``: of a classifier of explanations, on examples that it was not fitted on, with its interval; 0.5 where they cannot be told apart. ``inputs``: the
    same of the inputs, where they are known. ``shift`` (parts,): mean now minus mean then, in standard deviations of both together (0 for parts that never
    vary). ``parts``: their names.
    """

    auc: Mean
    inputs: Mean | None
    shift: np.ndarray
    parts: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether the interval of the AUC lies above 0.5."""
        return self.auc.low > 0.5

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The k parts whose use moved most."""
        order = np.argsort(-np.abs(self.shift), kind="stable")[:k]
        return [(self.parts[j], float(self.shift[j])) for j in order]

    def __repr__(self) -> str:
        moved = ", ".join(f"{name} {shift:+.2f} sd" for name, shift in self.top(3))
        inputs = "" if self.inputs is None else f"; of the inputs alone {self.inputs}"
        return f"Drift({'found' if self.found else 'none found'}: AUC {self.auc}{inputs}; moved most: {moved}; no drift: 0.5)"

    @property
    def table(self) -> report.Table:
        """The ten parts that moved most, for a report."""
        return report.Table(("part", "shift in standard deviations"), tuple((name, written(shift)) for name, shift in self.top(10)))


def drift(then: Any, now: Any, *, parts: Any = None, ridge: float = 10.0, bootstrap: int = 400, seed: int = 0) -> Drift:
    """A classifier two-sample test (Lopez-Paz and Oquab 2016, arXiv 1610.06545) between explanations of two times (or sites, or populations).

    Logistic regression of ``φ`` and ``|φ|``, fitted on half of the examples, tells then from now on the other half; its AUC there has a bootstrap interval.
    (Cross-validation would use the data better, but where there is no difference its AUC lies below 0.5 and its interval is no test.) It needs no
    labels. It says that explanations differ, not that predictions got worse; where ``inputs`` is as high, the inputs changed, and with them what
    the model uses.

    Args:
        then, now: FeatureScores or arrays of the same form, explained alike (same baseline, each the predicted class). parts: as in ``hotspots``.

    Raises InputError for other forms, or fewer than four examples of either.
    """
    flat = [_flat(one, parts) for one in (then, now)]
    if flat[0].shape[1] != flat[1].shape[1]:
        raise InputError(f"explanations of {flat[0].shape[1]} and {flat[1].shape[1]} parts", "the same parts", "explain inputs of one form")
    auc = _told_apart(flat, ridge, bootstrap, seed)
    given = [one.inputs if isinstance(one, FeatureScores) and _beside(one) else None for one in (then, now)]
    inputs = None if any(g is None for g in given) else _told_apart([_flat(g, parts) for g in given], ridge, bootstrap, seed)
    moved, spread = flat[1].mean(0) - flat[0].mean(0), np.concatenate(flat).std(0)
    shift = np.divide(moved, spread, out=np.zeros_like(moved), where=spread > 0)
    found = views(then) if isinstance(then, FeatureScores) and parts is None else None
    names = tuple(part_name(found, j) if found else f"part {j}" for j in range(len(shift)))
    return Drift(auc, inputs, shift, names)


def _beside(scores: FeatureScores) -> bool:
    """Whether the scores hold inputs of numbers, one for each of their values."""
    return (
        isinstance(scores.inputs, np.ndarray) and isinstance(scores.values, np.ndarray) and scores.inputs.dtype.kind == "f" and scores.inputs.shape == scores.values.shape
    )


def _flat(scores: Any, parts: Any) -> np.ndarray:
    values = arrays_of(scores)
    return parts_of(values, tuple(torch.from_numpy(v) if not isinstance(v, Tensor) else v for v in values), parts).scores


def _told_apart(flat: list[np.ndarray], ridge: float, bootstrap: int, seed: int) -> Mean:
    if min(map(len, flat)) < 4:
        raise InputError(f"{len(flat[0])} explanations of then and {len(flat[1])} of now", "four or more of each: half to learn from, half to judge by", "explain more")
    rng = np.random.default_rng(seed)
    halves = [np.array_split(np.concatenate([k, np.abs(k)], 1)[rng.permutation(len(k))], 2) for k in flat]
    known = np.concatenate([halves[0][0], halves[1][0]])
    told = Logistic.fit(known, np.arange(len(known)) >= len(halves[0][0]), ridge)
    scores = [told(half[1]) for half in halves]
    live = np.repeat([False, True], [len(s) for s in scores])
    drawn = [auroc(np.concatenate([s[rng.integers(len(s), size=len(s))] for s in scores]), live) for _ in range(bootstrap)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Mean(auroc(np.concatenate(scores), live), float(low), float(high), len(live))
