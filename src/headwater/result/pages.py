"""Attributions as a page to send, and as a piece of html in a notebook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from headwater import report
from headwater.report.numbers import number
from headwater.result.pictures import MANY, parts_of, swarm, totals
from headwater.result.summary import Accumulator
from headwater.result.views import views

if TYPE_CHECKING:
    from headwater.result.features import FeatureScores

SHOWN = 24  # examples on one page, so that it stays small enough to send
RESIDUAL = (
    "The values of an example sum to its output minus the output at the baseline, but for the residual, which is measured and shown. The residual is a "
    "lower bound on the error of the values: a small one does not prove that each value is right, a large one proves that they are not."
)
LIMITS = "The values describe the model between the baseline and the input. They are no causes in the world, and another baseline asks another question."


def page(scores: FeatureScores, kind: str | None = None, examples: Iterable[int] | None = None, k: int = 10) -> report.Page:
    """See :meth:`FeatureScores.to_html`."""
    many = _swarm(scores, k) if kind is None else []
    chosen = list(examples) if examples is not None else list(range(min(scores.n, MANY if many else SHOWN)))
    parts = parts_of(scores, "waterfall" if many else kind, chosen, k)
    more = f"Shown are {len(chosen)} of {scores.n:,} examples." if len(chosen) < scores.n else ""
    sections = [
        report.Section("", parts=(key_figures(scores),)),
        report.Section("How to read the values", "\n\n".join((f"{_sign(scores)}.", RESIDUAL, LIMITS))),
        *([report.Section("Found on the way", parts=(report.Prose("\n\n".join(scores.notes)),))] if scores.notes else []),
        *([report.Section("All examples", parts=tuple(many))] if many else []),
        report.Section("Example by example", more, tuple(parts)),
        report.Section("Error and cost", _missed(scores), (totals(scores),)),
    ]
    subtitle = f"{scores.n:,} {'example' if scores.n == 1 else 'examples'}: {scores.target} against {scores.baseline}; {scores.method}"
    return report.Page("Carried by these parts", subtitle, tuple(sections), footer(scores))


def _swarm(scores: FeatureScores, k: int) -> list[report.Part]:
    """All rows at once and their ranking, where every input is a table and there are many."""
    found = views(scores)
    if scores.n < MANY or any(view.kind != "table" or view.values.ndim != 2 for view in found):
        return []
    return [swarm(scores, found, np.arange(scores.n), k), Accumulator().add(scores).summary().table(k)]


def key_figures(scores: FeatureScores) -> report.Figures:
    """How many examples, how large the gap is, how many missed, what it cost."""
    sizes = np.abs(scores.residual)
    median, worst = (float(np.median(sizes)), float(sizes.max())) if scores.n else (0.0, 0.0)
    relative = f"median of residual / change {number(float(np.median(scores.relative_residual)))}; largest |residual| {number(worst)}" if scores.n else ""
    cost = f"{float(np.mean(scores.evaluations)):.0f}" if scores.n else "0"
    rows = [("examples", f"{scores.n:,}", ""), ("median |residual|", number(median), relative), ("evaluations per example", cost, "of the model; 0: exact integration")]
    if scores.converged is not None:
        rows.append(("missed the tolerance", f"{int((~scores.converged).sum()):,}", f"of {scores.n:,}"))
    return report.Figures(tuple(report.Figure(*row) for row in rows))


def _missed(scores: FeatureScores) -> str:
    if scores.converged is None:
        return "No tolerance was asked for."
    missed = int((~scores.converged).sum())
    return "Every example met the tolerance." if not missed else f"{missed:,} of {scores.n:,} examples missed the tolerance within their budget; they are flagged."


def _sign(scores: FeatureScores) -> str:
    from headwater.result.features import SIGN

    return SIGN[0].upper() + SIGN[1:]


def footer(scores: FeatureScores) -> tuple[tuple[str, str], ...]:
    """Where the numbers come from."""
    told = [(key, str(value)) for key, value in scores.provenance.items() if isinstance(value, str | int | float) and key != "method"]
    return (("method", scores.method), ("explained", scores.target), ("baseline", scores.baseline), *told)


def notebook(scores: FeatureScores) -> str:
    """A first look: the key figures, a picture or two, and what was found on the way."""
    if not scores.n:
        return report.fragment(report.Prose(repr(scores)))
    parts = parts_of(scores, k=8)
    opening = f"{scores.target} against {scores.baseline}; {scores.method}"
    notes = [report.Prose("\n\n".join(scores.notes))] if scores.notes else []
    more = [report.Prose(f"A first look at {scores.n:,} examples; to_html(path) writes a page with more of them.")] if len(parts) > 3 or scores.n > len(parts) else []
    return report.fragment(report.Prose(opening), key_figures(scores), *parts[:3], *more, *notes)
