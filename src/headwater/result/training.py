"""Which training examples: scores with their meaning, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError, MissingExtra
from headwater.report.examples import count
from headwater.result import files
from headwater.result.slices import Slices
from headwater.result.spread import Spread, significant

if TYPE_CHECKING:
    import pandas

SIGN = "positive: training on the example pushed the measurement up; removing it would lower it"
UNITS = {
    "measurement": "the measurement's own unit: removing the example is predicted to lower it by the score (hw.evaluate.slope: how far sizes hold)",
    "rank only": "no unit: scores rank training examples, their size means nothing",
    "cosine": "no unit: cosines between -1 and 1",
    "magnitude": "a magnitude: how far the prediction moves without the example, squared; at least 0, so there are no opponents",
}
EXAMPLES = "training examples"
"""What columns are, where provenance does not say that they are groups, tokens or terms of them."""
SHOWN = 60  # queries on one page, so that it stays small enough to send


@dataclass(frozen=True)
class Ranking:
    """For each query its strongest training examples: ``indices`` and ``scores``, both (queries, k), strongest first."""

    indices: np.ndarray
    scores: np.ndarray
    query_names: tuple[str, ...] | None = None
    train_names: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Query by query: (indices, scores)."""
        return zip(self.indices, self.scores, strict=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        lines = []
        for q, (ids, scores) in enumerate(self):
            who = self.query_names[q] if self.query_names else f"query {q}"
            named = [self.train_names[i] if self.train_names else f"#{i}" for i in ids]
            lines.append(f"{who}: " + ", ".join(f"{name} {score:+.3g}" for name, score in zip(named, scores, strict=True)))
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TrainingScores:
    """Scores of training examples for queries.

    Args:
        values: (queries, train). ``values[q, i]`` is the predicted change of the measurement of query q that training on example i
            caused: positive means it pushed the measurement up, and that removing it would lower the measurement by about that much.
        stderr: standard errors in the same shape, from ensemble members; None where there is one member.
        method, unit: what was computed, and whether scores have the measurement's own unit ("measurement") or only rank ("rank only",
            "cosine").
        query_names, train_names: of rows and columns, or None (then they are numbers).
        provenance: run, checkpoints, hashes of weights and data, coverage of parameters, cost; of an ensemble its members and their spread.
        slices: scores kept apart along an axis, where a method was asked to (see :meth:`by`).

    >>> scores = TrainingScores(np.array([[0.5, -1.0, 2.0]]), None, "by hand", "measurement")
    >>> scores.top(2)
    query 0: #2 +2, #0 +0.5
    >>> scores.group(["a", "b", "a"]).values
    array([[ 2.5, -1. ]])
    """

    values: np.ndarray
    stderr: np.ndarray | None
    method: str
    unit: str
    query_names: tuple[str, ...] | None = None
    train_names: tuple[str, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, Slices] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or (self.stderr is not None and self.stderr.shape != self.values.shape):
            raise InputError(f"values of shape {self.values.shape}", "(queries, train), and standard errors of the same shape", "check what you pass")
        for names, size, what in ((self.query_names, self.queries, "query_names"), (self.train_names, self.train, "train_names")):
            if names is not None and len(names) != size:
                raise InputError(f"{len(names)} {what}", f"{size}", "one name each")

    @property
    def queries(self) -> int:
        """How many queries were asked about."""
        return self.values.shape[0]

    @property
    def train(self) -> int:
        """How many training examples (or groups of them, or their tokens: see :attr:`columns`) were scored."""
        return self.values.shape[1]

    @property
    def columns(self) -> str:
        """What the columns are: "training examples", or "groups", "tokens", "terms" of them."""
        return str(self.provenance.get("scored", EXAMPLES))

    @property
    def spread(self) -> Spread | None:
        """How much an ensemble's members differ, and what more of them would bring; None where there were no members."""
        return Spread(**self.provenance["spread"]) if "spread" in self.provenance else None

    def __len__(self) -> int:
        return self.queries

    def __repr__(self) -> str:
        errors = f"; standard errors over {self.spread}" if self.stderr is not None and self.spread is not None else ""
        return f"TrainingScores({self.method}: {self.queries} queries x {self.train:,} {self.columns}; {UNITS.get(self.unit, self.unit)}{errors})"

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def top(self, k: int = 10) -> Ranking:
        """Proponents: for each query the k largest scores, largest first (equal scores in the order of the training set)."""
        return self._ranking(-self.values, k)

    def bottom(self, k: int = 10) -> Ranking:
        """Opponents: for each query the k smallest scores, smallest first."""
        return self._ranking(self.values, k)

    def _ranking(self, keys: np.ndarray, k: int) -> Ranking:
        if k < 1:
            raise InputError(f"k={k}", "at least 1", "s.top(10)")
        order = np.argsort(keys, axis=1, kind="stable")[:, :k]
        return Ranking(order, np.take_along_axis(self.values, order, axis=1), self.query_names, self.train_names)

    def by(self, axis: str) -> Slices:
        """The scores kept apart along an axis, whose sum they are: "checkpoint" or "timestep", for methods told to ``keep=`` them.
        Raises InputError."""
        if axis not in self.slices:
            held = f"scores kept by {sorted(self.slices)}" if self.slices else "scores that were not kept apart"
            raise InputError(f"by({axis!r}) of {held}", "an axis that the method was told to keep", f'hw.TracIn(keep=("{axis}",)), or keep= of the method you used')
        return self.slices[axis]

    def generally_influential(self, k: int = 10) -> np.ndarray:
        """For each training example, in how many queries' ``k`` largest scores it appears: whole numbers (train,).

        An example in most lists says more about itself (a large gradient, say) than about the queries. See :meth:`concentration`.
        """
        return np.bincount(self.top(k).indices.ravel(), minlength=self.train)

    def concentration(self, k: int = 10) -> dict[str, float]:
        """How far queries' lists of the ``k`` largest scores hold the same examples: ``distinct`` examples in all lists; how many are in at least a
        quarter of the lists (``widespread``); and the share of lists that the ``busiest`` one is in."""
        counts = self.generally_influential(k)
        return {"distinct": int((counts > 0).sum()), "widespread": int((counts >= self.queries / 4).sum()), "busiest": float(counts.max() / self.queries)}

    def reliable(self, level: float = 0.95, correction: str | None = None, degrees: int | None = None) -> np.ndarray:
        """Which scores can be told from noise: booleans (queries, train).

        A two-sided t test of each score against zero, with its standard error: ``|score| / stderr`` above the t quantile at
        ``1 - (1 - level) / 2`` with ``units - 1`` degrees of freedom, units being independent models where there are several, else the
        variants of one. Of scores that are all zero in truth, ``1 - level`` pass.

        Args:
            level: how sure, above 0 and below 1.
            correction: "benjamini-hochberg" asks more of every score, so that among those that pass, over all queries and examples, about
                ``1 - level`` are noise (Benjamini and Hochberg 1995, eq. 1: the false discovery rate).
            degrees: degrees of freedom, for scores that do not come from an ensemble of Headwater's.

        Raises:
            InputError: scores without standard errors, or without degrees of freedom.

        >>> scores = TrainingScores(np.array([[2.0, 0.1]]), np.array([[0.5, 0.5]]), "by hand", "measurement")
        >>> scores.reliable(degrees=9)
        array([[ True, False]])
        """
        if self.stderr is None:
            mend = "average over members: hw.Ensemble(method, runs), or hw.DropoutEnsemble(method)"
            raise InputError("scores of a single member, which have no standard errors", "scores of an ensemble of at least two members", mend)
        if not 0 < level < 1:
            raise InputError(f"level={level}", "a probability between 0 and 1", "0.95, say")
        degrees = self.spread.degrees if degrees is None and self.spread is not None else degrees
        if degrees is None or degrees < 1:
            expected = "at least 1: the units that they were computed from, less one"
            raise InputError(f"standard errors with {degrees if degrees is not None else 'unknown'} degrees of freedom", expected, "give degrees=")
        return significant(self.values, self.stderr, degrees, 1 - level, correction)

    def at(self, queries: Sequence[int] | np.ndarray) -> TrainingScores:
        """The scores of some of the queries, in the order given."""
        ids = np.asarray(queries)
        names = None if self.query_names is None else tuple(self.query_names[int(i)] for i in ids)
        slices = {axis: held.at(ids) for axis, held in self.slices.items()}
        return replace(self, values=self.values[ids], stderr=None if self.stderr is None else self.stderr[ids], query_names=names, slices=slices)

    def group(self, labels: Iterable[Any]) -> TrainingScores:
        """Scores of groups of training examples: sums over equal ``labels`` (n,), one column each, in the order of first appearance.

        The sum is what removing the whole group is predicted to do, to first order: additivity fails for groups that carry each other.
        Standard errors are added in quadrature where there are any, as for independent examples (an ensemble's members move the examples
        of a group together: of a large group the error is then too small, or too large).
        """
        given = list(labels)
        if len(given) != self.train:
            raise InputError(f"{len(given)} labels for {self.train} {self.columns}", "one each", "pass a label for every column")
        names = list(dict.fromkeys(given))
        place = {name: i for i, name in enumerate(names)}
        number = np.array([place[label] for label in given])
        values = np.zeros((self.queries, len(names)))
        np.add.at(values.T, number, self.values.T.astype(float))
        stderr = None
        if self.stderr is not None:
            square = np.zeros_like(values)
            np.add.at(square.T, number, self.stderr.T.astype(float) ** 2)
            stderr = np.sqrt(square)
        slices = {axis: held.group(number, len(names)) for axis, held in self.slices.items()}
        provenance = {**self.provenance, "scored": "groups"}
        return replace(self, values=values, stderr=stderr, train_names=tuple(map(str, names)), provenance=provenance, slices=slices)

    def to_frame(self, k: int | None = None) -> pandas.DataFrame:
        """A pandas table, one row per query and training example: query, example, score, stderr, rank (1 = largest score).

        Args:
            k: only the k largest and the k smallest of each query. Needs ``pip install headwater[frames]``.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("to_frame() without the library pandas", "pandas", "pip install headwater[frames]") from error
        order = np.argsort(-self.values, axis=1, kind="stable")
        ranks = np.arange(1, self.train + 1)
        if k is not None and 2 * k < self.train:
            keep = np.r_[0:k, self.train - k : self.train]
            order, ranks = order[:, keep], ranks[keep]
        columns: dict[str, Any] = {
            "query": np.repeat(np.array(self.query_names or range(self.queries)), len(ranks)),
            "example": np.array(self.train_names)[order.ravel()] if self.train_names else order.ravel(),
            "score": np.take_along_axis(self.values, order, axis=1).ravel(),
            "stderr": np.nan if self.stderr is None else np.take_along_axis(self.stderr, order, axis=1).ravel(),
            "rank": np.tile(ranks, self.queries),
        }
        frame = pandas.DataFrame(columns)
        frame.attrs.update(method=self.method, unit=self.unit, sign=SIGN)
        return frame

    def to_html(
        self,
        path: str | Path,
        queries: Any = None,
        train: Any = None,
        labels: Iterable[Any] | None = None,
        k: int = 6,
        flagged: Iterable[int] | Mapping[int, str] | None = None,
    ) -> Path:
        """Write one self-contained page: each query with its ``k`` strongest proponents and opponents, and what the scores mean.

        Args:
            path: the file.
            queries, train: the examples themselves (as they were traced, and trained on): pictures are drawn, texts shown, of anything
                else the first numbers. Without them cards have names only. For groups, tokens and terms ``train`` has one for each column.
            labels: what to write under each training example, one each; default: its label, where an example ends in one.
            flagged: numbers of training examples to set off, or a mapping from number to what to say about it.

        At most 60 queries are shown, the first ones; pick others with ``scores.at([...])``. Raises InputError, StorageError.
        """
        notes = None if labels is None else [f"label {label}" for label in labels]
        if train is not None and count(train) != self.train:
            raise InputError(f"train= of {count(train)} for scores of {self.train} {self.columns}", "one for each column", "leave train= out")
        if notes is not None and len(notes) != self.train:
            raise InputError(f"{len(notes)} labels for {self.train} {self.columns}", "one each", "pass a label for every column")
        flags = dict(flagged) if isinstance(flagged, Mapping) else {int(i): "flagged" for i in flagged or ()}
        asked = report.Exhibit(queries, self.query_names or [f"query {q}" for q in range(self.queries)])
        shelf = report.Exhibit(train, self.train_names, notes, flags)
        return report.write(self._page(asked, shelf, k), path)

    def _page(self, asked: report.Exhibit, shelf: report.Exhibit, k: int) -> report.Page:
        shown = range(min(self.queries, SHOWN))
        found = [report.attribution(asked.card(q), self.values[q], None if self.stderr is None else self.stderr[q], shelf, k) for q in shown]
        more = f"\n\nShown are the first {SHOWN} of {self.queries:,} queries." if self.queries > SHOWN else ""
        sign = f"{SIGN.capitalize()}.\n\nUnit: {UNITS.get(self.unit, self.unit)}."
        doubt = "Scores are predictions. How far they can be trusted is measured by retraining: headwater.evaluate.lds."
        if self.stderr is not None and self.spread is not None and self.spread.degrees:
            doubt += f"\n\nErrors are standard errors over {self.spread}. {self.reliable().mean():.0%} of all scores can be told from zero (95 %, one at a time)."
        reading = report.Section("How to read the scores", f"{sign}\n\n{doubt}{more}")
        footer = [("method", self.method), *((key, str(value)) for key, value in self.provenance.items() if isinstance(value, str | int | float) and key != "method")]
        subtitle = f"{self.queries:,} queries, {self.train:,} {self.columns}, scored by {self.method}"
        return report.Page(f"Owed to these {self.columns}", subtitle, (reading, report.Section("Queries", parts=tuple(found))), tuple(footer))

    # -- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (its metadata hold the rest); :func:`headwater.load` reads it. Raises StorageError."""
        arrays = {"values": self.values, **({} if self.stderr is None else {"stderr": self.stderr})}
        for axis, held in self.slices.items():
            arrays |= {f"slices/{axis}/labels": np.array(held.labels), f"slices/{axis}/values": held.values}
        return files.write(path, self, arrays, ("method", "unit", "query_names", "train_names", "provenance"))

    @classmethod
    def loaded(cls, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> TrainingScores:
        """From what a file holds (see :func:`headwater.load`)."""
        names = {k: None if facts[k] is None else tuple(facts[k]) for k in ("query_names", "train_names")}
        axes = sorted({name.split("/")[1] for name in arrays if name.startswith("slices/")})
        slices = {axis: Slices(axis, tuple(arrays[f"slices/{axis}/labels"].tolist()), arrays[f"slices/{axis}/values"]) for axis in axes}
        return cls(arrays["values"], arrays.get("stderr"), **{**facts, **names}, slices=slices)
