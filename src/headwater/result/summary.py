"""What many explanations have in common: means, spread, signs and ranks, gathered batch by batch without keeping the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.report.numbers import number, percent, signed
from headwater.result.arrays import flattened
from headwater.result.frames import pandas_library
from headwater.result.views import View, views

if TYPE_CHECKING:
    import pandas

    from headwater.result.features import FeatureScores

READING = (
    "Mean: the average push, which may cancel between examples. Mean size: the average of the push without its sign, by which features are ranked. "
    "Spread: standard deviation over the examples. Up, down: the share of examples in which the feature pushed the output up or down."
)
MOST_NOTES = 20


@dataclass(frozen=True, eq=False)
class Summary:
    """Per part of the input, over ``n`` examples; all arrays are (parts,), in units of the output unless said otherwise.

    Args:
        names: of the parts.
        mean, mean_abs, std: of the values: average, average size, standard deviation (of these examples: divided by n).
        positive, negative: shares of the examples, 0 to 1, in which the part pushed the output up, or down.
        n: how many examples.
        residual, worst_residual: mean and largest size of the completeness gap of an example; None where values alone were added.
        missed: how many examples missed the tolerance.
        evaluations: of the model, per example; None where values alone were added.
        shape: of one example, where there is one input.
        kind, target, baseline, method: as in :class:`headwater.FeatureScores`.
        notes: what was found and handled on the way, each sentence once and at most twenty; examples are numbered within their batch.

    >>> Accumulator(("age", "water")).add(np.array([[1.0, -3.0], [2.0, 3.0]])).summary()
    Attributions over 2 examples
    ============================
    <BLANKLINE>
    rank  feature   mean  mean size  spread     up  down
    ────  ───────  ─────  ─────────  ──────  ─────  ────
       1  water        0       3.00    3.00   50 %  50 %
       2  age      +1.50       1.50   0.500  100 %   0 %
    <BLANKLINE>
    """

    names: tuple[str, ...]
    mean: np.ndarray
    mean_abs: np.ndarray
    std: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    n: int
    residual: float | None = None
    worst_residual: float | None = None
    missed: int = 0
    evaluations: float | None = None
    shape: tuple[int, ...] | None = None
    kind: str = "table"
    target: str = ""
    baseline: str = ""
    method: str = ""
    notes: tuple[str, ...] = ()

    @property
    def missed_share(self) -> float:
        """The share of the examples, 0 to 1, that missed the tolerance."""
        return self.missed / self.n

    @property
    def rank(self) -> np.ndarray:
        """(parts,) 1 for the largest mean size; equal ones in their order."""
        ranks = np.empty(len(self.names), dtype=np.int64)
        ranks[self.order] = np.arange(1, len(self.names) + 1)
        return ranks

    @property
    def order(self) -> np.ndarray:
        """(parts,) the parts from the largest mean size to the smallest."""
        return np.argsort(-self.mean_abs, kind="stable")

    @property
    def share(self) -> np.ndarray:
        """(parts,) of the mean sizes, each as a share of their sum."""
        total = self.mean_abs.sum()
        return self.mean_abs / (total if total > 0 else 1.0)

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row per part in its order: feature, mean, mean_abs, std, positive, negative, share, rank, n."""
        columns = {name: getattr(self, name) for name in ("mean", "mean_abs", "std", "positive", "negative", "share", "rank")}
        return pandas_library().DataFrame({"feature": list(self.names), **columns, "n": self.n})

    def __repr__(self) -> str:
        return report.text(report.Page(self._title, sections=(report.Section("", parts=(self.table(),)),)))

    @property
    def _title(self) -> str:
        what = f" of {self.target}" if self.target else ""
        return f"Attributions{what} over {self.n:,} examples"

    def table(self, k: int = 20) -> report.Table:
        """The ``k`` parts of the largest mean size, as a table for a page."""
        rows = [
            (str(place), self.names[i], signed(self.mean[i]), number(self.mean_abs[i]), number(self.std[i]), percent(self.positive[i]), percent(self.negative[i]))
            for place, i in enumerate(self.order[:k], start=1)
        ]
        left = len(self.names) - len(rows)
        if left > 0:
            rest = self.order[k:]
            rows.append(("", f"{left:,} others together", signed(self.mean[rest].sum()), number(self.mean_abs[rest].sum()), "", "", ""))
        return report.Table(("rank", "feature", "mean", "mean size", "spread", "up", "down"), tuple(rows))

    def parts(self, k: int = 20) -> list[report.Part]:
        """Bars of the mean size, and for images the map of the mean."""
        bars = tuple(report.Bar(self.names[i], float(self.mean_abs[i]), None, None, f"mean {signed(self.mean[i])}") for i in self.order[:k])
        found: list[report.Part] = [report.Bars(bars, axis=f"mean size of the push, {self.n:,} examples", best="")]
        if self.kind == "image" and self.shape is not None:
            from headwater.result.pictures import channels_summed

            found.insert(0, report.Overlay("mean over all examples", channels_summed(self.mean.reshape(1, *self.shape))[0]))
        return found

    def plot(self, k: int = 20) -> Any:
        """A matplotlib Figure of the ``k`` parts of the largest mean size, and for images of the mean map. Needs ``headwater[plot]``."""
        return report.draw(*self.parts(k))

    def to_html(self, path: str | Path, k: int = 20) -> Path:
        """Write one self-contained page. Raises InputError, StorageError."""
        sections = (report.Section("How to read it", "\n\n".join([READING, *self.notes])), report.Section("Features", parts=(*self.parts(k), self.table(max(k, 200)))))
        subtitle = ", ".join(f"{word} {text}" for word, text in (("explained", self.target), ("against", self.baseline), ("by", self.method)) if text)
        return report.write(report.Page(self._title, subtitle, sections, self.facts()), path)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """What is known of the errors and the cost, for the foot of a page."""
        known = [("mean |residual|", self.residual), ("largest |residual|", self.worst_residual), ("evaluations per example", self.evaluations)]
        return (*((name, number(value)) for name, value in known if value is not None), ("missed the tolerance", str(self.missed)))

    def _repr_html_(self) -> str:
        return report.fragment(report.Prose(self._title), *self.parts(12), self.table(12))


class Accumulator:
    """Adds up values batch by batch; what it says of all of them does not depend, but for rounding, on how they were divided.

    Counts are exact. Means and sums of squared deviations are merged in float64 as in Chan, Golub and LeVeque (1983), "Algorithms for
    computing the sample variance", eq. 2.1: with d the difference of two means, M = M_a + M_b + d² n_a n_b / (n_a + n_b).

    >>> rows = np.arange(12.0).reshape(6, 2)
    >>> a, b = Accumulator().add(rows[:4]), Accumulator().add(rows[4:])
    >>> a.merge(b).summary().std.tolist() == rows.std(0).tolist()
    True
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = None if names is None else tuple(names)
        self.n = 0
        self.shape: tuple[int, ...] | None = None
        self._mean = self._squares = self._size = np.zeros(0)
        self._up: np.ndarray = np.zeros(0)  # counts, so of whole numbers once there are some
        self._down: np.ndarray = np.zeros(0)
        self._checked = self._missed = 0
        self._residual = self._worst = self._evaluations = 0.0
        self._views: tuple[View, ...] = ()  # of no examples: they know what the parts are called
        self._facts: dict[str, Any] = {}
        self._notes: dict[str, None] = {}

    def add(self, values: np.ndarray | FeatureScores) -> Accumulator:
        """Add values (n, ...), or scores with their residuals, evaluations and names. Returns itself."""
        return self.merge(_of_scores(values) if hasattr(values, "residual") else _of_values(np.asarray(values)))

    def merge(self, other: Accumulator) -> Accumulator:
        """Take in what another one has gathered. Returns itself."""
        mine, theirs = _form(self), _form(other)
        if self.n and other.n and (len(self._mean) != len(other._mean) or (self._views and other._views and mine != theirs)):
            given, expected = (f"{len(which._mean)} parts ({form})" for which, form in ((other, theirs), (self, mine)))
            raise InputError(f"examples of {given}", f"the same parts as in the batches before: {expected}", "add explanations of inputs of one form")
        names = self.names or other.names
        if names is not None and other.n and len(names) != len(other._mean):
            raise InputError(f"{len(names)} names for {len(other._mean)} parts", "one name each", "check the names")
        self.names, self._views = names, self._views or other._views
        if not other.n:
            return self
        if not self.n:
            self._mean = self._squares = self._size = self._up = self._down = np.zeros(len(other._mean))
            self.shape, self._facts = other.shape, dict(other._facts)
        self._notes = dict.fromkeys(list(self._notes | other._notes)[:MOST_NOTES])
        total = self.n + other.n
        gap, weight = other._mean - self._mean, other.n / total
        self._squares = self._squares + other._squares + gap**2 * self.n * weight
        self._mean = self._mean + gap * weight
        self._size = self._size + (other._size - self._size) * weight
        self._up, self._down = self._up + other._up, self._down + other._down
        checked = max(1, self._checked + other._checked)
        self._residual += (other._residual - self._residual) * other._checked / checked
        self._evaluations += (other._evaluations - self._evaluations) * other._checked / checked
        self._worst = max(self._worst, other._worst)
        self._checked, self._missed, self.n = self._checked + other._checked, self._missed + other._missed, total
        return self

    def summary(self) -> Summary:
        """What has been gathered so far. Raises InputError where that is nothing."""
        if not self.n:
            raise InputError("a summary of no examples", "at least one", "add values first")
        plain = View("", np.zeros((0, *(self.shape or ()))), None, None, None, "array", _axes(self.shape), None, None)
        names = self.names or [name for view in self._views or (plain,) for name in view.parts()]
        errors = (self._residual, self._worst, self._missed, self._evaluations) if self._checked == self.n else (None, None, self._missed, None)
        means = (self._mean, self._size, np.sqrt(self._squares / self.n), self._up / self.n, self._down / self.n)
        facts: dict[str, Any] = {"shape": self.shape, "notes": tuple(self._notes), **self._facts}
        return Summary(tuple(names), *means, self.n, *errors, **facts)


def _of_values(values: np.ndarray) -> Accumulator:
    """What one batch of values says by itself."""
    batch, flat = Accumulator(), flattened(values).astype(np.float64)
    batch.n, batch.shape = len(flat), values.shape[1:]
    if batch.n:
        batch._mean, batch._size = flat.mean(0), np.abs(flat).mean(0)
        batch._squares = ((flat - batch._mean) ** 2).sum(0)
        batch._up, batch._down = (flat > 0).sum(0), (flat < 0).sum(0)
    return batch


def _of_scores(scores: Any) -> Accumulator:
    """What one batch of scores says by itself."""
    found = views(scores)
    batch = _of_values(np.concatenate([view.flat for view in found], 1))
    batch.shape = found[0].values.shape[1:] if len(found) == 1 else None
    batch._views = tuple(replace(view, values=view.values[:0], stderr=None, inputs=None, reference=None) for view in found)
    batch._checked, batch._missed = scores.n, 0 if scores.converged is None else int((~scores.converged).sum())
    if scores.n:
        sizes = np.abs(scores.residual)
        batch._residual, batch._worst, batch._evaluations = float(sizes.mean()), float(sizes.max()), float(np.mean(scores.evaluations))
    kind = found[0].kind if len(found) == 1 else "table"
    batch._facts = {"kind": kind, "target": scores.target, "baseline": scores.baseline, "method": scores.method}
    batch._notes = dict.fromkeys(scores.notes[:MOST_NOTES])
    return batch


def _form(gathered: Accumulator) -> str:
    """What kind of inputs has been gathered, in words."""
    shapes = ", ".join(f"{view.name or 'input'} {view.values.shape[1:]}" for view in gathered._views)
    named = [", ".join(view.feature_names[:6]) for view in gathered._views if view.feature_names]
    return "; ".join([shapes or str(gathered.shape), *named])


def _axes(shape: tuple[int, ...] | None) -> tuple[str, ...]:
    count = len(shape or ())
    return ("feature",) if count == 1 else tuple(f"axis {k}" for k in range(1, count + 1))
