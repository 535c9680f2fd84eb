"""Tree ensembles: exact attributions in one walk over the trees, for scikit-learn, XGBoost, LightGBM and CatBoost.

``explain`` reads the model into plain arrays (:mod:`.forest`, one ``from_...`` module per library), moves the cuts of discrete columns
(:mod:`.discrete`), walks the trees (:mod:`.walk`, :mod:`.kernels`) and checks the sum against the forest's own prediction. Nothing is believed
unseen: what the arrays predict is compared with what the library itself predicts for some of the rows, and refused where they differ.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple, cast

import numpy as np

from headwater.errors import InputError
from headwater.features import baselines, tables
from headwater.features.question import Question
from headwater.features.trees import discrete, from_sklearn, walk
from headwater.features.trees.forest import Forest
from headwater.result import FeatureScores

LIBRARIES = {"sklearn": "from_sklearn", "xgboost": "from_xgboost", "lightgbm": "from_lightgbm", "catboost": "from_catboost"}
CLASSES = {
    "sklearn": tuple(name for name, _ in from_sklearn.READERS),
    "xgboost": ("XGBModel", "Booster"),
    "lightgbm": ("LGBMModel", "Booster"),
    "catboost": ("CatBoost",),
}
CHECKED = 16
"""Rows, at most, whose prediction is compared with the library's own."""

SUPPORTED = (
    "decision trees, random and extra forests, gradient boosting, histogram gradient boosting, AdaBoostClassifier and IsolationForest of scikit-learn; "
    "XGBoost (gbtree, dart); LightGBM (constant leaves); CatBoost (numeric features)"
)


def recognises(question: Question) -> bool:
    """Whether the model is an ensemble of trees (or a single one) of a library that is loaded.

    Voting, stacking and bagging are models of models, and none of these.
    """
    return _family(question.model) is not None


def _family(model: Any) -> str | None:
    for top in LIBRARIES:
        if top in sys.modules and tables.named(model, *(f"{top}.{name}" for name in CLASSES[top])):
            return top
    return None


def forest_of(model: Any) -> Forest:
    """The model as plain arrays. Raises InputError for a model that is not fitted, and for one that is not a sum of trees."""
    family = _family(model)
    found = None if family is None else _adapter(family).forest(model)
    if found is None:
        raise InputError(f"a model of type {type(model).__name__}", SUPPORTED, "hw.explain(model.predict, X) explains any function of a table")
    return found


def _adapter(family: str) -> Any:
    return import_module(f"headwater.features.trees.{LIBRARIES[family]}")


def _agrees(forest: Forest, question: Question, margins: np.ndarray) -> None:
    """Raise InputError where ``margins`` (n, outputs) are not what the library itself predicts, for up to CHECKED rows from first to last."""
    family = cast(str, _family(question.model))
    library = _adapter(family)
    rows = np.unique(np.linspace(0, len(margins) - 1, CHECKED).round().astype(int))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of columns, which were checked
        some = _some(forest, question.inputs, rows)
        known = np.asarray(library.own(question.model, some), dtype=float).reshape(len(rows), -1)
        linked = None if question.output in (None, "margin") else np.asarray(library.predicted(question.model, some), dtype=float).reshape(len(rows), -1)
    version = getattr(sys.modules[family], "__version__", "of no version")
    expected = ("the library's own prediction", "explain the function instead: hw.explain(model.predict, X)")
    if known.shape[1] != forest.outputs:
        raise InputError(f"the trees of {forest.library} {version} read as {forest.outputs} outputs, where the library predicts {known.shape[1]}", *expected)
    off = ~(np.abs(margins[rows] - known) <= forest.roundoff())
    if off.any():
        row, column = map(int, np.argwhere(off)[0])
        pair = f"{margins[rows[row], column]:.9g}, not {known[row, column]:.9g}"
        raise InputError(f"the trees of {forest.library} {version}, which as they were read give another prediction for row {rows[row]}: {pair}", *expected)
    if linked is not None:
        _link_agrees(forest, question, forest.link(margins[rows]), linked)


def _link_agrees(forest: Forest, question: Question, shown: np.ndarray, known: np.ndarray) -> None:
    """Raise InputError where ``shown`` (n, outputs), margins through the link, are not what the library predicts; of two classes it may give both."""
    known = known[:, 1:] if shown.shape[1] == 1 and known.shape[1] == 2 else known
    # Each link changes relatively at most as much as the margins do absolutely.
    allowed = 4 * (max(1.0, forest.link.slope) * forest.roundoff().max() + 1e-6) * np.abs(known).max()
    if shown.shape != known.shape or not (np.abs(shown - known) <= allowed).all():
        raise InputError(
            f"output={question.output!r} of {forest.library}, whose own predictions are no {forest.link.kind} function of its margins",
            "the margins",
            "leave output out, or explain the function itself: hw.explain(model.predict, X)",
        )


def _some(forest: Forest, inputs: Any, rows: np.ndarray) -> Any:
    """Some rows as the library takes them: a frame or a sparse matrix itself where the library reads them in a way of its own, else numbers."""
    if tables.is_frame(inputs):
        some = inputs.iloc[rows]
        return tables.numbers(some) if forest.encode is None else some if forest.names is None else some.set_axis(list(forest.names), axis=1)
    if tables.is_sparse(inputs):
        some = inputs.tocsr()[rows]
        return tables.numbers(some) if forest.encode is None else some
    return tables.numbers(inputs)[rows]


class Asked(NamedTuple):
    """What a row is about: ``weights`` (n, outputs) of the margins, or of the linked outputs, and what that is in words."""

    weights: np.ndarray
    words: str


def explain(question: Question) -> FeatureScores:
    """Exact attributions of a tree ensemble; see :func:`headwater.explain`."""
    question.refuse("tree ensembles", "tolerance", "max_evaluations", instead="leave it out: the attributions are exact")
    question.only("tree ensembles", "output", "discrete", "batch_size")
    forest = forest_of(question.model)
    space = _space(forest, question.output)
    x, names = _inputs(forest, question)
    against = _against(forest, question, x, names)
    x, points = forest.read(x), [forest.read(p) for p in against.points]
    margins = forest.raw(x)
    _agrees(forest, question, margins)
    asked = _asked(forest, question.target, margins, space)
    levels = "auto" if question.discrete is None else question.discrete
    found = _walked(forest, x, points, against.weights, asked.weights, space, None if levels is False else levels, names, _batch(question.batch_size))
    return _scores(question, forest, space, asked, x, names, against, points, margins, found)


def _batch(size: int | None) -> int:
    if size is None:
        return 4096
    if size < 1:
        raise InputError(f"batch_size={size}", "a positive number", "leave it out")
    return size


def _space(forest: Forest, output: str | None) -> str:
    """What is explained: "margin" or "probability" ("prediction": through whatever link the model has)."""
    if output in (None, "margin"):
        return "margin"
    if output == "probability" and forest.classes is not None:
        return "margin" if forest.margin == "probability" else "probability"
    if output == "prediction":
        return "margin" if forest.link.kind == "identity" else "probability"
    raise InputError(
        f"output={output!r}", '"margin" (the additive raw score), "probability" (classifiers), or "prediction" (through the model\'s link)', 'output="margin"'
    )


def _inputs(forest: Forest, question: Question) -> tuple[np.ndarray, tuple[str, ...] | None]:
    own = tables.column_names(question.inputs, question.feature_names)
    if tables.is_frame(question.inputs):
        tables.check_columns(question.model, question.inputs.shape[1], own)
    encoded = question.inputs if forest.encode is None else forest.encode(question.inputs)
    values, _ = tables.table(encoded, None, question.feature_names, missing=forest.missing)
    if values.shape[1] != forest.features:
        raise InputError(f"inputs with {values.shape[1]} columns", f"the {forest.features} that the model was fitted on", "pass the columns that the model was fitted on")
    fitted = forest.names
    if tables.is_frame(question.inputs) and fitted is not None and own is not None and question.feature_names is None and list(own) != list(fitted):
        wrong = next(k for k, (a, b) in enumerate(zip(own, fitted, strict=True)) if a != b)
        raise InputError(f"column {wrong} named {own[wrong]!r}", f"{fitted[wrong]!r}, as when the model was fitted", "bring the columns into that order")
    if (np.abs(values) > 1e300).any():
        raise InputError("values beyond 1e300", "values whose differences are finite", "rescale them")
    return values, own if own is not None else fitted


def _against(forest: Forest, question: Question, x: np.ndarray, names: tuple[str, ...] | None) -> tables.Against:
    """The baselines as numbers, categories as the codes that the model knows them by."""
    asks = forest.categorical
    if asks is not None and asks.any() and question.baseline is None:
        which = ", ".join(names[j] if names else str(j) for j in np.flatnonzero(asks)[:5])
        raise InputError(
            f"no baseline, and columns of categories ({which})",
            "a row to compare with: zero is no category",
            "baseline=X_train.iloc[[0]], or hw.baselines.dataset(X_train, 32)",
        )
    found = tables.references(_encoded(forest, question.baseline, question.inputs), x, names, question.seed, missing=forest.missing)
    if asks is not None and any((p[:, asks] != np.rint(p[:, asks])).any() for p in (np.nan_to_num(p) for p in found.points)):
        raise InputError(f"a baseline ({found.name}) between categories", "categories that exist", "compare with rows: hw.baselines.dataset(X_train, 32)")
    return found


def _encoded(forest: Forest, baseline: Any, inputs: Any) -> Any:
    """A baseline with frames, dicts or arrays in it, as numbers."""
    if forest.encode is None:
        return baseline
    if isinstance(baseline, baselines.Average):
        return replace(baseline, members=tuple(_encoded(forest, member, inputs) for member in baseline.members))
    if is_dataclass(baseline) and any(f.name == "data" for f in fields(baseline)) and not isinstance(baseline, type):
        return replace(baseline, data=_rows(forest, getattr(baseline, "data")))  # noqa: B009
    if isinstance(baseline, Mapping) and tables.is_frame(inputs) and set(map(str, baseline)) == set(map(str, inputs.columns)):
        frame = type(inputs)({column: [baseline[column]] for column in inputs.columns})
        return _rows(forest, frame.astype({c: inputs[c].dtype for c in inputs.columns if hasattr(inputs[c].dtype, "categories")}))
    if isinstance(baseline, baselines.Baseline) or baseline is None or np.ndim(baseline) == 0:
        return baseline
    if not (tables.is_frame(baseline) or tables.is_sparse(baseline)):
        baseline = tables.numbers(baseline)
        baseline = baseline.reshape(1, -1) if baseline.ndim == 1 else baseline
    return _rows(forest, baseline)


def _rows(forest: Forest, rows: Any) -> Any:
    assert forest.encode is not None
    return tables.numbers(forest.encode(rows if tables.is_frame(rows) or tables.is_sparse(rows) else tables.numbers(rows)))


def _asked(forest: Forest, target: Any, margins: np.ndarray, space: str) -> Asked:
    n, outputs = margins.shape
    if forest.classes is None:
        found = tables.output_target(outputs, target, n)
    elif target is None and len(forest.classes) != 2:
        found = tables.Target(forest.link(margins).argmax(1) if forest.link.kind == "sigmoid" else margins.argmax(1), None, "the predicted class of each row")
    else:
        found = tables.class_target(forest.classes, target, n)
    unit = (
        {"identity": forest.margin, "isolation": "score"}.get(forest.link.kind, "probability" if forest.classes else "prediction") if space != "margin" else forest.margin
    )
    weights = np.zeros((n, outputs))
    if forest.classes is not None and len(forest.classes) == 2 and outputs == 1:
        weights[:, 0] = np.where(found.columns == 1, 1.0, -1.0)  # the second class has the margin, the first its negative
    else:
        weights[np.arange(n), found.columns] = 1.0
        if found.against is not None:
            weights[np.arange(n), found.against] -= 1.0
    return Asked(weights, f"{unit} of {found.words}")


class Walked(NamedTuple):
    """values (n, p), stderr or None, columns whose cuts were moved (and for how many rows), corners that took the diagonal formula."""

    values: np.ndarray
    stderr: np.ndarray | None
    moved: dict[int, int]
    diagonal: int


def _walked(
    forest: Forest, x: np.ndarray, points: list[np.ndarray], shares: np.ndarray, weights: np.ndarray, space: str, levels: Any, names: Any, batch: int
) -> Walked:  # fmt: skip
    values, stderr = np.zeros(x.shape), np.zeros(x.shape)
    moved: dict[int, int] = {}
    diagonal = 0
    kinds, which = np.unique(weights, axis=0, return_inverse=True)
    stacked = _stack(points, len(x))
    general = forest.general(x, stacked)
    for part in discrete.parts(forest, x, stacked, levels, names):
        moved |= {j: moved.get(j, 0) + len(part.rows) for j in part.moved}
        for k, kind in enumerate(kinds):
            rows = part.rows[which.reshape(-1)[part.rows] == k]
            packed = forest.packed(kind, part.cuts) if space == "margin" and len(rows) else None
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch]
                here = np.ascontiguousarray(stacked if stacked.shape[1] == 1 else stacked[:, some])
                if packed is not None:
                    values[some], error = walk.attributions(packed, x[some], here, shares, general)
                    stderr[some] = 0.0 if error is None else error
                else:
                    spread = tables.Spread()
                    for share, point in zip(shares, here, strict=True):
                        phi, corners = walk.linked(forest, part.cuts, x[some], point, kind, general)
                        spread.add(float(share), phi)
                        diagonal += corners
                    values[some] = spread.mean()
                    stderr[some] = 0.0 if len(shares) == 1 else spread.stderr()
    return Walked(values, None if len(shares) == 1 else stderr, moved, diagonal)


def _stack(points: list[np.ndarray], n: int) -> np.ndarray:
    """(K, 1 or n, p)."""
    each = any(len(p) != 1 for p in points)
    return np.stack([np.broadcast_to(p, (n, p.shape[1])) if each else p for p in points])


def _predicted(forest: Forest, margins: np.ndarray, weights: np.ndarray, space: str) -> np.ndarray:
    """(n,): what is explained, from margins (n or 1, outputs). The first of two classes has the negative margin, and one minus the probability."""
    shown = margins if space == "margin" else forest.link(margins)
    found = (shown * weights).sum(1)
    if space != "margin" and forest.classes is not None and len(forest.classes) == 2 and forest.outputs == 1:
        found = found + (weights[:, 0] < 0)
    return np.asarray(found)


def _scores(
    question: Question, forest: Forest, space: str, asked: Asked, x: np.ndarray, names: Any, against: tables.Against,
    points: list[np.ndarray], margins: np.ndarray, found: Walked,
) -> FeatureScores:  # fmt: skip
    n = len(x)
    output = _predicted(forest, margins, asked.weights, space)
    before = sum((share * _predicted(forest, forest.raw(p), asked.weights, space) for share, p in zip(against.weights, points, strict=True)), np.zeros(n))
    trees = len(forest.roots)
    return FeatureScores(
        values=found.values,
        residual=found.values.sum(1) - (output - before),
        evaluations=np.zeros(n, int),
        output=output,
        baseline_output=before,
        method=f"exact trees ({forest.library}, {trees:,} tree{'s' * (trees != 1)})",
        target=asked.words,
        baseline=against.name,
        stderr=found.stderr,
        inputs=x,
        reference=against.mean(n),
        kind="table",
        feature_names=names,
        example_names=None if question.example_names is None else tuple(map(str, question.example_names)),
        notes=_notes(question, forest, space, x, names, points, found),
        provenance={"trees": trees, "nodes": len(forest.left), "output": space, "baselines": len(against.weights), "seed": question.seed, "threads": walk.threads()},
    )


def _notes(question: Question, forest: Forest, space: str, x: np.ndarray, names: Any, points: list[np.ndarray], found: Walked) -> tuple[str, ...]:
    said = list(forest.notes)
    n = len(x)
    label = [names[j] if names else f"column {j}" for j in range(forest.features)]
    if found.moved:
        some = [label[j] + (f" ({rows} of {n} rows)" if rows < n else "") for j, rows in found.moved.items()]
        said.append(
            f"the cuts of discrete columns stand at the midpoint between levels (discrete=False leaves them): {', '.join(some[:20])}{' and more' * (len(some) > 20)}"
        )
    if question.discrete is None and (odd := [label[j] for j in discrete.elsewhere(forest, x, points)]):
        said.append(
            f"whole numbers here, though cuts lie anywhere between them: {', '.join(odd[:20])}; if they are discrete, discrete=[...] moves the cuts to the middle"
        )
    if np.isnan(x).any() or any(np.isnan(p).any() for p in points):
        said.append("missing values switch to the other end's value halfway along the path")
    if forest.categorical is not None and forest.categorical.any():
        said.append(f"categories switch halfway along the path, and are shown as codes: {', '.join(label[j] for j in np.flatnonzero(forest.categorical)[:20])}")
    if question.output == "probability" and space == "margin":
        said.append("the probability is the additive output of this ensemble: margin and probability are one")
    if space != "margin":
        said.append(
            f"features that cross at the same place share the change of the {'probability' if forest.classes else 'prediction'} by the Shapley value of that corner"
        )
    if found.diagonal:
        said.append(f"{found.diagonal} corners of more than {walk.MOST} features were shared by the diagonal formula instead")
    same = np.all([((x == p) | (np.isnan(x) & np.isnan(p))).all(1) for p in points], axis=0)
    if same.any():
        said.append(f"{int(same.sum())} of {n} inputs equal their baseline: nothing to attribute")
    return tuple(said)
