"""Carrying out the methods that are tables: a plan told beforehand, passes shared by all of them, work that is kept and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from headwater.errors import InputError
from headwater.influence.engine import Engine
from headwater.influence.jobs import Job, guarded
from headwater.influence.methods import Method, Table
from headwater.influence.plans import Plan, Shown, dtype_of, of_what_is_left, plan_of, streams
from headwater.influence.proving import prove_estimates
from headwater.influence.queries import ask, check
from headwater.influence.refine import told
from headwater.influence.request import SCORES, Parts, Request, Scorer
from headwater.influence.scoring import Pass, QuerySide, Use, passes, query_gradients, score_pass
from headwater.result import Slices, TrainingScores
from headwater.store import content_hash
from headwater.tasks import Measure, Task
from headwater.tasks.batches import to
from headwater.tasks.code import code_digest, task_identity
from headwater.training import Run


def by_tables(request: Request, tables: list[Table]) -> list[TrainingScores]:
    """Scores of all tables, in shared passes. Work that was interrupted resumes when the same request comes again."""
    run, asked = request.run, request.asked
    engine = Engine.of(run, request.batch_size)
    engine.load((run.checkpoints[-1],))
    check(asked, engine.model, run.stages[-1].data, run.device)
    prove_estimates([row.curvature.estimate for table in tables for row in table.rows if row.curvature is not None], run, engine.model)
    if not isinstance(getattr(asked.measure, "__self__", None), Task):  # the user's own may reach weights outside their modules
        for examples in asked.examples:
            engine.capture.prove(asked.measure, to(examples.batch(range(min(2, len(examples)))), run.device), "measure")
    work, slots = passes(tables, engine), Slots(tables)
    plan = plan_of(engine, tables, asked, request.memory, slots.count)
    # the place in the job depends on chunks and batches: they are part of its name
    key = content_hash("trace-1", _identity(run, tables, engine), asked.identity, plan.chunk, request.tolerance)
    tolerance = _tolerance(engine, request.tolerance)
    job = Job(run.store, key, [(asked.count, run.size)] * slots.count, dtype_of(engine))
    waiting = max(0, asked.count - job.place[0] * plan.chunk)
    plan = of_what_is_left(plan, engine, tables, streams(engine, work, plan.chunks, job.place), waiting, request.progress)

    def go() -> None:
        for c in range(job.place[0], plan.chunks):
            rows = slice(c * plan.chunk, min((c + 1) * plan.chunk, asked.count))
            side = QuerySide(engine, tables, query_gradients(engine, asked, (run.checkpoints[-1],), rows), asked, rows, tolerance)
            for p, (where, uses) in enumerate(work.items()):
                seen = side.prepare(uses)
                done, stage = job.place[2] if job.place[:2] == (c, p) else 0, run.stages[where.stage]
                if job.place[:2] <= (c, p):
                    for ids, added in score_pass(engine, where, seen, np.arange(done, stage.size), paired=False):
                        for s, block in zip(seen, added, strict=True):
                            for slot in slots.of(s.use):
                                job.add(slot, rows, stage.columns.start + ids, block)
                        job.reach(c, p, int(ids[-1]) + 1)
                side.release(uses)
            job.reach(c + 1, 0, 0)

    return [slots.told(m, score, job) for m, score in enumerate(_carried_out(engine, tables, plan, job, go, request.progress, asked.names))]


class Slots:
    """Where scores are added up: one place for each table, and one for each label along the axes that it keeps apart."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables
        names = [(m, axis, label) for m, table in enumerate(tables) for axis in table.keep for label in table.labels(axis)]
        self.places = {name: len(tables) + k for k, name in enumerate(names)}
        self.count = len(tables) + len(names)

    def of(self, use: Use) -> list[int]:
        """The places that a row's contribution is added to."""
        return [use.method, *(self.places[use.method, axis, label] for axis, label in use.row.labels if (use.method, axis, label) in self.places)]

    def told(self, m: int, scores: TrainingScores, job: Job) -> TrainingScores:
        """The scores of a table with what was kept apart."""
        table = self.tables[m]
        kept = {}
        for axis in table.keep:
            labels = tuple(table.labels(axis))
            kept[axis] = Slices(axis, labels, np.stack([job.scores[self.places[m, axis, label]].numpy() for label in labels]))
        return replace(scores, slices=kept) if kept else scores


def parts_of(method: Method | Scorer, request: Request) -> Parts:
    """What one model contributes to an answer by this method, of either kind."""
    if isinstance(method, Scorer):
        return method.parts(request.in_one_place)
    found = by_tables(request, [method.plan(request.run)])[0]
    return Parts({SCORES: found.values}, found.method, found.unit, found.provenance)


def self_by_tables(
    run: Run, tables: list[Table], *, measure: Measure | None, batch_size: int | None, memory: int, tolerance: float | None, progress: bool, weights: str | None = None
) -> list[TrainingScores]:
    """Scores of each training example on its own measurement: (1, training examples) for each table."""
    engine = Engine.of(run, batch_size)
    work = passes(tables, engine)
    asked = [ask(stage.data, stage.task, measure).of(run, weights) for stage in run.stages]
    plan = plan_of(engine, tables, asked[-1], memory, len(tables), paired=True)
    questions = [[code_digest(a.measure, held=True), [e.view for e in a.examples], a.averaged] for a in asked]
    key = content_hash("self-1", _identity(run, tables, engine), questions, plan.chunk, tolerance)
    tolerance = _tolerance(engine, tolerance)
    job = Job(run.store, key, [(1, run.size)] * len(tables), dtype_of(engine))
    chunks = [(stage, start) for stage in run.stages for start in range(0, stage.size, plan.chunk)]
    waiting = [0] * len(run.stages)  # examples of each stage
    for stage, start in chunks[job.place[0] :]:
        waiting[stage.index] += min(plan.chunk, stage.size - start)
    streamed = sum(waiting[where.stage] * engine.data(where.stage, where.events).rows_per_example for where in work)
    plan = of_what_is_left(plan, engine, tables, streamed, sum(waiting), progress)

    def go() -> None:
        for c, (stage, start) in list(enumerate(chunks))[job.place[0] :]:
            rows = slice(start, min(start + plan.chunk, stage.size))
            about = asked[stage.index]
            base = query_gradients(engine, about, (run.checkpoints[-1],), rows)
            side = QuerySide(engine, tables, base, about, rows, tolerance)
            parts: list[tuple[int, np.ndarray, torch.Tensor]] = []
            for where, uses in work.items():
                seen = side.prepare(uses)
                if where.stage == stage.index:
                    parts += _diagonal(engine, where, seen, rows)
                side.release(uses)
            for method_index, ids, block in parts:
                job.add(method_index, slice(0, 1), stage.columns.start + ids, block)
            job.reach(c + 1, 0, 0)

    return _carried_out(engine, tables, plan, job, go, progress, ("self",))


def _carried_out(engine: Engine, tables: list[Table], plan: Plan, job: Job, work: Callable[[], None], show: bool, names: tuple[str, ...] | None) -> list[TrainingScores]:
    """Do the work under a plan and a bar, keep what was computed whatever stops it, and hand out the scores with what they cost."""
    started = time.perf_counter()
    with Shown(engine, plan, show, job):
        guarded(job, work)
    job.finish()
    engine.forget()
    cost = {"seconds": round(time.perf_counter() - started, 3), "example_gradients": plan.examples, "plan": asdict(plan)}
    return [_result(table, scores, names, cost, engine) for table, scores in zip(tables, job.scores[: len(tables)], strict=True)]


def _diagonal(engine: Engine, where: Pass, seen: list[Any], rows: slice) -> list[tuple[int, np.ndarray, torch.Tensor]]:
    """Scores of query i with example i for one chunk."""
    found = score_pass(engine, where, seen, np.arange(rows.start, rows.stop), paired=True)
    return [(s.use.method, ids, block) for ids, added in found for s, block in zip(seen, added, strict=True)]


def _identity(run: Run, tables: list[Table], engine: Engine) -> list[Any]:
    """What the scores depend on besides the queries."""
    weights = sorted({step for table in tables for row in table.rows for w in row.at for step in w} | {run.checkpoints[-1]})
    data = [[s.fingerprint, task_identity(s.task)] for s in run.stages]
    return [[run.weights_hash(step) for step in weights], run.architecture, list(map(repr, tables)), data, engine.batch_size]


def _tolerance(engine: Engine, tolerance: float | None) -> float:
    if tolerance is not None and not 0 <= tolerance < 1:
        raise InputError(f"tolerance={tolerance}", "a relative error from 0 (exact) to below 1", "leave it out for 1e-4")
    return (0.0 if dtype_of(engine) == torch.float64 else 1e-4) if tolerance is None else tolerance


def _result(table: Table, scores: torch.Tensor, names: tuple[str, ...] | None, cost: dict[str, Any], engine: Engine) -> TrainingScores:
    run = engine.run
    provenance = {
        "run": str(run.path),
        "method": table.name,
        "checkpoints": sorted({step for row in table.rows for w in row.at for step in w}),
        "weights": run.weights_hash(run.checkpoints[-1]),
        "data": [stage.fingerprint for stage in run.stages],
        "coverage": engine.capture.coverage,
        "cost": cost,
    }
    notes = [note for row in table.rows for note in engine.notes.get(row, ())]
    if notes:
        provenance["refined"] = told(notes)
    return TrainingScores(values=scores.numpy(), stderr=None, method=table.name, unit=table.unit, query_names=names, provenance=provenance)
