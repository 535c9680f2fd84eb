"""Anything that is only a function: from an array (n, ...) or a frame to (n,) or (n, outputs).

Where it is smooth, its gradient comes from differences at Gauss-Legendre points; where it jumps, path sweeps credit every change. Which of
the two is decided for each example by what the differences show, unless ``path=Sweeps(...)`` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from headwater.errors import InputError
from headwater.features import tables
from headwater.features.blackbox.differences import CALLS, Slopes
from headwater.features.blackbox.function import Array, Function, Pair, numeric, read_inputs
from headwater.features.blackbox.sweeps import Sweeps, swept
from headwater.features.kernels.paths import Effort, by_points
from headwater.features.quadrature import gauss_legendre
from headwater.features.question import Question
from headwater.result import FeatureScores

__all__ = ["Sweeps", "explain", "recognises"]

FINE = 1e-8
"""Without a tolerance: a residual, relative to the outputs, that differences can reach."""
GRADIENTS = 60
"""Without a budget: gradients for each example, which is 8, 16 and 32 points."""
POINTS = 1 << 22
"""Numbers handed to the function at once, at most."""
TREES = ("Forest", "Boost", "Tree", "XGB", "LGBM")


def recognises(question: Question) -> bool:
    """A callable, or an estimator that no other family explains (which :func:`explain` refuses with the line to write)."""
    return callable(question.model) or hasattr(question.model, "predict")


@dataclass
class Found:
    """One baseline's answer for n examples: values (n, F), f at both ends, calls, the error of the values as far as it is known."""

    values: Array
    output: Array
    baseline_output: Array
    calls: Array
    error: Array
    stderr: Array | None
    swept: Array
    converged: Array


def explain(question: Question) -> FeatureScores:
    """Attributions by evaluating a function between baseline and inputs; ``evaluations`` are calls (rows evaluated) for each example."""
    _callable_only(question)
    question.only("a function", "path", "rule", "tolerance", "max_evaluations", "discrete", "batch_size")
    how = _path(question)
    inputs = read_inputs(question)
    size = len(inputs.switched)
    against = _references(question, inputs)
    function = Function(question.model, question.target, len(inputs), max(1, min(question.batch_size or 4096, POINTS // size)))
    spread, found = tables.Spread(), []
    with tqdm(desc="explain: calls", unit="", unit_scale=True, delay=2, disable=not question.progress) as bar:
        for weight, b in zip(against.weights, against.points, strict=True):
            found.append(_one(question, function, inputs.pair(b), how, bar))
            spread.add(weight, found[-1].values)
    return _gathered(question, inputs, against, function, found, spread)


def _callable_only(question: Question) -> None:
    model = question.model
    if callable(model) and not isinstance(model, type):
        return
    name = type(model).__name__
    line = "hw.explain(model.predict, X)"
    for method in ("predict_proba", "decision_function"):
        if hasattr(model, method):
            line = f"hw.explain(model.{method}, X, target=1)"
            break
    raise InputError(
        f"a {name}, which is explained in no closed form",
        "a linear model, kernel machine, tree ensemble, perceptron, a pipeline of them, a torch module, or a function",
        f"explain its function: {line}",
    )


def _path(question: Question) -> Sweeps | None:
    if question.path is None or isinstance(question.path, Sweeps) or type(question.path).__name__ == "Straight":
        return question.path if isinstance(question.path, Sweeps) else None
    raise InputError(f"path={question.path!r} for a function", "the straight path, or Sweeps(segments=, orders=)", "leave path out")


def _references(question: Question, inputs: Any) -> tables.Against:
    if tables.is_frame(inputs.given):
        if not all(numeric(inputs.given[name]) for name in inputs.given.columns):
            return tables.references(question.baseline, inputs.given, inputs.names, question.seed, missing=True)
        values = tables.numbers(inputs.given)
        found = tables.references(question.baseline, values, inputs.names, question.seed, missing=bool(np.isnan(values).any()))
        columns = list(inputs.given.columns)
        return tables.Against([type(inputs.given)(p, columns=columns) for p in found.points], found.weights, found.name)
    values = tables.numbers(inputs.given)
    return tables.references(question.baseline, values, inputs.names, question.seed, missing=bool(np.isnan(values).any()))


# ---- one baseline ---------------------------------------------------------------------------------------------------------------


def _one(question: Question, function: Function, pair: Pair, how: Sweeps | None, bar: Any) -> Found:
    n = len(pair.x)
    rows = np.arange(n)
    last, first = function.check_rows(pair), function.measured(pair, pair.b, rows)
    bar.update(2 * n)
    zeros = np.zeros_like(pair.x)
    found = Found(zeros, last, first, np.full(n, 2), zeros.copy(), None, np.zeros(n, bool), np.zeros(n, bool))
    by_sweeps = rows
    if how is None and not pair.inputs.switched.any():
        by_sweeps = _smooth(question, function, pair, found, bar)
    if len(by_sweeps):
        _sweep(question, function, pair, how or _affordable(question, pair, int(found.calls.max())), found, by_sweeps, bar)
    return found


def _smooth(question: Question, function: Function, pair: Pair, found: Found, bar: Any) -> Array:
    """Differences, where they show a slope; the examples for which they do not (n',) are returned."""
    moved = (pair.x != pair.b).sum(1)
    single = function.single or pair.inputs.dtype.itemsize < 8
    epsilon = float(np.finfo(np.float32 if single else np.float64).eps)

    def values(points: Array, rows: Array) -> Array:
        bar.update(len(points))
        return function.measured(pair, points, rows)

    slopes = Slopes(values, pair.x, pair.b, epsilon, pair.inputs.dtype)
    rows = np.arange(len(pair.x))
    chunk = max(1, POINTS // (CALLS * pair.x.shape[1] ** 2 + 1))
    goal = np.maximum(
        (question.tolerance or 0) * np.abs(found.output - found.baseline_output),
        max(FINE, 100 * epsilon) * np.maximum(np.abs(found.output), np.abs(found.baseline_output)),
    )
    look = by_points(slopes.both, pair.x, pair.b, Effort(rule=question.rule or gauss_legendre(8), chunk=chunk))
    _take(found, rows, look, moved, pair)
    change = found.output - found.baseline_output
    off = np.abs(found.values.sum(1) - change)
    flat = (slopes.flat * 2 >= slopes.seen) & (slopes.high > slopes.low) & (off >= 1e-3 * np.abs(change))
    left = rows[~flat & (off > goal)]
    if len(left) and question.rule is None:
        most = GRADIENTS if question.max_evaluations is None else int(question.max_evaluations // (CALLS * max(1, moved.max()) + 1))
        effort = Effort(question.tolerance, None, most - 8, chunk, floor=max(FINE, 100 * epsilon), levels=(16, 32))
        more = by_points(lambda points, r: slopes.both(points, left[r]), pair.x[left], pair.b[left], effort)
        enough = more.evaluations > 0
        more.values, more.evaluations = more.values[enough], more.evaluations[enough]
        _take(found, left[enough], more, moved, pair)
    steep = rows[~flat]
    found.error[steep] = slopes.error()[steep]
    found.calls[steep] += 6 * moved[steep] + 1
    found.converged[:] = np.abs(found.values.sum(1) - change) <= goal
    return rows[flat]


def _take(found: Found, rows: Array, more: Any, moved: Array, pair: Pair) -> None:
    found.values[rows] = np.where((pair.x == pair.b)[rows], 0.0, more.values)
    found.calls[rows] += more.evaluations * (CALLS * moved[rows] + 1)


def _affordable(question: Question, pair: Pair, spent: int) -> Sweeps:
    """The sweeps that the budget allows after so many calls."""
    how = Sweeps()
    if question.max_evaluations is None:
        return how
    features = int((pair.x != pair.b).sum(1).max())
    while how.calls(features) + spent > question.max_evaluations and (how.segments > 1 or how.orders > 2):
        how = Sweeps(how.segments // 2 or 1, how.orders) if how.segments > 1 else Sweeps(1, 2)
    return how


def _sweep(question: Question, function: Function, pair: Pair, how: Sweeps, found: Found, rows: Array, bar: Any) -> None:
    part = lambda points, r: function.measured(pair, points, rows[r])  # noqa: E731
    each = swept(part, pair.x[rows], pair.b[rows], how, question.seed, function.chunk, bar.update)
    found.values[rows] = each.mean(0)
    found.calls[rows] += how.calls(int((pair.x != pair.b)[rows].any(0).sum()))
    found.swept[rows] = True
    found.converged[rows] = False
    if how.orders > 1:
        found.stderr = np.zeros_like(pair.x) if found.stderr is None else found.stderr
        found.stderr[rows] = each.std(0, ddof=1) / how.orders**0.5
        sizes = [np.linalg.norm(v[rows], axis=1) for v in (found.stderr, found.values)]
        found.converged[rows] = sizes[0] <= (question.tolerance or 0.0) * sizes[1]  # completeness proves nothing here: the spread is judged


# ---- the answer -----------------------------------------------------------------------------------------------------------------


def _gathered(question: Question, inputs: Any, against: tables.Against, function: Function, found: list[Found], spread: tables.Spread) -> FeatureScores:
    values, n = spread.mean(), len(inputs)
    base = sum((w * one.baseline_output for w, one in zip(against.weights, found, strict=True)), np.zeros(n))
    error = sum((w * one.error for w, one in zip(against.weights, found, strict=True)), np.zeros_like(values))
    stderr = spread.stderr() if len(found) > 1 else found[0].stderr
    shape = (n, *inputs.shape)
    array = not tables.is_frame(inputs.given)
    residual = values.sum(1) - (found[0].output - base)
    sweeping = np.any([one.swept for one in found], axis=0)
    return FeatureScores(
        values.reshape(shape),
        residual,
        np.asarray(sum(one.calls for one in found)),
        found[0].output,
        base,
        _method(sweeping),
        function.name,
        against.name,
        converged=None if question.tolerance is None else np.all([one.converged for one in found], axis=0),
        stderr=None if stderr is None else stderr.reshape(shape),
        inputs=tables.numbers(inputs.given) if array else None,
        reference=against.mean(n).reshape(shape) if array and len(inputs.shape) == 1 else None,
        kind="table" if len(inputs.shape) == 1 else "array",
        feature_names=inputs.names,
        example_names=None if question.example_names is None else tuple(question.example_names),
        notes=tuple(_notes(question, inputs, function, found, sweeping, residual, error)),
        provenance={
            "family": "blackbox",
            "calls": function.spent,
            "baselines": len(found),
            "difference_error": [float(e) for e in error.max(1)],
            "single_precision": function.single,
            "seed": question.seed,
        },
    )


def _method(sweeping: Array) -> str:
    names = {True: "path sweeps", False: "finite differences at Gauss-Legendre points"}
    return " and ".join(names[kind] for kind in sorted(set(map(bool, sweeping))))


def _notes(question: Question, inputs: Any, function: Function, found: list[Found], sweeping: Array, residual: Array, error: Array) -> list[str]:
    notes = []
    smooth = ~sweeping
    if smooth.any():
        precision = "single" if function.single else "double"
        notes.append(
            f"Finite differences in {precision} precision: they put an error of at most about {error[smooth].max():.1e} on a value; the residual shows the rest."
        )
        change = np.abs(found[0].output - found[0].baseline_output)
        rough = smooth & (np.abs(residual) > 1e-3 * np.maximum(change, 1e-6 * np.abs(found[0].output)))
        if rough.any():
            notes.append(f"{int(rough.sum())} examples have a relative residual above 1e-3: the function bends or jumps; raise max_evaluations, or path=Sweeps().")
    if sweeping.any() and not isinstance(question.path, Sweeps):
        why = "columns that cannot be interpolated" if inputs.switched.any() else "a function that is flat where its gradient was taken, and jumps"
        notes.append(f"{int(sweeping.sum())} examples by path sweeps, because of {why}. They are complete by construction: stderr tells how far to trust them.")
    if inputs.switched.any():
        notes.append(f"{int(inputs.switched.sum())} columns switch from the baseline's value to the input's at the middle of the path (text, missing values, discrete=).")
    owner = getattr(question.model, "__self__", None)
    if owner is not None and any(word in type(owner).__name__ for word in TREES):
        notes.append(f"{type(owner).__name__} is explained exactly, and faster, by passing the estimator itself: hw.explain(model, X).")
    same = sum(int(not (one.values.any() or one.output[0] != one.baseline_output[0])) for one in found) if len(inputs) == 1 else 0
    return [*notes, *(["The input equals its baseline: all zeros."] if same else [])]
