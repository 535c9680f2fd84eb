"""Answering from an index: the same rows of the same tables as in scoring.py, with stored gradients in place of captured ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.errors import InputError, ModelMismatch
from headwater.influence.engine import Engine
from headwater.influence.index.asker import Asker
from headwater.influence.index.carried import CarriedSide
from headwater.influence.index.layout import FACTORS, covering
from headwater.influence.index.near import Basis, Near
from headwater.influence.index.parted import SAMPLE, parted
from headwater.influence.index.reading import Index
from headwater.influence.index.rows import Keeper
from headwater.influence.methods import Fit, Method, Table
from headwater.influence.plans import dtype_of as scores_dtype
from headwater.influence.queries import Asked, check
from headwater.influence.scoring import Seen, Use, contribution, query_gradients
from headwater.influence.tabled import _tolerance as checked_tolerance
from headwater.influence.vectors import Factored, Queries, Whole, factors
from headwater.result import TrainingScores

TOLERANCES = (6e-3, 1e-2)
"""The relative errors (root mean square) that leaving coordinates out may make by default: of responses, and of whole scores by queries that
were carried through later segments. A built index reports the error that they make together; ``tolerance=1e-3`` of trace asks for less."""


def by_index(index: Index, asked: Asked, methods: list[Method], *, batch_size: int | None, memory: int, tolerance: float | None, progress: bool) -> list[TrainingScores]:
    """Scores of all methods. The training data are not read. Raises InputError for what the index does not hold. An answer takes seconds:
    one that is interrupted is begun again."""
    for method in methods:
        if getattr(method, "refine", None):
            given = f"method={method!r}, whose refinement multiplies with the curvature of the training data"
            raise InputError(given, "a method that needs stored gradients alone", "leave out refine=, or trace the run itself")
    tables = [method.plan(index.run) for method in methods]
    panels_for(index, tables)
    check(asked, index.run.load(index.run.model(), index.run.checkpoints[-1]), None, index.run.device)
    engine = Asker.asking(index.run, asked, batch_size)
    _same_blocks(index, engine)
    started = time.perf_counter()
    width = sum(block.size for block in engine.capture.blocks.values()) * torch.empty(0, dtype=scores_dtype(engine)).element_size()
    chunk = max(1, min(asked.count, memory // (4 * width)))
    out = [torch.zeros(asked.count, index.run.size, dtype=scores_dtype(engine)) for _ in tables]
    total = sum(index.run.stages[index.panels[p].stage].size for p, _ in _work(index, tables)) * -(-asked.count // chunk)
    with tqdm(total=total, unit=" rows", disable=not progress, desc="index", leave=False, mininterval=0.5) as bar:
        engine.advance = bar.update
        for start in range(0, asked.count, chunk):
            rows = slice(start, min(start + chunk, asked.count))
            for scores, found in zip(out, scores_of(engine, index, tables, asked, rows, tolerances(engine, tolerance)), strict=True):
                scores[rows] = found.to(scores)
    cost = {"seconds": round(time.perf_counter() - started, 3), "example_gradients": 0}
    return [_result(index, table, scores, asked, cost, engine) for table, scores in zip(tables, out, strict=True)]


def tolerances(engine: Engine, tolerance: float | None) -> tuple[float, float]:
    """For responses, and for carried queries: what was asked for, or :data:`TOLERANCES`; 0 for float64."""
    found = checked_tolerance(engine, tolerance)
    return TOLERANCES if tolerance is None and found > 0 else (found, found)


def panels_for(index: Index, tables: list[Table]) -> None:
    """Raise InputError where a table needs gradients, or coordinates of them, that the index does not hold."""
    for table in tables:
        for row in table.rows:
            if row.events is not None or row.unit or (row.asking is not None and (row.asking.unit or row.asking.events != (None,))):
                raise InputError(
                    f"method {table.name}, which takes gradients at noise events of its own choice",
                    "a method for the mean gradients that an index holds: hw.GradDot(), hw.GradCos(), hw.TracIn(), hw.Influence(), hw.Source()",
                    "trace the run itself",
                )
            covering(row, index.panels)
            if index.manifest["dim"] is not None and row.curvature is not None and repr(row.curvature.estimate) != index.manifest["estimate"]:
                raise InputError(
                    f"a method with {row.curvature.estimate!r}, of an index that kept the coordinates of {index.manifest['estimate']} alone",
                    "the estimate in whose eigenbasis the index was built",
                    "build one with that curvature=, or one that keeps all coordinates (dim=None)",
                )


def _work(index: Index, tables: list[Table]) -> list[tuple[int, list[Use]]]:
    """Each panel that is read, latest first, with the rows that it serves."""
    found: dict[int, list[Use]] = {}
    for m, table in enumerate(tables):
        for r, row in enumerate(table.rows):
            count = row.examples or index.run.stages[row.stage].size
            for p in covering(row, index.panels):
                found.setdefault(p, []).append(Use(m, r, row, len(index.panels[p].at) / (count * len(row.at))))
    return sorted(found.items(), key=lambda item: (-max(max(w) for w in index.panels[item[0]].at), -index.panels[item[0]].stage, item[0]))


def scores_of(
    engine: Engine, index: Index, tables: list[Table], asked: Asked, rows: slice, tolerance: tuple[float, float], ids: dict[int, np.ndarray] | None = None
) -> list[Tensor]:
    """Scores (queries, train) of the queries in ``rows`` for each table; with ``ids`` only of those examples of each stage."""
    base = query_gradients(engine, asked, (index.run.checkpoints[-1],), rows)
    side = CarriedSide(engine, tables, base, asked, rows, tolerance[0])
    work = _work(index, tables)
    side.left = Counter(use.side for _, uses in work for use in uses)
    stages = index.run.stages
    ids = ids if ids is not None else {s.index: np.arange(s.size) for s in stages}
    starts = dict(zip(ids, np.cumsum([0, *(len(i) for i in ids.values())]), strict=False))
    out = [torch.zeros(rows.stop - rows.start, sum(len(i) for i in ids.values()), dtype=scores_dtype(engine)) for _ in tables]
    turned = _Turned(engine, index, tables, base, tolerance[1])
    for p, uses in work:
        stage = index.panels[p].stage
        for part, added in _pass(engine, index, p, turned.of(p, side.prepare(uses), out), ids[stage]):
            for use, block in added:
                out[use.method][:, starts[stage] + part] += block.to(out[use.method])
        side.release(uses)
    return out


class _Turned:
    """Query vectors in the coordinates of one panel after the other; those of the last basis are kept, for the panels that share it."""

    def __init__(self, engine: Engine, index: Index, tables: list[Table], base: Queries, tolerance: float) -> None:
        self.engine, self.index, self.base, self.tolerance = engine, index, base, tolerance
        self.shares = [max(1, (len(table.rows) - 1) * len(base)) for table in tables]
        self.held: dict[tuple[int, int], Queries] = {}
        self.fit: Fit | None = None

    def of(self, p: int, seen: list[Seen], scores: list[Tensor]) -> list[Seen]:
        """The seen rows, to be compared with panel ``p``'s gradients, and then added to each method's ``scores``."""
        index, fit = self.index, self.index.panels[p].fit
        keepers = index.keepers(self.engine, p)
        if self.fit != fit or any(k.keep is not None or k.white is not None for k in keepers.values()):
            self.held, self.fit = {}, fit
        wanted = {(s.use.method, s.use.index) for s in seen}
        self.held = {key: found for key, found in self.held.items() if key in wanted}
        for s in seen:
            key = (s.use.method, s.use.index)
            if key not in self.held:
                reference = self._reference(p, s.use, scores[s.use.method])
                self.held[key] = {n: self._one(p, keepers[n], v, reference) for n, v in s.vectors.items()}
        return [Seen(s.use, self.held[s.use.method, s.use.index], s.norms) for s in seen]

    def _reference(self, p: int, use: Use, scores: Tensor) -> Tensor:
        """The mean square (queries,) that one block's products may be off by in this row, over the squared tolerance: an equal share,
        among all blocks and carried rows, of that of the method's scores so far."""
        panels = len(use.row.at) / len(self.index.panels[p].at)  # whose errors may be the same
        return scores.square().mean(1) / (self.shares[use.method] * (use.factor * panels) ** 2)

    def _one(self, p: int, keeper: Keeper, side: Any, reference: Tensor) -> Any:
        if isinstance(side, Near) and keeper.kind == FACTORS:
            return side.parted(Basis.of(keeper.basis.left, keeper.basis.right), self._energy(p, keeper), self.tolerance, reference)
        found, raw = keeper.turned(side), self.base[keeper.name]
        if not isinstance(found, Whole) or keeper.kind != FACTORS or not isinstance(raw, Factored) or self.tolerance <= 0:
            return found
        return parted(found, keeper.turned(raw), self._energy(p, keeper), self.tolerance)

    def _energy(self, p: int, keeper: Keeper) -> Tensor:
        """The mean squared coordinates of some of the panel's rows, (out, in)."""
        rows = slice(0, SAMPLE)
        g, a = factors(self.index.gradient(p, keeper, rows, scores_dtype(self.engine)))
        return g.square().mT @ a.square() / len(g)


def _pass(engine: Engine, index: Index, p: int, turned: list[Seen], ids: np.ndarray) -> Iterator[tuple[np.ndarray, list[tuple[Use, Tensor]]]]:
    """What each row gets from each part of a panel: positions within ``ids`` and (use, scores)."""
    keepers = index.keepers(engine, p)
    dtype = scores_dtype(engine)
    for rows in index.parts(p):
        wanted = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
        if not len(wanted):
            continue
        blocks = contribution(turned, index.gradients(p, keepers, rows, dtype), paired=False)
        local = torch.as_tensor(ids[wanted] - rows.start, device=blocks[0].device)
        everything = len(wanted) == rows.stop - rows.start
        yield wanted, [(s.use, block if everything else block[:, local]) for s, block in zip(turned, blocks, strict=True)]
        engine.advance(rows.stop - rows.start)


def _same_blocks(index: Index, engine: Engine) -> None:
    """Raise ModelMismatch where the parameters are laid out otherwise than when the index was built."""
    held = {b["name"]: (b["shape"], b["parameters"]) for b in index.manifest["blocks"]}
    found = {n: (list(b.shape), list(b.parameters)) for n, b in engine.capture.blocks.items()}
    differing = [n for n in {**held, **found} if held.get(n) != found.get(n)]
    if differing:
        raise ModelMismatch(
            f"queries under which {differing[0]!r} is laid out as {found.get(differing[0])}, in the index as {held.get(differing[0])}",
            "a measure that runs the model as the training loss does",
            "pass such a measure, or trace the run itself",
        )


def _result(index: Index, table: Table, scores: Tensor, asked: Asked, cost: dict[str, float], engine: Engine) -> TrainingScores:
    run = index.run
    provenance = {
        "run": str(run.path),
        "index": index.manifest["key"],
        "dim": index.manifest["dim"],
        "dtype": index.manifest["dtype"],
        "measured": index.manifest["measured"],
        "method": table.name,
        "checkpoints": sorted({step for row in table.rows for w in row.at for step in w}),
        "weights": run.weights_hash(run.checkpoints[-1]),
        "data": [stage.fingerprint for stage in run.stages],
        "coverage": index.manifest["coverage"],
        "cost": cost,
    }
    return TrainingScores(scores.numpy(), None, table.name, table.unit, asked.names, provenance=provenance)
