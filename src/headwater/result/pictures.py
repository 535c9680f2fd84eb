"""Attributions as pictures: which parts of a report show them, for each kind of input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.report.examples import picture
from headwater.report.numbers import number, signed
from headwater.result.arrays import flattened
from headwater.result.summary import Accumulator
from headwater.result.views import View, channel_axis, part_name, views

if TYPE_CHECKING:
    from headwater.result.features import FeatureScores

PICTURES = ("image", "text", "series", "waterfall", "beeswarm", "bars")
MANY = 8  # tables of so many examples or more are shown as a swarm
FEW = {"image": 6, "text": 12, "series": 4, "waterfall": 6}  # examples in one figure unless others are asked for
DOTS = 500  # examples drawn in a swarm
LINES = 8  # channels of a series that are drawn
LISTED = 200  # examples in the table of errors
FULL = 5e-7  # a residual below this share of all pushes cannot be seen as a step; the line above the picture states it anyway


def parts_of(scores: FeatureScores, kind: str | None = None, examples: Iterable[int] | None = None, k: int = 10) -> list[report.Part]:
    """The parts that show scores. Arguments as in :meth:`FeatureScores.plot`; raises InputError for what cannot be drawn."""
    if not scores.n:
        raise InputError("a picture of no examples", "at least one", "explain something first")
    if k < 1:
        raise InputError(f"k={k}", "at least 1", "leave it out for 10")
    chosen = _chosen(scores, examples)
    asked = {"table": "waterfall"}.get(kind or "", kind)
    if asked is not None and asked not in PICTURES:
        raise InputError(f"kind={kind!r}", f"one of {', '.join(PICTURES)}, or None to let the input decide", "leave it out")
    found = views(scores)
    ways = [asked or _way(view, len(chosen) if chosen is not None else scores.n) for view in found]
    if "beeswarm" in ways:  # all rows in one picture
        return _all_at_once(scores, found, ways, chosen, k)
    if asked == "bars":
        return Accumulator().add(scores if chosen is None else scores.at(chosen)).summary().parts(k)
    rows = chosen if chosen is not None else list(range(min(scores.n, min(FEW[way] for way in ways))))
    return [part for i in rows for part in _example(scores, found, ways, i, k)]


def _chosen(scores: FeatureScores, examples: Iterable[int] | None) -> list[int] | None:
    if examples is None:
        return None
    rows = [int(i) for i in examples]
    wrong = [i for i in rows if not -scores.n <= i < scores.n]
    if wrong or not rows:
        raise InputError(f"examples={rows}", f"numbers below {scores.n}, at least one", "the scores hold so many examples")
    return [i % scores.n for i in rows]


def _way(view: View, n: int) -> str:
    """How an input is drawn where nothing is said."""
    if view.kind == "image":
        return "image"
    if view.kind == "table":
        return "beeswarm" if n >= MANY and view.values.ndim == 2 else "waterfall"
    return view.kind if view.kind in ("text", "series") else "waterfall"


def _example(scores: FeatureScores, found: list[View], ways: list[str], i: int, k: int) -> list[report.Part]:
    """One example: a picture of each input that has one, and one waterfall of all others."""
    drawn = [DRAWN[way](scores, view, i) for view, way in zip(found, ways, strict=True) if way != "waterfall"]
    tables = [view for view, way in zip(found, ways, strict=True) if way == "waterfall"]
    return [*drawn, *([waterfall(scores, tables, i, k, drawn_apart=len(drawn))] if tables else [])]


def _all_at_once(scores: FeatureScores, found: list[View], ways: list[str], chosen: list[int] | None, k: int) -> list[report.Part]:
    tables = [view for view, way in zip(found, ways, strict=True) if way == "beeswarm"]
    wrong = [view for view in tables if view.values.ndim > 2]
    if wrong:
        raise InputError(
            f"a beeswarm of values of shape {wrong[0].values.shape}",
            "one value per example and feature: (n, features)",
            "sum parts first: scores.group(...), or ask for another kind",
        )
    rows = np.array(chosen if chosen is not None else range(scores.n))
    others = [(view, way) for view, way in zip(found, ways, strict=True) if way != "beeswarm"]
    few = rows[: min((FEW[way] for _, way in others), default=0)]
    singles = [DRAWN[way](scores, view, int(i)) for i in few for view, way in others if way in DRAWN]
    return [swarm(scores, tables, rows, k), *singles]


# ---- what is said of an example


def title(scores: FeatureScores, i: int, view: View | None = None) -> str:
    """What an example is called."""
    name = scores.example_names[i] if scores.example_names is not None else f"#{i}"
    return f"{name}, {view.name}" if view is not None and view.name else name


def subtitle(scores: FeatureScores, i: int) -> str:
    """The output, what it was compared with, and the gap between the attributions and their difference."""
    numbers = scores.output[i], scores.baseline_output[i], scores.residual[i]
    out, base, gap = (number(float(v)) for v in numbers)
    return f"{scores.target}: {out}, at the baseline {base}; residual {gap}"


def flag(scores: FeatureScores, i: int) -> str | None:
    """Whether the example missed the tolerance, or has values that are no numbers."""
    if any(not np.isfinite(view.values[i]).all() for view in views(scores)):
        return "some values are not finite"
    return "missed the tolerance" if scores.converged is not None and not scores.converged[i] else None


# ---- images


def channels_summed(values: np.ndarray) -> np.ndarray:
    """(n, height, width) from values with or without an axis of channels. Raises InputError for what is no image."""
    if values.ndim not in (3, 4):
        raise InputError(
            f"an image of values of shape (n, {str(values.shape[1:])[1:]}", "(n, height, width) or (n, channels, height, width)", "ask for another kind, or for none"
        )
    axis = channel_axis(values.shape, "image")
    return values if axis is None else values.astype(np.float64).sum(axis)


def overlay(scores: FeatureScores, view: View, i: int) -> report.Part:
    """One image with its baseline and its scores."""
    values = channels_summed(view.values[i : i + 1])[0]
    image, baseline = pictures(view, i)
    return report.Overlay(title(scores, i, view), values, image, baseline, subtitle(scores, i), flag(scores, i))


def pictures(view: View, i: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The input and its baseline as uint8, stretched alike so that they can be compared; None where they are no pictures."""
    planes = [_plane(given, i) for given in (view.inputs, view.reference)]
    both = [p for p in planes if p is not None]
    if not both:
        return None, None
    if len(both) == 2 and both[0].shape != both[1].shape:
        return _shown(both[0]), _shown(both[1])
    drawn = _shown(np.concatenate(both, axis=1))
    halves = np.split(drawn, len(both), axis=1) if drawn is not None else [None] * len(both)
    after = iter(halves)
    first, second = (None if p is None else next(after) for p in planes)
    return first, second


def _plane(given: np.ndarray | None, i: int) -> np.ndarray | None:
    """(height, width) or (height, width, 3); other numbers of channels become their mean."""
    if given is None or given.ndim not in (3, 4) or given.dtype.kind not in "biuf":
        return None
    one = given[i if len(given) > 1 else 0]
    axis = channel_axis(given.shape, "image")
    if axis is None:
        return one
    moved = np.moveaxis(one, axis - 1, -1)
    return moved if moved.shape[-1] == 3 else moved.astype(np.float64).mean(-1)


def _shown(plane: np.ndarray) -> np.ndarray | None:
    if plane.dtype.kind == "b":
        plane = plane.astype(np.float64)
    small = min(plane.shape[:2]) < 8
    grown = np.repeat(np.repeat(plane, 8, axis=0), 8, axis=1) if small else plane  # what report takes for a picture has 8 pixels
    drawn = picture(grown)
    return None if drawn is None else drawn[::8, ::8] if small else drawn


# ---- texts and series


def tokens(scores: FeatureScores, view: View, i: int) -> report.Part:
    """One text with the scores of its tokens, dimensions summed."""
    if view.tokens is None:
        raise InputError("a text without its tokens", "scores.tokens, the text of each position", "explain with tokenizer=, or ask for kind='waterfall'")
    count = len(view.tokens[i])
    values, stderr = (None if a is None else flattened(a[i, :count].astype(np.float64)) for a in (view.values, view.stderr))
    assert values is not None
    spread = None if stderr is None or stderr.shape[1] > 1 else tuple(stderr[:, 0])
    return report.Tokens(title(scores, i, view), view.tokens[i], tuple(values.sum(1)), subtitle(scores, i), flag(scores, i), spread)


def signals(scores: FeatureScores, view: View, i: int) -> report.Part:
    """One series, channel by channel; of many channels those with the largest pushes."""
    if view.values.ndim not in (2, 3):
        raise InputError(f"a series of values of shape {view.values.shape}", "(n, time), (n, channels, time) or (n, time, channels)", "ask for another kind, or for none")
    axis = channel_axis(view.values.shape, "series", view.feature_names is not None)
    values = _channels(view.values[i], axis)
    given = view.like_values("inputs")
    lines = None if given is None else _channels(given.reshape(view.values.shape)[i], axis)
    named = axis is not None and view.feature_names is not None and len(view.feature_names) == len(values)
    names = view.feature_names if named else [f"channel {c}" for c in range(len(values))] if len(values) > 1 else [view.name or "value"]
    largest = np.sort(np.argsort(-np.abs(values).sum(1), kind="stable")[:LINES])
    channels = tuple(report.Signal((names or ())[c], None if lines is None else lines[c], values[c]) for c in largest)
    more = f"; the {LINES} of {len(values)} channels with the largest pushes" if len(values) > LINES else ""
    return report.Signals(title(scores, i, view), channels, subtitle(scores, i) + more, flag(scores, i), "time step")


def _channels(one: np.ndarray, axis: int | None) -> np.ndarray:
    """(channels, time) of one example."""
    return one[None] if axis is None else one if axis == 1 else one.T


# ---- tables


def waterfall(scores: FeatureScores, found: Sequence[View], i: int, k: int, drawn_apart: int = 0) -> report.Part:
    """The way from the baseline's output to the output: the ``k`` largest pushes, all others as one step, what is missing as another."""
    values = np.concatenate([view.flat[i] for view in found])
    errors = np.concatenate([np.full(view.flat.shape[1], np.nan) if view.stderr is None else view.stderr[i].ravel() for view in found])
    order = np.argsort(-np.nan_to_num(np.abs(values), nan=np.inf), kind="stable")
    shown, rest = (order, order[:0]) if len(order) <= k + 1 else (order[:k], order[k:])
    steps = [report.Step(part_name(found, int(j), i), float(values[j]), _note(found, int(j), i), None if np.isnan(errors[j]) else float(errors[j])) for j in shown]
    if len(rest):
        steps.append(report.Step(f"{len(rest):,} others", float(values[rest].sum())))
    if drawn_apart:
        apart = sum(float(view.flat[i].sum()) for view in views(scores)) - float(values.sum())
        steps.append(report.Step("inputs shown above", apart))
    start, end = float(scores.baseline_output[i]), float(scores.output[i])
    left = end - start - sum(step.score for step in steps)
    if not abs(left) <= FULL * (abs(start) + sum(abs(step.score) for step in steps)):
        steps.append(report.Step("residual, carried by no feature", left))
    return report.Waterfall(title(scores, i), start, end, tuple(steps), subtitle(scores, i), flag(scores, i))


def _note(found: Sequence[View], j: int, i: int) -> str:
    """The value of the part in place j, and that in the baseline where it is another; nothing where it is not known."""
    for view in found:
        size = view.values[0].size
        if j < size:
            given, reference = view.like_values("inputs"), view.like_values("reference")
            if given is None:
                return ""
            if reference is None or given[i, j] == reference[i, j]:
                return _value(given[i, j])
            return f"{_value(given[i, j])} (baseline {_value(reference[i, j])})"
        j -= size
    raise IndexError(j)


def _value(value: object) -> str:
    given = np.asarray(value)
    return str(int(given)) if given.dtype.kind in "biu" or (float(given).is_integer() and abs(float(given)) < 1e6) else number(float(given))


def swarm(scores: FeatureScores, found: Sequence[View], rows: np.ndarray, k: int) -> report.Part:
    """A dot for every example and feature, features by mean size. Of very many examples a part is drawn, and said so."""
    values = np.concatenate([view.flat[rows] for view in found], 1)
    ranks = np.concatenate([_ranks(view, rows) for view in found], 1)
    sizes = np.abs(values).mean(0)
    drawn = np.arange(len(rows)) if len(rows) <= DOTS else np.linspace(0, len(rows) - 1, DOTS).round().astype(int)
    chosen = np.argsort(-sizes, kind="stable")[:k]
    dots = tuple(report.Dots(part_name(found, int(j)), values[drawn, j], ranks[drawn, j], number(float(sizes[j]))) for j in chosen)
    some = f"; {len(drawn)} of {len(rows):,} examples drawn, sizes are of all" if len(drawn) < len(rows) else ""
    rest = f"; {values.shape[1] - len(chosen):,} features with smaller pushes left out" if len(chosen) < values.shape[1] else ""
    return report.Swarm(dots, f"push on {scores.target}{some}{rest}", "mean size")


def _ranks(view: View, rows: np.ndarray) -> np.ndarray:
    """(rows, features) where each value stands among the distinct values of its feature, 0 lowest, 1 highest; NaN where unknown."""
    given = view.like_values("inputs")
    if given is None:
        return np.full((len(rows), view.flat.shape[1]), np.nan)
    return np.stack([_rank(column) for column in given[rows].astype(np.float64).T], 1)


def _rank(column: np.ndarray) -> np.ndarray:
    distinct, place = np.unique(column, return_inverse=True)
    found = place / (len(distinct) - 1) if len(distinct) > 1 else np.full(len(column), 0.5)
    return np.where(np.isnan(column), np.nan, found)


DRAWN: dict[str, Callable[[FeatureScores, View, int], report.Part]] = {"image": overlay, "text": tokens, "series": signals}


def totals(scores: FeatureScores) -> report.Table:
    """Per example what was explained, the gap, and what it cost."""
    columns = ["example", "output", "at the baseline", "residual", "relative", "evaluations"]
    shown = range(min(scores.n, LISTED))
    rows = [[title(scores, i), *_totals(scores, i)] for i in shown]
    if scores.converged is not None:
        columns.append("tolerance")
        rows = [[*row, "met" if scores.converged[i] else "⚑ missed"] for i, row in zip(shown, rows, strict=True)]
    if scores.n > len(rows):
        rows.append([f"and {scores.n - len(rows):,} more", *[""] * (len(columns) - 1)])
    return report.Table(tuple(columns), tuple(map(tuple, rows)))


def _totals(scores: FeatureScores, i: int) -> list[str]:
    output, base, gap, relative = (float(a[i]) for a in (scores.output, scores.baseline_output, scores.residual, scores.relative_residual))
    return [number(output), number(base), signed(gap), number(relative), str(int(scores.evaluations[i]))]
