"""Pipelines, explained in their original columns: rows go through the steps, the last step is explained there, and its answer comes back.

- Steps that keep columns apart (scalers, encoders, imputers, selectors): the values of all columns made of an original one are summed.
- Steps that mix columns (PCA, polynomial features, kernel features): gradients are pulled back through them, for last steps that
  :mod:`headwater.features.kernels` reads; the path is straight before the first of them.
- Texts: the columns are the terms of the vocabulary that occur.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features import kernels, tables
from headwater.features.explain import FAMILIES
from headwater.features.kernels import estimators
from headwater.features.kernels.paths import Effort
from headwater.features.kernels.readings import Array, Reading
from headwater.features.pipelines.maps import Affine, Map
from headwater.features.pipelines.steps import VECTORIZERS, State, advance, dense, flattened, is_text, refused
from headwater.features.question import Question
from headwater.result import FeatureScores

__all__ = ["explain", "recognises"]

WRAPPERS = {
    "best_estimator_": ("sklearn.BaseSearchCV",),
    "estimator_": ("sklearn.TunedThresholdClassifierCV", "sklearn.FixedThresholdClassifier"),
    "estimator": ("sklearn.FrozenEstimator",),
}
"""Estimators that predict by another one, and where that stands."""


def recognises(question: Question) -> bool:
    """A scikit-learn pipeline, or a search that holds the estimator it found."""
    return tables.named(question.model, "sklearn.Pipeline", *(name for names in WRAPPERS.values() for name in names))


def explain(question: Question) -> FeatureScores:
    """Attributions (n, original columns), or (n, terms) for texts."""
    for attribute, names in WRAPPERS.items():
        if tables.named(question.model, *names):
            return _wrapped(question, attribute)
    steps = flattened(question.model.steps)
    if not steps or not hasattr(steps[-1], "predict"):
        raise InputError("a pipeline without a predictor at its end", "a last step that predicts", "explain a pipeline that ends in an estimator")
    kernels.straight_only(question, "a pipeline")
    question.refuse("a pipeline", "layer", "neuron", "space", "extra", "smooth", "tokenizer")
    rows = _texts(question, steps) if type(steps[0]).__name__ in VECTORIZERS else _table(question, steps)
    answers = [_one(question, steps[-1], rows, k) for k in range(len(rows.against.points))]
    return _gathered(question, steps, rows, answers)


def _wrapped(question: Question, attribute: str) -> FeatureScores:
    name = type(question.model).__name__
    if not hasattr(question.model, attribute):
        raise InputError(f"a {name} without {attribute}", "a fitted one (a search with refit=True)", "model.fit(X, y) first")
    inner = getattr(question.model, attribute)
    answer = _family(replace(question, model=inner), question.model)
    return replace(answer, notes=(f"Explained is the {attribute} of {name}, a {type(inner).__name__}.", *answer.notes))


def _family(question: Question, whole: Any) -> FeatureScores:
    """The answer of whichever family explains this estimator. Raises InputError where only functions of it could be."""
    last = [name for name in FAMILIES if name not in ("text", "blackbox")]
    for name in sorted(last, key=lambda name: name != "kernels"):  # no two of them know the same model
        family = import_module(f"headwater.features.{name}")
        if family.recognises(question):
            answer: FeatureScores = family.explain(question)
            return answer
    method = next((m for m in ("predict_proba", "decision_function") if hasattr(whole, m)), "predict")
    raise InputError(
        f"a {type(whole).__name__} that ends in {type(question.model).__name__}, which is explained in no closed form",
        "a linear model, kernel machine, tree ensemble or perceptron at its end",
        f"explain it as a function: hw.explain(pipeline.{method}, X" + (", target=1)" if method != "predict" else ")"),
    )


# ---- rows -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Inputs and baselines on the other side of the steps: ``state`` holds the n inputs first, then each baseline's rows, ``counts`` of them."""

    state: State
    n: int
    counts: list[int]
    against: tables.Against
    names: tuple[str, ...] | None
    columns: int
    inputs: Array | None
    reference: Array | None

    def take(self, values: Any, k: int) -> tuple[Any, Any]:
        """The inputs' rows and baseline k's."""
        first = self.n + sum(self.counts[:k])
        part = values.iloc if tables.is_frame(values) else values
        return part[: self.n], part[first : first + self.counts[k]]


def _table(question: Question, steps: list[Any]) -> Rows:
    inputs = question.inputs
    if is_text(inputs):
        raise InputError("texts for a pipeline whose first step is " + type(steps[0]).__name__, "a table", "start the pipeline with a vectorizer")
    names = tables.column_names(inputs, question.feature_names)
    frame = _as_frame(inputs)
    count = inputs.shape[1] if hasattr(inputs, "shape") and len(inputs.shape) == 2 else len(inputs[0])
    tables.check_columns(steps[0], count, tables.column_names(inputs) if tables.is_frame(inputs) else None)
    if frame is not None:
        against = tables.references(question.baseline, frame, names, question.seed, missing=True)
        stacked = _stacked([frame, *against.points])
        stacked = stacked if tables.is_frame(inputs) else stacked.to_numpy(dtype=object)
        state = _walk(steps, State(stacked, np.arange(count)))
        return Rows(state, len(frame), list(map(len, against.points)), against, names, count, None, None)
    table = tables.table(inputs, None, question.feature_names, missing=True)
    against = tables.references(question.baseline, table.values, table.names, question.seed, missing=True)
    values = np.concatenate([table.values, *against.points])
    stacked = type(inputs)(values, columns=inputs.columns) if tables.is_frame(inputs) else values
    state = _walk(steps, State(stacked, np.arange(count)))
    return Rows(state, len(table.values), list(map(len, against.points)), against, table.names, count, table.values, against.mean(len(table.values)))


def _as_frame(inputs: Any) -> Any:
    """A frame where some columns hold no numbers; None where all do."""
    if tables.is_frame(inputs):
        plain = all(getattr(kind, "kind", "O") in "iuf" and kind.name != "category" for kind in inputs.dtypes)
        return None if plain else inputs.reset_index(drop=True)
    array = np.asarray(inputs) if not tables.is_sparse(inputs) and not hasattr(inputs, "detach") else None
    if array is None or array.dtype.kind in "iufb":
        return None
    from pandas import DataFrame

    return DataFrame(np.asarray(inputs, dtype=object))


def _stacked(frames: list[Any]) -> Any:
    from pandas import concat

    return concat(frames, ignore_index=True)


def _walk(steps: list[Any], state: State) -> State:
    for step in steps[:-1]:
        state = advance(step, state)
    return state


def _texts(question: Question, steps: list[Any]) -> Rows:
    """Texts as the terms that occur in them."""
    if not is_text(question.inputs):
        raise InputError(f"inputs of type {type(question.inputs).__name__} for a pipeline of texts", "a list of texts", 'hw.explain(pipeline, ["a text"])')
    texts, base, name = list(question.inputs), _text_baseline(question.baseline, len(question.inputs)), "the empty text" if question.baseline is None else "a given text"
    counts = steps[0].transform([*texts, *base])
    first = 1
    if len(steps) > 2 and type(steps[1]).__name__ == "TfidfTransformer":
        counts, first = steps[1].transform(counts), 2
    if not hasattr(steps[0], "get_feature_names_out"):
        raise refused(steps[0], "which keeps no vocabulary")
    terms = steps[0].get_feature_names_out() if question.feature_names is None else question.feature_names
    used = np.unique(counts.nonzero()[1])
    against = tables.Against([dense(counts[len(texts) :, used])], np.ones(1), name)
    state = State(counts, np.arange(counts.shape[1]))
    if len(steps) == first + 1 and (shrunk := _shrunk(steps[-1], used)) is not None:
        state, steps[-1] = State(counts[:, used], np.arange(len(used))), shrunk
    else:
        state = _walk(steps[first:], state)
        place = np.full(counts.shape[1], len(used))
        place[used] = np.arange(len(used))
        state = replace(state, owners=place[state.owners])
    return Rows(state, len(texts), [len(base)], against, tuple(map(str, np.asarray(terms)[used])), len(used), dense(counts[: len(texts), used]), against.mean(len(texts)))


def _text_baseline(baseline: Any, n: int) -> list[str]:
    texts = [""] if baseline is None else [baseline] if isinstance(baseline, str) else list(baseline) if is_text(baseline) else None
    if texts is None or len(texts) not in (1, n):
        raise InputError(f"a baseline of type {type(baseline).__name__} for texts", "a text, or one for each example", 'baseline="", which is the default')
    return texts


def _shrunk(model: Any, used: Array) -> Any:
    """A linear model of these columns alone; None for any other model."""
    attribute = next((name for name in ("coef_", "feature_log_prob_") if hasattr(model, name)), None)
    read = estimators.reader(model)
    if read is None or attribute is None or not hasattr(model, "n_features_in_") or read.__name__ not in ("_linear", "_naive"):
        return None
    smaller = copy(model)
    weights = getattr(model, attribute)
    setattr(smaller, attribute, (weights.toarray() if tables.is_sparse(weights) else weights)[..., used])
    smaller.n_features_in_ = len(used)
    return smaller


# ---- the last step --------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """Values (n, original columns) against one baseline, and the last step's own answer about the rest."""

    values: Array
    output: Array
    baseline_output: Array
    evaluations: Array
    target: str
    method: str
    converged: Array | None
    notes: tuple[str, ...] = ()


def _one(question: Question, last: Any, rows: Rows, k: int) -> Answer:
    state = rows.state
    if state.map is None:
        z, base = rows.take(_named(last, state.data), k)
        found = _family(_inner(question, last, z, base, state), question.model)
        values = np.asarray(found.values)
        answer = Answer(values, found.output, found.baseline_output, found.evaluations, found.target, found.method, found.converged, found.notes)
    else:
        answer = _pulled_back(question, last, rows, k, state.map)
    answer.values = folded(answer.values, state.owners, rows.columns + 1)[:, : rows.columns]  # the last column: terms that occur in no text
    return answer


def folded(values: Array, owners: Array, columns: int) -> Array:
    """(n, columns): the sum of the values (n, p) of each owner (p,).

    >>> folded(np.array([[1.0, 2.0, 4.0]]), np.array([1, 0, 1]), 3)
    array([[2., 5., 0.]])
    """
    from scipy.sparse import csr_array

    return np.ascontiguousarray((csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))), shape=(columns, len(owners))) @ values.T).T)


def _named(last: Any, data: Any) -> Any:
    """The last step's inputs as it was fitted: a frame where the steps give frames."""
    return data if tables.is_frame(data) and hasattr(last, "feature_names_in_") else dense(data)


def _inner(question: Question, last: Any, z: Any, base: Any, state: State) -> Question:
    discrete = question.discrete
    if discrete is not None and not isinstance(discrete, bool):
        names = list(tables.column_names(question.inputs, question.feature_names) or ())
        chosen = {names.index(one) if isinstance(one, str) else int(one) for one in discrete}
        discrete = [j for j, owner in enumerate(state.owners.tolist()) if owner in chosen]
    return replace(question, model=last, inputs=z, baseline=base, discrete=discrete, feature_names=None, example_names=None, path=None)


def _pulled_back(question: Question, last: Any, rows: Rows, k: int, map_: Map) -> Answer:
    """Through steps that mix columns: the last step's reading, composed with them, on the straight path before the first of them."""
    if not estimators.known(last):
        raise refused(last, "whose gradient is not known, after a step that mixes columns")
    question.refuse("a pipeline that mixes columns", "discrete")
    u, base = rows.take(rows.state.numbers, k)
    try:
        reading = kernels.reading_of(replace(question, model=last), map_.forward(u))
    except estimators.CallableKernel as error:
        raise refused(last, "whose kernel is a function") from error
    inner = composed_reading(reading, map_)
    part = kernels.part(inner, u, np.array(np.broadcast_to(base, u.shape)), question.target, Effort.of(question, inner.rows))
    converged = None if question.tolerance is None else part.found.converged
    return Answer(part.found.values, part.output, part.baseline_output, part.found.evaluations, part.target, part.method, converged)


def composed_reading(reading: Reading, map_: Map) -> Reading:
    """A reading of ``u -> reading(map(u))``. Closed forms survive an affine map: the straight path stays straight, gradients come back by its transpose."""

    def closed(x: Array, b: Array, w: Array) -> Array | None:
        if not isinstance(map_, Affine):
            return None
        inner = reading.closed(map_.forward(x), map_.forward(b), w)
        return None if inner is None else map_.pull(x, inner)

    def pull(U: Array, W: Array) -> Array:
        return map_.pull(U, reading.pull(map_.forward(U), W))

    method = reading.method if isinstance(map_, Affine) else "Gauss-Legendre on the analytic gradient, through the steps"
    width = reading.width + (map_.matrix.size if isinstance(map_, Affine) else 64)
    return Reading(lambda U: reading.outputs(map_.forward(U)), pull, closed, reading.aim, method, width, kinks=reading.kinks)


# ---- the answer -----------------------------------------------------------------------------------------------------------------


def _gathered(question: Question, steps: list[Any], rows: Rows, answers: list[Answer]) -> FeatureScores:
    spread = tables.Spread()
    for weight, answer in zip(rows.against.weights, answers, strict=True):
        spread.add(weight, answer.values)
    values, output = spread.mean(), answers[0].output
    base = sum((w * one.baseline_output for w, one in zip(rows.against.weights, answers, strict=True)), np.zeros(rows.n))
    names = [type(step).__name__ for step in steps]
    return FeatureScores(
        values,
        values.sum(1) - (output - base),
        np.asarray(sum(one.evaluations for one in answers)),
        output,
        base,
        f"{answers[0].method}; behind {', '.join(names[:-1])}" if names[:-1] else answers[0].method,
        answers[0].target,
        rows.against.name,
        converged=_converged(question, answers),
        stderr=spread.stderr(),
        inputs=rows.inputs,
        reference=rows.reference,
        kind="table",
        feature_names=rows.names,
        example_names=None if question.example_names is None else tuple(question.example_names),
        notes=tuple(_notes(rows, answers)),
        provenance={"family": "pipelines", "steps": names, "baselines": len(answers), "tolerance": question.tolerance, "seed": question.seed},
    )


def _converged(question: Question, answers: list[Answer]) -> Array | None:
    if question.tolerance is None:
        return None
    return np.all([np.ones(len(one.output), bool) if one.converged is None else one.converged for one in answers], axis=0)


def _notes(rows: Rows, answers: list[Answer]) -> list[str]:
    state, notes = rows.state, []
    made = np.bincount(state.owners, minlength=rows.columns)[: rows.columns]
    if (made > 1).any():
        notes.append(f"{int((made > 1).sum())} original columns carry the sum over the several columns that were made of them.")
    if state.bent:
        notes.append(f"The path is straight in the columns after {', '.join(dict.fromkeys(state.bent))}, and bent, coordinate by coordinate, in the original ones.")
    if state.checked:
        notes.append("FunctionTransformer treats columns apart on the rows given; that was tried, not proved.")
    if state.map is not None:
        notes.append("Steps that mix columns were differentiated: the path is straight before the first of them.")
    return [*notes, *dict.fromkeys(note for one in answers for note in one.notes)]
