"""What pairs of features did together: interactions with their error, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.report.numbers import number
from headwater.result import files
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas

SIGN = (
    "positive: together the two raised the output more than each would by itself; "
    "the row of a feature sums to its attribution, all values of an example to output - baseline output"
)
FEW = 4  # examples drawn unless others are asked for
_ARRAYS = ("values", "residual", "evaluations", "output", "baseline_output", "attributions", "stderr", "inputs", "reference", "converged")
_FACTS = ("method", "target", "baseline", "feature", "feature_names", "example_names", "tokens", "notes", "provenance")


@dataclass(frozen=True, eq=False)
class InteractionScores:
    """Interactions of p features in n examples.

    Args:
        values: (n, p, p), symmetric, in units of the output: ``values[e, i, j]`` is half of what features i and j did together, the
            other half stands in ``values[e, j, i]``; ``values[e, i, i]`` is what i did by itself. Or (n, p): the row of one chosen feature.
        residual: (n,) signed gap between the sum of the values and ``output - baseline_output`` (for a chosen feature: its attribution).
        evaluations: (n,) how many times the model was evaluated for the example (a Hessian-vector product counts one).
        output, baseline_output: (n,) what was explained, at the input and at the baseline.
        method, target, baseline: in words.
        feature: the number of the chosen feature where values are (n, p), else None.
        attributions: (n, p), or (n,) of the chosen feature: attributions found by themselves, which the rows should sum to; or None.
        stderr, inputs, reference, converged, feature_names, example_names, tokens, notes, provenance: as in FeatureScores, for p features.

    >>> e = InteractionScores(np.array([[[1.0, -0.5], [-0.5, 0.0]]]), np.zeros(1), np.array([16]), np.ones(1), np.ones(1), "by hand", "f", "0")
    >>> e.top(1)
    example 0: feature 0 × feature 1 -1
    """

    values: np.ndarray
    residual: np.ndarray
    evaluations: np.ndarray
    output: np.ndarray
    baseline_output: np.ndarray
    method: str
    target: str
    baseline: str
    feature: int | None = None
    attributions: np.ndarray | None = None
    stderr: np.ndarray | None = None
    inputs: np.ndarray | None = None
    reference: np.ndarray | None = None
    converged: np.ndarray | None = None
    feature_names: tuple[str, ...] | None = None
    example_names: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, chosen = self.values.shape, self.feature is not None
        if len(shape) != (2 if chosen else 3) or (not chosen and shape[1] != shape[2]) or shape[0] != len(self.residual):
            given = f"values of shape {shape} for {len(self.residual)} residuals and feature={self.feature}"
            raise InputError(given, "(n, p, p) without a chosen feature, (n, p) with one", "pass feature= where values are the row of one feature")
        if self.feature is not None and not 0 <= self.feature < shape[1]:
            raise InputError(f"feature={self.feature} of {shape[1]}", f"0 to {shape[1] - 1}", "number features from 0")
        if self.attributions is not None and self.attributions.shape != shape[:-1]:
            raise InputError(
                f"attributions of shape {self.attributions.shape}", f"{shape[:-1]}, one for each row of the values", "leave out the features that were not chosen"
            )
        for what, names, count in (("feature_names", self.feature_names, shape[1]), ("example_names", self.example_names, shape[0])):
            if names is not None and len(names) != count:
                raise InputError(f"{len(names)} {what}", f"{count}", "one name each, or none")

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.residual)

    @property
    def p(self) -> int:
        """How many features."""
        return self.values.shape[-1]

    def __len__(self) -> int:
        return self.n

    @property
    def row_residual(self) -> np.ndarray | None:
        """(n, p), or (n,) for a chosen feature: how far each row's sum is from the attribution that was found by itself; None without any.

        This is the alarm for networks with kinks: the second derivative of a ReLU network is zero almost everywhere, so its interactions
        come out diagonal and wrong.
        """
        return None if self.attributions is None else self.values.sum(-1) - self.attributions

    def names(self, example: int | None = None) -> list[str]:
        """What the features are called; tokens are those of one example."""
        if self.feature_names is not None:
            return list(self.feature_names)
        if self.tokens is not None and example is not None:
            row = self.tokens[example]
            return [f"{row[k]} ({k})" if k < len(row) else f"position {k}" for k in range(self.p)]
        return [f"feature {k}" for k in range(self.p)]

    def __repr__(self) -> str:
        form = f"{self.p} features in pairs" if self.feature is None else f"{self.names()[self.feature]} with {self.p} features"
        gap = self.row_residual
        rows = "" if gap is None or not gap.size else f"; largest gap between a row and its attribution {float(np.abs(gap).max()):.1e}"
        return f"InteractionScores({self.n:,} examples, {form}; {self.target} against {self.baseline}; {self.method}{rows})"

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def at(self, examples: int | Sequence[int] | np.ndarray) -> InteractionScores:
        """Some of the examples, in the order given."""
        ids = np.atleast_1d(np.asarray(examples))
        ids = ids if ids.size else ids.astype(np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and (ids.min() < -self.n or ids.max() >= self.n)):
            raise InputError(f"examples={examples!r}", f"numbers below {self.n}", "so many examples there are")
        picked: dict[str, Any] = {name: value[ids] if len(value) == self.n else value for name in _ARRAYS if (value := getattr(self, name)) is not None}
        picked |= {name: tuple(given[int(i)] for i in ids) for name in ("example_names", "tokens") if (given := getattr(self, name)) is not None}
        return replace(self, **picked)

    def mean(self) -> InteractionScores:
        """The mean over the examples, as one example; standard errors over the examples where there are several."""
        if not self.n:
            raise InputError("the mean of no examples", "at least one", "explain something first")
        kept = {name: getattr(self, name) for name in _ARRAYS if name not in ("converged", "stderr")}
        averaged: dict[str, Any] = {name: value.mean(0, keepdims=True) for name, value in kept.items() if value is not None}
        averaged["stderr"] = self.values.std(0, ddof=1, keepdims=True) / np.sqrt(self.n) if self.n > 1 else self.stderr
        met = None if self.converged is None else np.array([bool(self.converged.all())])
        return replace(self, **averaged, converged=met, example_names=(f"mean of {self.n:,} examples",), tokens=None)

    def pairs(self) -> np.ndarray:
        """(n, p, p): for each unordered pair i < j what both did together, ``values[:, i, j] + values[:, j, i]``; elsewhere 0."""
        if self.feature is not None:
            raise InputError("pairs() of the row of one feature", "values (n, p, p)", "read values: (n, p)")
        return np.triu(self.values + self.values.swapaxes(1, 2), 1)

    def top(self, k: int = 10) -> Pairs:
        """For each example the ``k`` pairs of different features that did most together, by size; both halves of a pair are added.

        For a chosen feature: its partners, with the halves added likewise (twice the value).
        """
        if k < 1:
            raise InputError(f"k={k}", "at least 1", "e.top(10)")
        if self.feature is None:
            first, second = np.triu_indices(self.p, 1)
            scores = self.pairs()[:, first, second]
        else:
            second = np.delete(np.arange(self.p), self.feature)
            first = np.full(len(second), self.feature)
            scores = 2 * self.values[:, second]
        order = np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :k]
        named = []
        for i, ids in enumerate(order):
            names = self.names(i)
            named.append(tuple((names[first[j]], names[second[j]]) for j in ids))
        return Pairs(tuple(named), np.take_along_axis(scores, order, 1), np.stack([first[order], second[order]], -1), self.example_names)

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table: example, feature, with, score, stderr.

        One row per example and unordered pair, both halves added, and per feature with itself: the scores of an example sum to its
        change of output. For a chosen feature one row per partner, as it stands. Needs ``pip install headwater[frames]``.
        """
        first, second = np.triu_indices(self.p) if self.feature is None else (np.full(self.p, self.feature), np.arange(self.p))
        halves = np.where(first == second, 1, 2) if self.feature is None else np.ones(self.p)
        who = np.array(self.example_names if self.example_names is not None else range(self.n))

        def column(array: np.ndarray) -> np.ndarray:
            both = (array + array.swapaxes(1, 2))[:, first, second] / 2 if self.feature is None else array
            return (both * halves).ravel()

        names = [self.names(i) for i in range(self.n)]
        columns = {
            "example": np.repeat(who, len(first)),
            "feature": [name[i] for name in names for i in first],
            "with": [name[j] for name in names for j in second],
            "score": column(self.values.astype(np.float64)),
            "stderr": np.full(self.n * len(first), np.nan) if self.stderr is None else column(self.stderr),
        }
        frame = pandas_library().DataFrame(columns)
        frame.attrs.update(method=self.method, target=self.target, baseline=self.baseline, sign=SIGN)
        return frame

    # -- pictures --------------------------------------------------------------------------------------------------------------

    def parts(self, examples: int | Iterable[int] | None = None) -> list[report.Part]:
        """A matrix for each example, or the bars of a chosen feature."""
        given = [examples] if isinstance(examples, int) else examples
        rows = [int(i) for i in given] if given is not None else list(range(min(self.n, FEW)))
        if not rows or any(not -self.n <= i < self.n for i in rows):
            raise InputError(f"examples={rows}", f"numbers below {self.n}, at least one", "so many examples there are")
        return [self._part(i % self.n) for i in rows]

    def _part(self, i: int) -> report.Part:
        title = self.example_names[i] if self.example_names is not None else f"#{i}"
        gap = self.row_residual
        rows = "" if gap is None else f"; largest gap of a row {number(float(np.abs(gap[i]).max()))}"
        out, base, left = (number(float(array[i])) for array in (self.output, self.baseline_output, self.residual))
        subtitle = f"{self.target}: {out}, at the baseline {base}; residual {left}{rows}"
        if self.feature is None:
            flag = "missed the tolerance" if self.converged is not None and not self.converged[i] else None
            return report.Matrix(title, tuple(self.names(i)), self.values[i], subtitle, flag)
        names = self.names(i)
        order = np.argsort(-np.abs(self.values[i]), kind="stable")[:20]
        bars = tuple(report.Bar(names[j], float(self.values[i, j]), note="by itself" if j == self.feature else "") for j in order)
        return report.Bars(bars, axis=f"{title}: {names[self.feature]} with each feature (half of each pair). {subtitle}", best="")

    def plot(self, examples: int | Iterable[int] | None = None) -> Any:
        """A matplotlib Figure with a matrix for each example (the first 4; ``e.mean().plot()`` for all). Needs ``headwater[plot]``."""
        return report.draw(*self.parts(examples))

    def to_html(self, path: str | Path, examples: int | Iterable[int] | None = None) -> Path:
        """Write one self-contained page. Raises InputError, StorageError."""
        parts = self.parts(examples)
        reading = f"{SIGN[0].upper()}{SIGN[1:]}.\n\nThe residual is a lower bound on the error. Rows are compared with attributions where these were found by themselves."
        sections = [report.Section("How to read the values", reading)]
        if self.notes:
            sections.append(report.Section("Found on the way", parts=(report.Prose("\n\n".join(self.notes)),)))
        if self.n > len(parts) and self.tokens is None:
            sections.append(report.Section("On average", parts=tuple(self.mean().parts())))
        more = f"Shown are {len(parts)} of {self.n:,} examples." if self.n > len(parts) else ""
        sections.append(report.Section("Example by example", more, tuple(parts)))
        footer = (("method", self.method), ("explained", self.target), ("baseline", self.baseline))
        subtitle = f"{self.n:,} examples: {self.target} against {self.baseline}; {self.method}"
        return report.write(report.Page("What features did together", subtitle, tuple(sections), footer), path)

    def _repr_html_(self) -> str:
        """What a notebook shows: static, without a script."""
        notes = [report.Prose("\n\n".join(self.notes))] if self.notes else []
        return report.fragment(report.Prose(repr(self)), *(self.parts()[:2] if self.n else ()), *notes)

    # -- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (its metadata hold the rest); :func:`headwater.load` reads it. Raises StorageError."""
        arrays = {name: value for name in _ARRAYS if (value := getattr(self, name)) is not None}
        return files.write(path, self, arrays, _FACTS)

    @classmethod
    def loaded(cls, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> InteractionScores:
        """From what a file holds (see :func:`headwater.load`)."""
        names: dict[str, Any] = {k: None if facts[k] is None else tuple(facts[k]) for k in ("feature_names", "example_names")}
        names["tokens"] = None if facts["tokens"] is None else tuple(map(tuple, facts["tokens"]))
        names["notes"] = tuple(facts["notes"])
        return cls(**{k: arrays.get(k) for k in _ARRAYS}, **{**facts, **names})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Pairs:
    """For each example its strongest pairs: ``names``, ``scores`` (n, k) and ``indices`` (n, k, 2), the largest size first."""

    names: tuple[tuple[tuple[str, str], ...], ...]
    scores: np.ndarray
    indices: np.ndarray
    example_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        lines = []
        for i, (pairs, scores) in enumerate(zip(self.names, self.scores, strict=True)):
            who = self.example_names[i] if self.example_names else f"example {i}"
            lines.append(f"{who}: " + ", ".join(f"{a} × {b} {score:+.3g}" for (a, b), score in zip(pairs, scores, strict=True)))
        return "\n".join(lines)
