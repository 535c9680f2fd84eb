"""Feature selection: rank the columns by attribution, keep the best, train again, and see what is lost.

found = audit.select(lambda X, y, seed: RandomForestClassifier(random_state=seed).fit(X, y), X, y)
found.top(5); found.at(5); found.to_html("selection.html")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from headwater import report
from headwater.audit.intervals import corrected
from headwater.audit.rows import column, columns_of, explained, labels_of, module_outputs, names_of, numeric, predicted, rows_of, table_of
from headwater.errors import InputError, MissingExtra, NotFinite
from headwater.evaluate.means import Mean, written
from headwater.evaluate.mislabels import auroc
from headwater.features import baselines
from headwater.result import FeatureScores
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas

ATTRIBUTION = "attribution"
BASELINES = 16
"""Rows of the training fold that the default explanation compares with."""
Ids = np.ndarray
Ranking = Callable[["Fold"], "np.ndarray | None"]


@dataclass(frozen=True, eq=False)
class Fold:
    """What a ranking may look at: the training part of one fold, and a model of it. Nothing of the fold's test rows.

    ``model`` was fitted on ``fitted`` (X, y); ``held`` (X, y) are training rows that it has not seen. ``groups``: columns that count as one
    (single columns, unless twins were asked for). ``measure``: larger is better.
    """

    model: Any
    fitted: tuple[Any, np.ndarray]
    held: tuple[Any, np.ndarray]
    groups: tuple[Ids, ...]
    measure: Callable[[Any, Any, np.ndarray], float]
    seed: int


# ---- rankings: from a fold to the importance of each group -----------------------------------------------------------------------


def by_chance(fold: Fold, draws: int = 4) -> np.ndarray:
    """Random numbers, (draws, groups): what any ranking must beat. One draw alone may be lucky, so the measures of several are averaged."""
    return np.random.default_rng(fold.seed).random((draws, len(fold.groups)))


def by_permutation(fold: Fold, repeats: int = 5) -> np.ndarray:
    """How much the measure falls on held-out rows when the group's columns are shuffled together (Breiman 2001; Fisher et al. 2019)."""
    X, y = fold.held
    rng, whole = np.random.default_rng(fold.seed), fold.measure(fold.model, *fold.held)
    falls = [[whole - fold.measure(fold.model, _shuffled(X, group, rng), y) for _ in range(repeats)] for group in fold.groups]
    return np.array(falls).mean(1)


def by_information(fold: Fold) -> np.ndarray:
    """Mutual information of a column with the answer, the largest of the group; no model is asked. Needs scikit-learn.

    Text is counted as classes, numbers by nearest neighbours (Kraskov et al. 2004; Ross 2014).
    """
    try:
        from sklearn.feature_selection import mutual_info_classif, mutual_info_regression
    except ImportError as error:
        raise MissingExtra("mutual information without scikit-learn", "scikit-learn", "pip install 'headwater[trees]', or against={...} without it") from error
    X, y = fold.fitted
    columns = [column(X, j) for j in range(X.shape[1])]
    plain = np.column_stack([values.astype(float) if numeric(values) else np.unique(values.astype(str), return_inverse=True)[1] for values in columns])
    discrete = np.array([not numeric(values) for values in columns])
    information = mutual_info_regression if y.dtype.kind == "f" else mutual_info_classif
    found = information(plain, y, discrete_features=discrete, random_state=fold.seed)
    return np.array([found[group].max() for group in fold.groups])


def by_gain(fold: Fold) -> np.ndarray | None:
    """The model's own ``feature_importances_`` (gain, for scikit-learn's trees), summed over the group; None where it has none for these columns."""
    found = getattr(fold.model, "feature_importances_", None)
    if found is None or np.shape(found) != (fold.fitted[0].shape[1],):
        return None
    return np.array([np.asarray(found, dtype=float)[group].sum() for group in fold.groups])


RANKINGS: dict[str, Ranking] = {"permutation": by_permutation, "mutual information": by_information, "model gain": by_gain, "random": by_chance}
"""What the attributions are held against, unless ``against=`` says otherwise."""


# ---- measures -------------------------------------------------------------------------------------------------------------------


def accuracy(model: Any, X: Any, y: np.ndarray) -> float:
    """The share of rows whose class is right."""
    return float((predicted(model, X) == y).mean())


def auc(model: Any, X: Any, y: np.ndarray) -> float:
    """Of two classes: how often the model puts a row of the second (in sorted order) above one of the first."""
    kinds = np.unique(y)
    if len(kinds) != 2:
        raise InputError(f"{len(kinds)} classes for the area under the ROC curve", "two", "measure=selection.accuracy")
    method = next((m for m in ("decision_function", "predict_proba") if hasattr(model, m)), None)
    outputs = module_outputs(model, X) if method is None and callable(model) else np.asarray(getattr(model, method or "predict")(X))
    score = outputs[:, 1] - outputs[:, 0] if outputs.ndim == 2 and outputs.shape[1] == 2 else outputs.reshape(len(y))
    return auroc(score, y == kinds[1])


def r2(model: Any, X: Any, y: np.ndarray) -> float:
    """One minus the squared error over that of the mean."""
    return float(1 - ((predicted(model, X) - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())


# ---- the answer -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Selection:
    """How good models of few columns are, by the ranking that chose them (see :func:`select`).

    ``sizes`` (s,): columns kept. ``values[ranking]`` (folds, s): the measure on the fold's test rows; ``lines[ranking]``: their mean and interval.
    ``area[ranking]``: of the curve over log(size), in units of the measure. ``advantage[other]``: the attribution's area minus the other's, fold by
    fold. ``overlap[ranking]`` (s,): share of the kept columns that two folds have in common; ``chance`` (s,): that of random ones.
    ``orders[ranking]`` (folds, groups): best first; ``groups``: columns that counted as one; ``kept``: for each fold the column that stands for each group.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    sizes: np.ndarray
    values: dict[str, np.ndarray]
    lines: dict[str, tuple[Mean, ...]]
    area: dict[str, Mean]
    advantage: dict[str, Mean]
    overlap: dict[str, np.ndarray]
    chance: np.ndarray
    orders: dict[str, np.ndarray]
    measure: str
    folds: int
    ratio: float
    notes: tuple[str, ...] = ()

    def top(self, k: int = 10, ranking: str = ATTRIBUTION) -> tuple[str, ...]:
        """The k best columns (or groups of twins, joined by ``/``) by their mean place over the folds."""
        if ranking not in self.orders or k < 1:
            raise InputError(f"top({k}, {ranking!r})", f"at least one, by one of {', '.join(self.orders)}", "found.top(10)")
        places = np.argsort(self.orders[ranking], axis=1).mean(0)
        return tuple("/".join(self.groups[g]) for g in np.argsort(places, kind="stable")[:k])

    def at(self, k: int, ranking: str = ATTRIBUTION) -> Mean:
        """The measure with k columns, one of ``sizes``."""
        return self.lines[ranking][self._place(k)]

    def change(self, k: int, ranking: str = ATTRIBUTION) -> Mean:
        """What keeping k columns does to the measure of all of them, fold by fold: an improvement only where the whole interval is above 0.

        Choose k before looking: the best of many k looks better than it is.
        """
        values = self.values[ranking]
        return corrected(values[:, self._place(k)] - values[:, -1], self.ratio)

    def _place(self, k: int) -> int:
        if k not in self.sizes:
            raise InputError(f"k={k}", f"one of {self.sizes.tolist()}", "select(..., sizes=[...]) measures others")
        return int(np.flatnonzero(self.sizes == k)[0])

    def __repr__(self) -> str:
        ends = ", ".join(f"{line.mean:.3f} with {k}" for k, line in zip(self.sizes.tolist(), self.lines[ATTRIBUTION], strict=True))
        better = "; ".join(f"area {mean} above {name}" for name, mean in self.advantage.items())
        return f"Selection({self.measure} by attribution: {ends}; {better}; {self.folds} folds; good: flat to few columns, and above random)"

    @property
    def curve(self) -> report.Curve:
        """The measure over the number of columns kept."""
        lines = {name: line for name, line in self.lines.items() if name != "random"} | {name: line for name, line in self.lines.items() if name == "random"}
        series = tuple((name, np.log2(self.sizes), [m.mean for m in line], "reference" if name == "random" else "measured") for name, line in lines.items())
        return report.Curve(series, report.Axis("columns kept, log2"), report.Axis(self.measure))  # type: ignore[arg-type]

    @property
    def table(self) -> report.Table:
        """One row for each ranking: the measure at each size, and its area."""
        rows = tuple((name, *(written(m.mean) for m in line), repr(self.area[name])) for name, line in self.lines.items())
        return report.Table(("ranking", *(f"k = {k}" for k in self.sizes.tolist()), "area"), rows)

    @property
    def stability(self) -> report.Table:
        """One row for each ranking: how much of the choice two folds have in common."""
        rows = [(name, *map(written, row.tolist())) for name, row in {**self.overlap, "by chance": self.chance}.items()]
        return report.Table(("kept by two folds", *(f"k = {k}" for k in self.sizes.tolist())), tuple(rows))

    @property
    def bars(self) -> report.Bars:
        """How much more area the attribution has than each other ranking."""
        rows = tuple(report.Bar(name, m.mean, *m.bounds) for name, m in self.advantage.items())
        return report.Bars(rows, axis="area of the attribution minus that of the other", best="")

    @property
    def section(self) -> report.Section:
        """For a page."""
        best = f"The best columns by attribution: {', '.join(self.top(8))}."
        text = "\n\n".join([READING, best, *self.notes])
        title = "Which columns are worth keeping?" + (" Twins as one" if len(self.groups) < len(self.names) else "")
        return report.Section(title, text, (self.curve, self.table, self.bars, self.stability))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each ranking and size: mean, low, high, overlap. Needs pandas."""
        rows = [
            (name, k, m.mean, m.low, m.high, shared)
            for name, line in self.lines.items()
            for k, m, shared in zip(self.sizes.tolist(), line, self.overlap[name].tolist(), strict=True)
        ]
        return pandas_library().DataFrame(rows, columns=["ranking", "columns", "mean", "low", "high", "overlap"])

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page. Raises InputError, StorageError."""
        return report.write(report.Page("Feature selection", f"{self.measure} with few of {len(self.names)} columns, {self.folds} folds", (self.section,)), path)


READING = (
    "Columns are ranked on training rows alone, the best are kept, the model is trained again on them and measured on rows that neither the ranking "
    "nor the model saw. Intervals are 95 %, widened because the training rows of the folds overlap. A ranking is worth something where it is above random."
)


def select(
    fit: Callable[[Any, Any, int], Any],
    X: Any,
    y: Any,
    *,
    explain: Callable[[Any, Any], Any] | None = None,
    against: Mapping[str, Ranking] | None = None,
    sizes: Sequence[int] | None = None,
    measure: Callable[[Any, Any, np.ndarray], float] | None = None,
    folds: int | Iterable[tuple[Any, Any]] = 5,
    seeds: int = 1,
    twins: float | None = None,
    held: float = 0.25,
    feature_names: Sequence[str] | None = None,
    progress: bool = True,
) -> Selection:
    """Rank columns by mean ``|φ|``, keep the k best, train again: the measure against k, beside other rankings.

    For each fold one model is fitted on most of the training rows; it is explained on the rest of them, which gives the ranking, and other
    rankings see the same model and the same rows. Then, for each k, a new model is fitted on the kept columns of all training rows and measured
    on the test rows.

    Args:
        fit: ``(X, y, seed) -> model``: your own training, which must work with any of the columns. It gets X in its own form (a frame stays a frame).
        X: (n, p). y: (n,): floats are a regression, anything else classes.
        explain: ``(model, X) -> scores`` (n, columns), FeatureScores or an array. Default: ``hw.explain`` against 16 training rows, of the predicted
            class where there are more than two.
        against: other rankings by name, each from a :class:`Fold` to the importance of each group, or None where it does not apply; or to several
            rows of them, whose measures are averaged. Default: permutation, mutual information, the model's own gain, and random.
        sizes: how many columns to keep; default 1, 2, 4, ... and all of them.
        measure: ``(model, X, y) -> float``, larger is better; default: accuracy, or R² for a regression. ``selection.auc`` is another.
        folds: how many, or your own pairs (training rows, test rows): by person, by time.
        seeds: how often to cut anew into folds.
        twins: columns whose rank correlation is at least this (0.95, say) count as one, for which the column closest to the others stands;
            importance is that of all of them together. Twins share credit: each alone looks unimportant. Which are twins is seen on all rows,
            as it takes no labels. Then "all" columns are one of each group.
        held: share of the training rows that the ranking model is not fitted on.

    Raises InputError, before any training, for what does not fit; NotFinite; MissingExtra.

    Example::

        found = audit.select(lambda X, y, seed: RandomForestClassifier(random_state=seed).fit(X, y), X, y, seeds=2)
        found.change(5)                                       # what keeping five columns costs
    """
    work = _Work(fit, X, y, explain, dict(RANKINGS if against is None else against), measure, held, twins, feature_names)
    wanted, cuts = _sizes(sizes, work.p), _cuts(folds, seeds, work.y)
    names = [ATTRIBUTION, *work.rankings]
    values: dict[str, list[list[float]]] = {name: [] for name in names}
    orders: dict[str, list[np.ndarray]] = {name: [] for name in names}
    groups = work.twins()
    missing: set[str] = set()
    wanted = np.unique(np.minimum(wanted, len(groups)))
    with tqdm(total=len(cuts) * len(names) * len(wanted), unit="model", desc="select", disable=not progress, delay=2.0, leave=False) as bar:
        for number, (train, test) in enumerate(cuts):
            fold, stands = work.fold(train, groups, number)
            kept: dict[tuple[int, ...], float] = {}
            for name in names:
                importance = work.importance(name, fold)
                if importance is None:
                    missing.add(name)
                    bar.update(len(wanted))
                    continue
                ranked = np.argsort(-importance, axis=1, kind="stable")
                orders[name].append(ranked[0])
                values[name].append([])
                for k in wanted.tolist():
                    chosen = [tuple(sorted(stands[g] for g in order[:k])) for order in ranked]
                    for columns in set(chosen) - set(kept):
                        kept[columns] = work.measured(columns, train, test, number)
                    values[name][-1].append(float(np.mean([kept[columns] for columns in chosen])))
                    bar.update()
    for name in missing:
        values.pop(name), orders.pop(name)
    return work.answer(wanted, groups, {k: np.array(v) for k, v in values.items()}, {k: np.array(v) for k, v in orders.items()}, cuts, missing)


class _Work:
    """The data, checked, and what is done with one fold."""

    def __init__(self, fit: Any, X: Any, y: Any, explain: Any, rankings: dict[str, Ranking], measure: Any, held: float, twins: float | None, names: Any) -> None:
        self.X = table_of(X)
        self.p, self.fit, self.explain, self.rankings = self.X.shape[1], fit, explain, rankings
        self.y, self.names = labels_of(y, self.X.shape[0], "y"), names_of(self.X, names)
        self.classes = None if self.y.dtype.kind == "f" else np.unique(self.y)
        self.measure, self.held, self.alike = measure or (r2 if self.classes is None else accuracy), held, twins
        if not callable(fit):
            raise InputError(f"fit of type {type(fit).__name__}", "a function (X, y, seed) -> model", "lambda X, y, seed: clone(model).fit(X, y)")
        if ATTRIBUTION in rankings:
            raise InputError(f"a ranking named {ATTRIBUTION!r}", "another name", "that one is the explanation's")
        if not 0 < held < 1:
            raise InputError(f"held={held}", "a share between 0 and 1", "held=0.25")
        if twins is not None and not 0 < twins <= 1:
            raise InputError(f"twins={twins}", "a rank correlation above 0, at most 1", "twins=0.95")
        if self.p < 2:
            raise InputError("a table of one column", "at least two to choose from", "there is nothing to select")
        if self.classes is not None and len(self.classes) < 2:
            raise InputError("labels of one class", "at least two", "check y")

    def twins(self) -> tuple[Ids, ...]:
        """Columns that count as one: every two of them correlate at least so much (complete linkage)."""
        if self.alike is None:
            return tuple(np.array([j]) for j in range(self.p))
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        closeness = self.closeness(np.arange(len(self.y)))
        labels = fcluster(linkage(squareform(1 - closeness, checks=False), "complete"), 1 - self.alike + 1e-12, "distance")
        found = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        return tuple(sorted(found, key=lambda ids: int(ids[0])))

    def closeness(self, rows: np.ndarray) -> np.ndarray:
        """(p, p) size of the rank correlation; 0 with columns of text and constant ones, 1 with itself."""
        from scipy.stats import rankdata

        held = rows_of(self.X, rows)
        ranks = [column(held, j) for j in range(self.p)]
        centred = np.column_stack([rankdata(v) - (len(v) + 1) / 2 if numeric(v) and (v == v).all() else np.zeros(len(v)) for v in ranks])
        sizes = np.sqrt((centred**2).sum(0))
        unit = np.divide(centred, sizes, out=np.zeros_like(centred), where=sizes > 0)
        found = np.clip(np.abs(unit.T @ unit), 0, 1)
        np.fill_diagonal(found, 1)
        return found

    def fold(self, train: np.ndarray, groups: tuple[Ids, ...], number: int) -> tuple[Fold, list[int]]:
        """The ranking model of a fold, and the column that stands for each group."""
        parts = _assigned(self.y[train], max(2, round(1 / self.held)), self.classes is not None, [number, 1])
        inner, outer = train[parts != 0], train[parts == 0]
        pairs = [(rows_of(self.X, ids), self.y[ids]) for ids in (inner, outer)]
        stands = [int(group[0]) for group in groups]
        if any(len(group) > 2 for group in groups):
            closeness = self.closeness(train)
            stands = [int(group[closeness[np.ix_(group, group)].sum(1).argmax()]) for group in groups]
        return Fold(self.fit(*pairs[0], number), pairs[0], pairs[1], groups, self.measure, number), stands

    def importance(self, name: str, fold: Fold) -> np.ndarray | None:
        """(draws, groups) of one ranking, checked."""
        found = self.attribution(fold) if name == ATTRIBUTION else self.rankings[name](fold)
        if found is None:
            return None
        found = np.atleast_2d(np.asarray(found, dtype=float))
        if found.ndim != 2 or not len(found) or found.shape[1] != len(fold.groups):
            expected = f"one number for each of the {len(fold.groups)} of fold.groups, or rows of them"
            raise InputError(f"{name}: importance of shape {found.shape}", expected, "see audit.selection.Fold")
        if not np.isfinite(found).all():
            raise NotFinite(f"{name}: importance that is not finite", "numbers", "look at the model of that fold")
        return found

    def attribution(self, fold: Fold) -> np.ndarray:
        """Mean ``|Σφ|`` of each group over training rows that the model has not seen."""
        scores = _default(fold) if self.explain is None else self.explain(fold.model, fold.held[0])
        values = np.asarray(scores.values if isinstance(scores, FeatureScores) else scores, dtype=float)
        if values.shape != (fold.held[0].shape[0], self.p):
            raise InputError(f"scores of shape {values.shape}", f"{(fold.held[0].shape[0], self.p)}: one for each row and column", "explain the columns as they are in X")
        return np.array([np.abs(values[:, group].sum(1)).mean() for group in fold.groups])

    def measured(self, columns: tuple[int, ...], train: np.ndarray, test: np.ndarray, number: int) -> float:
        """A new model of these columns, on the test rows."""
        kept = columns_of(self.X, columns)
        found = float(self.measure(self.fit(rows_of(kept, train), self.y[train], number), rows_of(kept, test), self.y[test]))
        if not np.isfinite(found):
            raise NotFinite(f"a measure of {found} with {len(columns)} columns", "a number", "look at the measure and the fold's labels")
        return found

    def answer(self, sizes: np.ndarray, groups: Any, values: dict[str, np.ndarray], orders: dict[str, np.ndarray], cuts: Any, missing: set[str]) -> Selection:
        """Means, areas and overlaps."""
        ratio = float(np.mean([len(test) / len(train) for train, test in cuts]))
        areas = {name: _area(v, sizes) for name, v in values.items()}
        notes = [f"{name}: the models have none for these columns, so it is left out." for name in sorted(missing)]
        named = tuple(tuple(self.names[j] for j in group) for group in groups)
        if shared := [" / ".join(group) for group in named if len(group) > 1]:
            notes.append(f"Twins (rank correlation {self.alike:g} or more) count as one: {'; '.join(shared[:10])}{' and more' * (len(shared) > 10)}.")
        return Selection(
            self.names,
            named,
            sizes,
            values,
            {name: tuple(corrected(v[:, k], ratio) for k in range(len(sizes))) for name, v in values.items()},
            {name: corrected(a, ratio) for name, a in areas.items()},
            {name: corrected(areas[ATTRIBUTION] - a, ratio) for name, a in areas.items() if name != ATTRIBUTION},
            {name: np.array([_shared(order[:, :k]) for k in sizes.tolist()]) for name, order in orders.items()},
            sizes / len(groups),
            orders,
            {accuracy: "accuracy", auc: "area under the ROC curve", r2: "R²"}.get(self.measure, getattr(self.measure, "__name__", "measure")),
            len(cuts),
            ratio,
            tuple(notes),
        )


# ---- small things ---------------------------------------------------------------------------------------------------------------


def _default(fold: Fold) -> FeatureScores:
    """Against rows that the model was fitted on."""
    background = fold.fitted[0]
    return explained(fold.model, fold.held[0], baseline=baselines.dataset(background, min(BASELINES, background.shape[0])))


def _shuffled(X: Any, group: Ids, rng: np.random.Generator) -> Any:
    """X with the columns of the group shuffled over the rows, together."""
    other = rows_of(columns_of(X, group), rng.permutation(X.shape[0]))
    found = X.copy() if hasattr(X, "copy") else X.clone()
    if hasattr(found, "iloc"):
        for k, j in enumerate(group.tolist()):
            found.isetitem(j, other.iloc[:, k].to_numpy())
        return found
    if hasattr(found, "tolil"):
        found = found.tolil()
        found[:, group] = other
        return found.tocsr()
    found[:, group] = other
    return found


def _sizes(sizes: Sequence[int] | None, p: int) -> np.ndarray:
    """Rising, with all columns as the last."""
    if sizes is None:
        return np.array([*(2**k for k in range(int(np.log2(p)) + 1) if 2**k < p), p])
    given = np.unique(np.asarray(sizes))
    if given.dtype.kind not in "iu" or not len(given) or given[0] < 1 or given[-1] > p:
        raise InputError(f"sizes={list(sizes)}", f"whole numbers from 1 to {p}", "sizes=[1, 2, 4, 8]")
    return np.unique([*given.tolist(), p])


def _cuts(folds: Any, seeds: int, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of every fold of every cut."""
    if not isinstance(folds, int | np.integer):
        found = [(np.asarray(train), np.asarray(test)) for train, test in folds]
        for train, test in found:
            if not len(train) or not len(test) or np.intersect1d(train, test).size or max(train.max(), test.max()) >= len(y):
                raise InputError("a fold whose rows are none, shared or beyond the table", "pairs of row numbers that have none in common", "[(train, test), ...]")
        if not found or seeds != 1:
            raise InputError(f"{len(found)} folds of your own and seeds={seeds}", "at least one fold, and seeds=1", "put all cuts into folds")
        return found
    if folds < 2 or seeds < 1 or folds > len(y):
        raise InputError(f"folds={folds}, seeds={seeds}", f"from 2 to {len(y)} folds, at least one seed", "folds=5, seeds=2")
    parts = [_assigned(y, int(folds), y.dtype.kind != "f", [seed, 0]) for seed in range(seeds)]
    return [(np.flatnonzero(part != k), np.flatnonzero(part == k)) for part in parts for k in range(folds)]


def _assigned(y: np.ndarray, folds: int, classes: bool, seed: list[int]) -> np.ndarray:
    """(n,) which fold each row is in: at random, and the same share of each class in every fold."""
    order = np.random.default_rng(seed).permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")] if classes else order
    found = np.empty(len(y), dtype=int)
    found[order] = np.arange(len(y)) % folds
    return found


def _area(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(folds,) mean height of the curve over log(size): trapezoids.

    >>> _area(np.array([[0.0, 1.0, 1.0]]), np.array([1, 2, 4]))
    array([0.75])
    """
    if len(sizes) < 2:
        return values[:, 0]
    x = np.log(sizes)
    return np.asarray(((values[:, 1:] + values[:, :-1]) / 2 * np.diff(x)).sum(1) / (x[-1] - x[0]))


def _shared(orders: np.ndarray) -> float:
    """The mean over pairs of folds of the share that both kept (NaN for one fold).

    >>> _shared(np.array([[0, 1], [1, 2]]))
    0.5
    """
    kept = [set(row.tolist()) for row in orders]
    found = [len(a & b) / orders.shape[1] for a, b in combinations(kept, 2)]
    return float(np.mean(found)) if found else float("nan")
