"""Carrying out the methods that are tables: a plan told beforehand, passes shared by all of them, work that is kept and resumed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from headwater.errors import InputError
from headwater.influence.engine import Engine
from headwater.influence.jobs import Job, guarded
from headwater.influence.methods import Method, Table
from headwater.influence.proving import prove_estimates
from headwater.influence.queries import Asked, ask, check
from headwater.influence.refine import told
from headwater.influence.request import SCORES, Parts, Request, Scorer
from headwater.influence.scoring import Pass, QuerySide, Use, passes, query_gradients, score_pass
from headwater.influence.vectors import is_rank_one
from headwater.report.numbers import duration
from headwater.result import Slices, TrainingScores
from headwater.store import content_hash
from headwater.tasks import Measure
from headwater.tasks.batches import to
from headwater.tasks.code import code_digest, task_identity
from headwater.training import Run


@dataclass(frozen=True)
class Plan:
    """What a trace will do, told before it starts: chunks of queries, passes over training data, memory and work."""

    methods: tuple[str, ...]
    queries: int
    train: int
    chunk: int
    chunks: int
    passes: int
    examples: int
    query_bytes: int
    factor_bytes: int
    score_bytes: int
    batch_size: int
    seconds: float
    coverage: dict[str, int]
    refined: int = 0
    """Examples passed through the model for products with the exact curvature, once for each query's vector: at most."""

    def __str__(self) -> str:
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in sorted(self.coverage.items(), key=lambda item: -item[1]))
        chunks = f" in each of {self.chunks} chunks of {self.chunk} queries" if self.chunks > 1 else ""
        refined = f", and at most {self.refined:,} for refinement" if self.refined else ""
        memory = f"queries {_mb(self.query_bytes)}, curvature {_mb(self.factor_bytes)}, scores {_mb(self.score_bytes)}"
        lines = (
            f"{len(self.methods)} method(s), {self.queries:,} queries x {self.train:,} training examples: {self.passes} passes over gradients{chunks}",
            f"{self.examples:,} example gradients in all{refined}, about {duration(self.seconds)} by one timed batch; batches of {self.batch_size}",
            f"memory: {memory}",
            f"parameters: {rules}",
        )
        return "\n".join("headwater: " + line for line in lines)


def _mb(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"


def by_tables(request: Request, tables: list[Table]) -> list[TrainingScores]:
    """Scores of all tables, in shared passes. Work that was interrupted resumes when the same request comes again."""
    run, asked = request.run, request.asked
    engine = Engine.of(run, request.batch_size)
    engine.load((run.checkpoints[-1],))
    check(asked, engine.model, run.stages[-1].data, run.device)
    prove_estimates([row.curvature.estimate for table in tables for row in table.rows if row.curvature is not None], run, engine.model)
    work = passes(tables, engine)
    plan = _plan(engine, tables, asked, request.memory)
    # the place in the job depends on chunks and batches: they are part of its name
    key = content_hash("trace-1", _identity(run, tables, engine), asked.identity, plan.chunk, request.tolerance)
    tolerance = _tolerance(engine, request.tolerance)
    slots = Slots(tables)
    job = Job(run.store, key, [(asked.count, run.size)] * slots.count, _dtype(engine))

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
    plan = _plan(engine, tables, asked[-1], memory, paired=True)
    questions = [[code_digest(a.measure, held=True), [e.view for e in a.examples], a.averaged] for a in asked]
    key = content_hash("self-1", _identity(run, tables, engine), questions, plan.chunk, tolerance)
    tolerance = _tolerance(engine, tolerance)
    job = Job(run.store, key, [(1, run.size)] * len(tables), _dtype(engine))
    chunks = [(stage, start) for stage in run.stages for start in range(0, stage.size, plan.chunk)]

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
    with _progress(engine, plan, show, job):
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
    return (0.0 if _dtype(engine) == torch.float64 else 1e-4) if tolerance is None else tolerance


def _dtype(engine: Engine) -> torch.dtype:
    lowest = torch.float32
    for p in engine.model.parameters():
        lowest = torch.promote_types(lowest, p.dtype)
    return lowest


def _plan(engine: Engine, tables: list[Table], asked: Asked, memory: int, paired: bool = False) -> Plan:
    work, run = passes(tables, engine), engine.run
    width = _query_bytes(engine, tables, asked)
    chunk = int(max(1, min(asked.count, memory // max(1, width))))
    chunks = -(-asked.count // chunk)
    streamed = sum(run.stages[where.stage].size * engine.data(where.stage, where.events).rows_per_example for where in work) * (1 if paired else chunks)
    fits = {row.curvature for table in tables for row in table.rows if row.curvature is not None and (row.refine is None or row.refine.preconditioned)}
    refined = asked.count * sum(engine.refining(row) for row in {row for table in tables for row in table.rows})
    factors = sum(b.size + (b.shape[1] ** 2 + b.shape[2] ** 2) * b.shape[0] * b.matrix if b.matrix else b.size for b in engine.capture.blocks.values())
    coverage: dict[str, int] = {}
    sizes = {n: p.numel() for n, p in engine.model.named_parameters(remove_duplicate=False)}
    for name, rule in engine.capture.coverage.items():
        coverage[rule] = coverage.get(rule, 0) + sizes[name]
    examples = streamed + sum(engine.cost(fit) for fit in fits)
    return Plan(
        methods=tuple(table.name for table in tables),
        queries=asked.count,
        train=run.size,
        chunk=chunk,
        chunks=chunks,
        passes=len(work),
        examples=examples,
        query_bytes=chunk * width,
        factor_bytes=4 * factors * len(fits),
        score_bytes=4 * asked.count * run.size * Slots(tables).count,
        batch_size=engine.batch_size,
        seconds=(examples + refined) * engine.seconds_per_example,
        coverage=coverage,
        refined=refined,
    )


def _query_bytes(engine: Engine, tables: list[Table], asked: Asked) -> int:
    """Memory of one query's side at its fullest pass: psi of the pass's rows, the carried queries, and the raw ones. A layer
    applied once per example keeps factors, its own and those in the eigenbasis, where nothing has carried the query yet."""
    probe = to(asked.examples[0].batch(range(1)), engine.run.device)
    gradients = engine.capture.gradients(asked.measure, probe)
    number = torch.empty(0, dtype=_dtype(engine)).element_size()
    factored = {n for n, g in gradients.items() if asked.names is None and is_rank_one(g)}
    whole = {n: block.size for n, block in engine.capture.blocks.items()}
    light = sum(2 * sum(engine.capture.blocks[n].shape[1:]) if n in factored else size for n, size in whole.items())
    last = [max(range(len(table.rows)), key=lambda r: max(table.rows[r].at[-1])) for table in tables]

    def load(use: Use) -> int:
        raw = use.row.refine is None and (use.index == last[use.method] or use.row.psi is None)
        return light if raw else sum(whole.values())

    together = passes(tables, engine).values()
    loads = [sum(map(load, {use.side: use for use in uses}.values())) for uses in together]
    means = [any(use.row.asking is not None and len(use.row.asking.events) > 1 for use in uses) for uses in together]  # summed part by part
    loads = [size + mean * sum(whole.values()) for size, mean in zip(loads, means, strict=True)]
    # while a query is carried, it is there before and after: twice, unless it was still raw
    carried = sum(whole.values()) * sum(min(2, sum(row.psi is not None for row in table.rows[1:])) for table in tables)
    return number * (max(loads) + carried + light)


class _progress:
    """The plan, then a bar over example gradients, on stderr; nothing at all with progress=False."""

    def __init__(self, engine: Engine, plan: Plan, show: bool, job: Job) -> None:
        self.engine, self.plan, self.show, self.job = engine, plan, show, job

    def __enter__(self) -> None:
        if self.show:
            print(self.plan, file=sys.stderr)
            if self.job.resumed:
                print("headwater: resuming interrupted work", file=sys.stderr)
        total = self.plan.examples + self.plan.refined
        self.bar = tqdm(total=total, unit=" examples", disable=not self.show, desc="trace", leave=False, file=sys.stderr, mininterval=0.5)
        self.engine.advance = self.bar.update

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.show and kind is KeyboardInterrupt:
            print("headwater: stopped; what was computed is kept, and the same call continues there", file=sys.stderr)
        self.engine.advance = lambda n: None


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
