"""Tables: what estimators are asked about. Inputs as columns of numbers, the class that is meant, baselines as rows, and averages over baselines.

Libraries that are not loaded are not loaded here either: a frame is known by having ``columns`` and ``iloc``, a sparse matrix by ``tocsr``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features import baselines, targets

DENSE = 1 << 28
"""Numbers in a dense table, at most: 2 GiB."""


def named(model: Any, *names: str) -> bool:
    """Whether the model's class, or one that it inherits from, has one of these names: ``"sklearn.svm.SVC"`` (top package and class).

    >>> named(np.zeros(2), "numpy.ndarray"), named(np.zeros(2), "sklearn.SVC")
    (True, False)
    """
    family = {f"{kind.__module__.split('.')[0]}.{kind.__qualname__}" for kind in type(model).__mro__}
    return any(f"{name.split('.')[0]}.{name.split('.')[-1]}" in family for name in names)


def is_frame(inputs: Any) -> bool:
    """A pandas-like data frame."""
    return hasattr(inputs, "columns") and hasattr(inputs, "iloc")


def is_sparse(inputs: Any) -> bool:
    """A scipy sparse matrix or array."""
    return hasattr(inputs, "tocsr") and hasattr(inputs, "nnz")


# ---- inputs ---------------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """``values`` (n, p) in float64 and the names of the columns (None where nobody named them)."""

    values: np.ndarray
    names: tuple[str, ...] | None


def table(inputs: Any, model: Any = None, feature_names: Sequence[str] | None = None, missing: bool = False) -> Table:
    """Inputs (an array, nested lists, a tensor, a frame of numbers) as numbers in float64, checked against what the model was fitted on.

    Args:
        model: its ``n_features_in_`` and ``feature_names_in_`` are compared with the inputs, where it has them.
        feature_names: of the columns; without them, a frame's own.
        missing: whether NaN is a value. Infinity never is.

    Raises InputError for anything but two axes, another count or order of columns, text, and values that are not finite.

    >>> table([[1, 2], [3, 4]]).values
    array([[1., 2.], [3., 4.]])
    """
    names = column_names(inputs, feature_names)
    values = numbers(inputs)
    if values.ndim != 2 or not len(values):
        raise InputError(f"inputs of shape {values.shape}", "a table (examples, columns) with at least one example", "for one example: X[:1]")
    check_columns(model, values.shape[1], names if is_frame(inputs) else None)
    if feature_names is not None and len(feature_names) != values.shape[1]:
        raise InputError(f"{len(feature_names)} feature_names for {values.shape[1]} columns", "one each", "name every column, or none")
    bad = np.isinf(values) if missing else ~np.isfinite(values)
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        label = column if names is None else names[column]
        raise InputError(f"the value {values[row, column]} in row {row}, column {label}", "finite numbers", "replace it first, or explain a pipeline that imputes it")
    return Table(values, names)


def numbers(inputs: Any) -> np.ndarray:
    """An array-like as float64. Raises InputError for text, and for sparse inputs that would not fit: answers are dense."""
    if is_sparse(inputs) and inputs.shape[0] * inputs.shape[1] > DENSE:
        raise InputError(f"sparse inputs of {inputs.shape[0]:,} by {inputs.shape[1]:,}", f"at most {DENSE:,} numbers, as answers are dense", "explain fewer rows at once")
    if isinstance(inputs, Tensor):
        inputs = inputs.detach().cpu()
    try:
        if is_frame(inputs):
            return np.array(inputs.to_numpy(dtype=np.float64, na_value=np.nan))  # a copy: pandas' own may be read-only, which torch refuses
        return np.asarray(inputs.toarray() if is_sparse(inputs) else inputs, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"inputs that are not a table of numbers ({error})", "numbers", "explain the pipeline that encodes its text columns") from error


def column_names(inputs: Any, feature_names: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """Those given, else a frame's own, else None."""
    if feature_names is not None:
        return tuple(map(str, feature_names))
    return tuple(map(str, inputs.columns)) if is_frame(inputs) else None


def check_columns(model: Any, count: int, names: Sequence[str] | None) -> None:
    """Raise InputError where the model was fitted on another count of columns, or on columns of other names or in another order."""
    expected = getattr(model, "n_features_in_", None)
    if expected and expected != count:  # a CatBoost model from a file says 0
        raise InputError(f"inputs with {count} columns", f"the {expected} that {type(model).__name__} was fitted on", "pass the columns that the model was fitted on")
    fitted = getattr(model, "feature_names_in_", None)
    if fitted is not None and names is not None and list(map(str, fitted)) != list(names):
        wrong = next(k for k, (a, b) in enumerate(zip(fitted, names, strict=True)) if str(a) != b)
        raise InputError(f"column {wrong} named {names[wrong]!r}", f"{str(fitted[wrong])!r}, as when the model was fitted", "reorder: X[model.feature_names_in_]")


def as_fitted(model: Any, values: np.ndarray) -> Any:
    """Numbers as the model wants them: a frame with the names that it was fitted on, where it knows names (else scikit-learn warns)."""
    fitted = getattr(model, "feature_names_in_", None)
    if fitted is None or len(fitted) != values.shape[1]:
        return values
    try:
        from pandas import DataFrame
    except ImportError:
        return values
    return DataFrame(values, columns=list(fitted))


# ---- targets --------------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Which column of the outputs each example is about: ``columns`` (n,), minus ``against`` (n,) where a pair was asked for."""

    columns: np.ndarray
    against: np.ndarray | None
    words: str


def class_target(classes: Any, target: Any, n: int) -> Target:
    """The class that ``target`` means: a label, n labels (one for each example), or a tuple of two labels (the first against the second).

    ``hw.targets.output(k)`` is the label k, not the class at place k, and ``hw.targets.margin(a, b)`` is the tuple (a, b) of labels. None means
    the second class of two. Raises InputError for an unknown label, for None with more than two classes, and for targets that are functions
    of the outputs.

    >>> class_target(["cat", "dog"], None, 3).words
    "class 'dog'"
    >>> class_target(["cat", "dog"], targets.margin("cat", "dog"), 3).words
    "class 'cat' against class 'dog'"
    """
    target = _plain(target, "model.predict_proba(X)")
    known = [value.item() if isinstance(value, np.generic) else value for value in classes]
    if target is None:
        if len(known) != 2:
            raise InputError(f"no target, and {len(known)} classes", "the class that is meant", f"target={known[0]!r}, or target=model.predict(X) for each example's own")
        target = known[1]
    if isinstance(target, tuple):
        if len(target) != 2:
            raise InputError(f"target={target!r}", "a label, one label for each example, or (a, b) for a against b", f"target={known[0]!r}")
        first, second = (class_target(known, label, n) for label in target)
        if (first.columns == second.columns).any():
            raise InputError(f"target={target!r}", "two classes", "a class against itself is zero")
        return Target(first.columns, second.columns, f"{first.words} against {second.words}")
    labels = target.detach().cpu().numpy() if isinstance(target, Tensor) else np.asarray(target)
    if labels.ndim == 0:
        return Target(np.full(n, _place(known, labels.item())), None, f"class {labels.item()!r}")
    if labels.shape != (n,):
        raise InputError(f"a target of shape {labels.shape} for {n} examples", "a label, or one for each example", f"target={known[0]!r}")
    return Target(np.array([_place(known, label) for label in labels.tolist()]), None, "the class given for each example")


def _plain(target: Any, outputs: str) -> Any:
    """A value of ``hw.targets`` as labels or indices, a pair as a tuple; anything else as it is. ``outputs``: how the user would write the outputs.

    Raises InputError for targets that are functions of the outputs.
    """
    if isinstance(target, targets.margin):
        return target.a, target.b
    if isinstance(target, targets.output):
        if isinstance(target.index, tuple):
            raise InputError(f"target=hw.targets.output({target.index!r}) for an estimator", "one label or index", "hw.targets.margin(a, b) is a against b")
        return target.index
    if not (isinstance(target, targets.Target | targets.continuation | targets.span) or callable(target)):
        return target
    name = f"hw.targets.{type(target).__name__}" if type(target).__name__ in targets.__all__ else "a function"
    by_name = {
        "hw.targets.probability": 'target=label, output="probability"',
        "hw.targets.log_odds": "explain the function itself: hw.explain(lambda X: scipy.special.logit(model.predict_proba(X)[:, k]), X)",
    }
    mend = by_name.get(name) if "proba" in outputs else None
    raise InputError(
        f"target={name} for an estimator",
        "a label of classifiers, an index of other estimators' outputs, one for each example, or hw.targets.margin of two",
        mend or f"explain the function itself: hw.explain(lambda X: f({outputs}), X)",
    )


def output_target(count: int, target: Any, n: int) -> Target:
    """Which of ``count`` outputs: an index, or one for each example, also as ``hw.targets.output(k)``. None where there is one output.

    ``hw.targets.margin(a, b)`` is output a minus output b. Raises InputError for other targets, and for an index that is not there.

    >>> output_target(3, -1, 2).columns
    array([2, 2])
    >>> output_target(3, targets.margin(0, 2), 2).words
    'output 0 minus output 2'
    """
    if isinstance(target, targets.margin):
        first, second = (output_target(count, index, n) for index in (target.a, target.b))
        if (first.columns == second.columns).any():
            raise InputError(f"target={target!r}", "two outputs", "an output minus itself is zero")
        return Target(first.columns, second.columns, f"{first.words} minus {second.words}")
    target = _plain(target, "model.predict(X)")
    if target is None:
        if count != 1:
            raise InputError(f"no target, and {count} outputs", "the output that is meant", f"target=0, say (up to {count - 1})")
        return Target(np.zeros(n, dtype=int), None, "the output")
    places = target.detach().cpu().numpy() if isinstance(target, Tensor) else np.asarray(target)
    if places.dtype.kind not in "iu" or places.shape not in ((), (n,)):
        raise InputError(f"target={target!r}", "the index of an output, or one for each example", "target=0, say")
    if (places < -count).any() or (places >= count).any():
        raise InputError(f"target={target!r} and {count} outputs", f"an index below {count}", "count from 0")
    words = f"output {int(places) % count}" if places.ndim == 0 else "the output given for each example"
    return Target(np.broadcast_to(places % count, n).astype(int), None, words)


def _place(known: list[Any], label: Any) -> int:
    for k, value in enumerate(known):
        if label == value:
            return k
    shown = ", ".join(map(repr, known[:12])) + (", ..." if len(known) > 12 else "")
    raise InputError(f"target={label!r}", f"one of the classes: {shown}", "the label itself, as model.classes_ has it, not its place")


# ---- baselines ------------------------------------------------------------------------------------------------------------------


class Against(NamedTuple):
    """K baselines: ``points``, each (1, p) for all examples or (n, p); ``weights`` (K,), which sum to 1; ``name`` in words.

    The points of a table of numbers are float64 arrays; those of a frame with text in it are frames.
    """

    points: list[Any]
    weights: np.ndarray
    name: str

    def mean(self, n: int) -> np.ndarray:
        """(n, p): the weighted mean of points of numbers."""
        return sum((w * np.broadcast_to(p, (n, p.shape[1])) for w, p in zip(self.weights, self.points, strict=True)), np.zeros(1))


def references(baseline: Any, x: Any, names: Sequence[str] | None = None, seed: int = 0, missing: bool = False) -> Against:
    """What ``baseline=`` comes to for a table: None (zeros), a number, a row, a row for each example, a dict column -> value, a frame of
    one or n rows, or one of ``hw.baselines``.

    Args:
        x: (n, p), numbers, or a frame where columns hold text (there a baseline is rows of such a frame).
        names: of the columns, for a dict or a frame.
        missing: whether NaN is a value of a baseline.
    """
    if isinstance(baseline, baselines.Average):
        found = [references(member, x, names, seed + k, missing) for k, member in enumerate(baseline.members)]
        shares = baseline.weights or (1 / len(found),) * len(found)
        weights = np.concatenate([share * one.weights for share, one in zip(shares, found, strict=True)])
        return Against([p for one in found for p in one.points], weights / weights.sum(), "the average over " + ", ".join(one.name for one in found))
    if isinstance(baseline, baselines.dataset | baselines.calibrated):
        return _drawn(baseline, x, names, seed, missing)
    if is_frame(x):
        return Against([_frame_rows(baseline, x)], np.ones(1), _given_name(baseline, len(x)))
    if isinstance(baseline, Mapping) or is_frame(baseline):
        rows: Any = _named_rows(baseline, x, names)
        _check_rows(rows.shape, x.shape)
        return Against([_finite(rows, missing)], np.ones(1), _given_name(baseline, len(x)))
    given = baseline is not None and not isinstance(baseline, baselines.Baseline | int | float)
    if given and missing:
        rows = numbers(baseline)
        rows = rows.reshape(1, -1) if rows.ndim == 1 else rows
        _check_rows(rows.shape, x.shape)
        return Against([_finite(rows, True)], np.ones(1), "a given point")
    if is_frame(getattr(baseline, "data", None)):
        baseline = replace(baseline, data=_named_rows(baseline.data, x, names))  # by the names of the columns, whatever their order
    found_ = baselines.references(baseline, (torch.from_numpy(np.array(x)),), seed)
    return Against([point.numpy() for point in found_.points[0].double()], found_.weights.numpy(), found_.name)


def _drawn(baseline: Any, x: Any, names: Sequence[str] | None, seed: int, missing: bool) -> Against:
    """Rows of a data set. Which ones is asked of the baseline itself, over the numbers of the rows in place of the rows."""
    data = baseline.data
    if is_frame(x) and not is_frame(data):
        raise InputError(f"baseline data of type {type(data).__name__} for a table with text columns", "a frame with the same columns", "pass rows of the training frame")
    rows: Any = data if is_frame(x) else _finite(_named_rows(data, x, names) if is_frame(data) else numbers(data), missing)
    if is_frame(x):
        _same_columns(rows, x)
    elif rows.ndim != 2 or rows.shape[1] != x.shape[1]:
        raise InputError(f"baseline data of shape {rows.shape} for {x.shape[1]} columns", f"(m, {x.shape[1]})", "give examples like the inputs")
    found = replace(baseline, data=np.arange(len(rows), dtype=float)[:, None]).references((torch.zeros(len(x), 1, dtype=torch.float64),), seed)
    picked = found.points[0][:, 0, 0].long().numpy()
    points = [rows.iloc[[k]] if is_frame(rows) else rows[[k]] for k in picked]
    return Against(points, found.weights.numpy(), found.name)


def _frame_rows(baseline: Any, x: Any) -> Any:
    """One row, or one for each example, of a frame like x."""
    if isinstance(baseline, Mapping):
        unknown = sorted(map(str, set(baseline) ^ set(x.columns)))
        if unknown:
            raise InputError(f"a baseline without, or with too many, of the columns: {', '.join(unknown[:5])}", "a value for every column", "{column: value, ...}")
        baseline = type(x)({column: [baseline[column]] for column in x.columns})
    if not is_frame(baseline):
        raise InputError(
            "no baseline" if baseline is None else f"a baseline of type {type(baseline).__name__}",
            "a row to compare with, since the table has columns of text",
            "baseline=X_train.iloc[[0]], a dict column -> value, or hw.baselines.dataset(X_train, 32)",
        )
    _same_columns(baseline, x)
    _check_rows(baseline.shape, x.shape)
    return baseline[list(x.columns)]


def _named_rows(rows: Any, x: np.ndarray, names: Sequence[str] | None) -> np.ndarray:
    """A dict or a frame as numbers, in the order of the columns."""
    columns = list(rows) if isinstance(rows, Mapping) else list(rows.columns)
    if names is None:
        if isinstance(rows, Mapping):
            raise InputError("a baseline by column name for columns without names", "names", "feature_names=[...], or pass a frame")
        found = numbers(rows)
    else:
        places = {str(column): column for column in columns}
        if set(places) != set(names):
            odd = sorted(set(places) ^ set(names))
            raise InputError(f"a baseline without, or with too many, of the columns: {', '.join(odd[:5])}", "a value for every column", f"{len(names)} columns")
        found = numbers([[rows[places[name]] for name in names]] if isinstance(rows, Mapping) else rows[[places[name] for name in names]])
    return found


def _same_columns(frame: Any, x: Any) -> None:
    odd = sorted(map(str, set(frame.columns) ^ set(x.columns)))
    if odd:
        raise InputError(f"a baseline without, or with too many, of the columns: {', '.join(odd[:5])}", "the columns of the inputs", "X_train[X.columns]")


def _check_rows(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] != expected[1] or shape[0] not in (1, expected[0]):
        raise InputError(
            f"a baseline of shape {tuple(shape)} for inputs of shape {tuple(expected)}",
            f"one row for all examples, or one for each of the {expected[0]}",
            "for many rows for every example: hw.baselines.dataset(rows, count)",
        )


def _finite(rows: np.ndarray, missing: bool) -> np.ndarray:
    if not (~np.isinf(rows) if missing else np.isfinite(rows)).all():
        raise InputError("a baseline with values that are not finite", "finite numbers", "replace NaN and infinity first")
    return rows


def _given_name(baseline: Any, n: int) -> str:
    each = is_frame(baseline) and len(baseline) == n > 1
    return "a given row for each example" if each else "a given row"


# ---- averages over baselines ----------------------------------------------------------------------------------------------------


@dataclass
class Spread:
    """A weighted mean of arrays and its standard error, as they come: for attributions over baselines.

    The variance is summed about the first array, so that equal arrays give exactly zero.

    >>> s = Spread(); s.add(0.5, np.array([1.0])); s.add(0.5, np.array([3.0])); s.mean(), s.stderr()
    (array([2.]), array([1.]))
    """

    count: int = 0
    first: Any = None
    _sums: tuple[Any, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, weight: float, values: np.ndarray) -> None:
        """One more array."""
        self.first = values if self.first is None else self.first
        off, square = values - self.first, weight * weight
        terms = (weight, weight * off, square, square * off, square * off * off)
        self.count, self._sums = self.count + 1, tuple(a + b for a, b in zip(self._sums, terms, strict=True))

    def mean(self) -> np.ndarray:
        """The weighted mean."""
        return cast(np.ndarray, self.first + self._sums[1] / self._sums[0])

    def stderr(self) -> np.ndarray | None:
        """``sqrt(K/(K-1) Σ w²(v - mean)²)``, which is std/√K for equal weights; None where there was one array."""
        if self.count < 2:
            return None
        total, off, w2, w2off, w2sq = self._sums
        mean = off / total
        return cast(np.ndarray, np.sqrt(np.maximum(w2sq - 2 * mean * w2off + mean**2 * w2, 0) * self.count / (self.count - 1)) / total)
