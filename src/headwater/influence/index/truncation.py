"""How far an index's answers are from the run's own: measured on a sample when it is built, end to end, from the rows as they lie on
the disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.curvature import Estimate
from headwater.influence.engine import Engine
from headwater.influence.index.answering import scores_of, tolerances
from headwater.influence.index.layout import Panel
from headwater.influence.index.reading import Index
from headwater.influence.methods import GradCos, GradDot, Influence, Method, Row, Source, Table, default_pace, total_rate
from headwater.influence.queries import Asked
from headwater.influence.responses import DampedInverse
from headwater.influence.scoring import QuerySide, passes, query_gradients, score_pass

QUERIES, EXAMPLES = 16, 64
DECADES = (100.0, 1.0, 0.01)
"""Dampings at which influence is measured, in units of one over the summed learning rate."""


def effective(engine: Engine, panel: Panel) -> dict[str, float]:
    """For each block with a spectrum, how many eigenvalues count at the default damping: ``sum s / (s + 1/t)``, over curvature as the
    optimizer meets it."""
    pace = default_pace(engine.run)
    flow: Any = engine.flow(Row(panel.stage, panel.at, DampedInverse(1.0), curvature=panel.fit, pace=pace))
    damping = 1.0 / total_rate(engine.run, pace)
    found = {}
    for name, inner in getattr(flow, "flows", {}).items():
        spectrum = inner.matrix.spectrum.clamp_min(0)
        found[name] = float((spectrum * DampedInverse(damping)(spectrum)).sum())
    return found


def measured(engine: Engine, index: Index, curvature: Estimate, segments: int | tuple[int, ...]) -> list[dict[str, Any]]:
    """Relative error (root mean square) and lowest rank correlation, method by method, of the index against the run itself, on queries
    drawn from the last stage's examples and on other examples of every stage, evenly spaced."""
    run = engine.run
    last = run.stages[-1]
    some = _spread(last.size, 2 * QUERIES + 1)[1::2] if last.size > 1 else np.zeros(1, int)
    asked = Asked((last.data,), (_places(some, last.size),), None, last.task.measure)
    damping = 1.0 / total_rate(run, default_pace(run))
    methods: list[Method] = [GradDot(), GradCos(), *(Influence(damping=d * damping, curvature=curvature) for d in DECADES), Source(segments, curvature=curvature)]
    tables = [method.plan(run) for method in methods]
    ids = {s.index: _spread(s.size, EXAMPLES) for s in run.stages}
    ids[last.index] = np.setdiff1d(ids[last.index], some) if last.size > 1 else some
    exact = _exact(engine, tables, asked, len(some), ids)
    held = scores_of(engine, index, tables, asked, slice(0, len(some)), tolerances(engine, None), ids)
    return [_compared(table.name, a, b) for table, a, b in zip(tables, exact, held, strict=True)]


def _spread(size: int, count: int) -> np.ndarray:
    """At most ``count`` of ``size`` examples, evenly spaced."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int)


def _places(some: np.ndarray, size: int) -> np.ndarray:
    """The row that each example counts in: -1 for those that are not asked about."""
    found = np.full(size, -1)
    found[some] = np.arange(len(some))
    return found


def _exact(engine: Engine, tables: list[Table], asked: Asked, count: int, ids: dict[int, np.ndarray]) -> list[Tensor]:
    """Scores of some examples from the run itself, one (queries, examples) for each table."""
    rows = slice(0, count)
    side = QuerySide(engine, tables, query_gradients(engine, asked, (engine.run.checkpoints[-1],), rows), asked, rows, 0.0)
    out: list[dict[int, Tensor]] = [{} for _ in tables]
    for where, uses in passes(tables, engine).items():
        seen = side.prepare(uses)
        parts: list[list[Tensor]] = [[] for _ in seen]
        for _, added in score_pass(engine, where, seen, ids[where[0]], paired=False):
            for mine, block in zip(parts, added, strict=True):
                mine.append(block)
        for s, blocks in zip(seen, parts, strict=True):
            found = out[s.use.method]
            found[where[0]] = found.get(where[0], 0) + torch.cat(blocks, 1)
        side.release(uses)
    return [torch.cat([found[stage] for stage in sorted(found)], 1) for found in out]


def _compared(name: str, exact: Tensor, held: Tensor) -> dict[str, Any]:
    a, b = exact.double().cpu().numpy(), held.double().cpu().numpy()
    error = float(np.sqrt(((a - b) ** 2).mean() / max((a**2).mean(), np.finfo(float).tiny)))
    return {"method": name, "error": error, "spearman": min(_rank_correlation(x, y) for x, y in zip(a, b, strict=True))}


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; of scores that are all equal 1 where both are, else 0."""
    from scipy.stats import rankdata

    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float((x == y).all())
