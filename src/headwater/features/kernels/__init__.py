"""Kernel machines, linear models, discriminants and perceptrons of scikit-learn: closed forms where they exist, else points on the analytic gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features import tables
from headwater.features.kernels import estimators
from headwater.features.kernels.panels import Both
from headwater.features.kernels.paths import Effort, Values, by_points
from headwater.features.kernels.readings import Array, Reading, probabilities
from headwater.features.question import Question
from headwater.result import FeatureScores

__all__ = ["Part", "explain", "gathered", "part", "reading_of", "recognises", "straight_only"]


def recognises(question: Question) -> bool:
    """A model that :mod:`.estimators` reads."""
    return estimators.known(question.model)


@dataclass
class Part:
    """One baseline's answer: attributions and what they took, f at the inputs and at the baseline, in words what was explained."""

    found: Values
    output: Array
    baseline_output: Array
    target: str
    method: str


def reading_of(question: Question, x: Array) -> Reading:
    """The model, or its probabilities where ``output="probability"``, as a reading."""
    reading = estimators.read(question.model)
    if question.output in (None, "margin", "raw", "decision"):
        return reading
    if question.output == "probability":
        return probabilities(reading, question.model, x)
    raise InputError(f"output={question.output!r}", '"probability", or none for the decision value', "leave output out")


def part(reading: Reading, x: Array, b: Array, target: Any, effort: Effort) -> Part:
    """Attributions of the target along the straight paths from b to x, both (n, p)."""
    weights, words = reading.aim(target, len(x))
    last, first = ((_in_chunks(reading, points) * weights).sum(1) for points in (x, b))
    found = Values(np.zeros(x.shape), np.zeros(len(x), int), np.ones(len(x), bool))
    kinds, which = np.unique(weights, axis=0, return_inverse=True)
    for k, w in enumerate(kinds):
        rows = np.flatnonzero(which.ravel() == k)
        closed = reading.closed(x[rows], b[rows], w)
        if closed is not None:
            found.values[rows] = closed * (x[rows] - b[rows])
            continue
        part_ = by_points(_both(reading, w), x[rows], b[rows], effort, reading.kinks)
        found.values[rows], found.evaluations[rows], found.converged[rows] = part_.values, part_.evaluations, part_.converged
    return Part(found, last, first, words, reading.method)


def _both(reading: Reading, w: Array) -> Both:
    return lambda points, rows: (reading.outputs(points) @ w, reading.pull(points, np.broadcast_to(w, (len(points), len(w)))))


def _in_chunks(reading: Reading, points: Array) -> Array:
    return np.concatenate([reading.outputs(points[i : i + reading.rows]) for i in range(0, len(points), reading.rows)])


def explain(question: Question) -> FeatureScores:
    """Attributions (n, p) of a decision value, a latent mean, a prediction or a probability."""
    name = type(question.model).__name__
    straight_only(question, name)
    question.only(name, "rule", "tolerance", "max_evaluations", "output", "batch_size", "path")
    if question.target is None and len(getattr(question.model, "classes_", ())) > 2:
        own = replace(question, target=question.model.predict(tables.as_fitted(question.model, question.inputs)))
        return replace(explain(own), target="the predicted class of each row")
    try:
        table = tables.table(question.inputs, question.model, question.feature_names)
        reading = reading_of(question, table.values)
    except estimators.CallableKernel as error:
        return _by_differences(question, error)
    against = tables.references(question.baseline, table.values, table.names, question.seed)
    _suit(question.model, table.values, against)
    effort = Effort.of(question, reading.rows)
    found = [part(reading, table.values, np.array(np.broadcast_to(b, table.values.shape)), question.target, effort) for b in against.points]
    return gathered(question, table, against, found, name)


def straight_only(question: Question, name: str) -> None:
    """Raise InputError for any other path."""
    if question.path is not None and type(question.path).__name__.lower() != "straight":
        raise InputError(f"path={question.path!r} for {name}", "the straight path, which has closed forms", "leave path out, or explain model.predict")


def _suit(model: Any, x: Array, against: tables.Against) -> None:
    """Some kernels are not defined everywhere: refuse before any work."""
    kernel = getattr(model, "kernel", None)
    if kernel in ("chi2", "additive_chi2") and (x.min() < 0 or min(b.min() for b in against.points) < 0):
        raise InputError(f"negative values for kernel={kernel!r}", "inputs and a baseline that are not negative", "as in fitting")
    if kernel == "cosine" and any(_through_zero(x, np.broadcast_to(b, x.shape)).any() for b in against.points):
        raise InputError("a path through zero for kernel='cosine', which jumps there", "a baseline that is not zero", "baseline=hw.baselines.mean(X_train), say")


def _through_zero(x: Array, b: Array) -> Array:
    """(n,) whether 0 lies between b and x."""
    along, bb, xx = (b * x).sum(1), (b * b).sum(1), (x * x).sum(1)
    return (bb == 0) | (xx == 0) | ((along < 0) & (along * along >= bb * xx * (1 - 1e-12)))


def gathered(question: Question, table: tables.Table, against: tables.Against, found: list[Part], name: str) -> FeatureScores:
    """The answers of all baselines as one."""
    x, spread = table.values, tables.Spread()
    n = len(x)
    for weight, one in zip(against.weights, found, strict=True):
        spread.add(weight, one.found.values)
    values = spread.mean()
    output, base = found[0].output, sum((w * one.baseline_output for w, one in zip(against.weights, found, strict=True)), np.zeros(n))
    residual = values.sum(1) - (output - base)
    evaluations = sum((one.found.evaluations for one in found), np.zeros(n, int))
    converged = None if question.tolerance is None else np.all([one.found.converged for one in found], axis=0)
    return FeatureScores(
        values,
        residual,
        evaluations,
        output,
        base,
        found[0].method,
        found[0].target,
        against.name,
        converged=converged,
        stderr=spread.stderr(),
        inputs=x,
        reference=against.mean(n),
        kind="table",
        feature_names=table.names,
        example_names=None if question.example_names is None else tuple(question.example_names),
        notes=tuple(notes(x, against, residual, output, base, bool(evaluations.any()))),
        provenance={"family": "kernels", "estimator": name, "baselines": len(against.points), "tolerance": question.tolerance, "seed": question.seed},
    )


def notes(x: Array, against: tables.Against, residual: Array, output: Array, base: Array, by_points: bool) -> list[str]:
    """What the user should know."""
    found = []
    same = sum(int((np.broadcast_to(b, x.shape) == x).all(1).sum()) for b in against.points)
    if same:
        found.append(f"{same} of {len(x) * len(against.points)} pairs of example and baseline are equal: nothing to attribute there, all zeros.")
    large = np.abs(residual) > 1e-6 * np.maximum(np.abs(output - base), 1e-6 * np.abs(output))
    if by_points and large.any():
        found.append(f"{int(large.sum())} examples have a relative residual above 1e-6: the function has kinks or sharp bends on their paths; raise max_evaluations.")
    return found


def _by_differences(question: Question, reason: InputError) -> FeatureScores:
    """A kernel that is a function gives values and no gradient: finite differences of the decision function, as for any function."""
    from headwater.features.blackbox import explain as by_values

    model = question.model
    reading_name = "decision_function" if hasattr(model, "decision_function") else "predict"
    target = question.target
    if len(getattr(model, "classes_", ())) == 2:
        aim = tables.class_target(model.classes_, target, len(question.inputs))
        function, target, words = _signed(model, np.where(aim.columns == 1, 1.0, -1.0)), None, aim.words
        if len(np.unique(aim.columns)) > 1:
            raise InputError("a different class for each example of a model whose kernel is a function", "one class", "explain the classes apart")
    elif hasattr(model, "classes_"):
        raise InputError(f"{reason.given}, of {len(model.classes_)} classes", "a kernel of the library", "hw.explain(model.decision_function, X, target=column)")
    else:
        function, words = getattr(model, reading_name), None
    answer = by_values(replace(question, model=function, target=target, output=None))
    note = f"{reason.given}: explained by finite differences of {reading_name}."
    return replace(answer, target=words or answer.target, notes=(note, *answer.notes))


def _signed(model: Any, sign: Array) -> Any:
    return lambda X: sign[0] * model.decision_function(X)
