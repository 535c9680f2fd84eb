"""The plan of a trace: what it takes of memory, time and passes, told before it starts, and the bar beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from headwater.influence.engine import Engine
from headwater.influence.jobs import Job
from headwater.influence.methods import Fit, Table
from headwater.influence.queries import Asked
from headwater.influence.scoring import Pass, Use, passes
from headwater.influence.vectors import is_rank_one
from headwater.report.numbers import duration
from headwater.tasks.batches import to


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
    coverage: dict[str, int]
    refined: int = 0
    """Examples passed through the model for products with the exact curvature, once for each query's vector: at most."""
    left: int = 0
    """Of ``examples`` and ``refined`` together: those that neither kept curvature nor interrupted work spares."""
    seconds: float | None = None
    """For those; None where nobody is told."""

    def __str__(self) -> str:
        rules = ", ".join(f"{count:,} by {rule}" for rule, count in sorted(self.coverage.items(), key=lambda item: -item[1]))
        chunks = f" in each of {self.chunks} chunks of {self.chunk} queries" if self.chunks > 1 else ""
        refined = f", and at most {self.refined:,} for refinement" if self.refined else ""
        left = f" ({self.left:,} of them left)" if self.left < self.examples + self.refined else ""
        timed = "" if self.seconds is None else f", about {duration(self.seconds)} by timed batches for the gradients alone"
        memory = f"queries {_mb(self.query_bytes)}, curvature {_mb(self.factor_bytes)}, scores {_mb(self.score_bytes)}"
        lines = (
            f"{len(self.methods)} method(s), {self.queries:,} queries x {self.train:,} training examples: {self.passes} passes over gradients{chunks}",
            f"{self.examples:,} example gradients in all{refined}{left}{timed}; batches of {self.batch_size}",
            f"memory: {memory}",
            f"parameters: {rules}",
        )
        return "\n".join("headwater: " + line for line in lines)


def _mb(size: int) -> str:
    return f"{size / 2**20:,.0f} MB"


def dtype_of(engine: Engine) -> torch.dtype:
    """Of scores: the model's, at least float32."""
    lowest = torch.float32
    for p in engine.model.parameters():
        lowest = torch.promote_types(lowest, p.dtype)
    return lowest


def plan_of(engine: Engine, tables: list[Table], asked: Asked, memory: int, places: int, paired: bool = False) -> Plan:
    """The whole work; ``places``: where scores are added up; ``paired``: each training example with itself."""
    work, run = passes(tables, engine), engine.run
    width = _query_bytes(engine, tables, asked)
    chunk = int(max(1, min(asked.count, memory // max(1, width))))
    chunks = -(-asked.count // chunk)
    streamed = streams(engine, work, 1 if paired else chunks)
    fits, refined = _fits(tables), asked.count * _refining(engine, tables)
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
        score_bytes=4 * asked.count * run.size * places,
        batch_size=engine.batch_size,
        coverage=coverage,
        refined=refined,
        left=examples + refined,
    )


def of_what_is_left(plan: Plan, engine: Engine, tables: list[Table], streamed: int, queries: int, timed: bool) -> Plan:
    """The plan, where ``streamed`` example gradients have still to be compared with queries, and ``queries`` of these to be refined; their time
    where it will be told."""
    left = streamed + sum(engine.cost(fit) for fit in _fits(tables) if not engine.holds(fit)) + queries * _refining(engine, tables)
    return replace(plan, left=left, seconds=left * engine.seconds_per_example if timed else None)


def streams(engine: Engine, work: Iterable[Pass], chunks: int, place: tuple[int, int, int] = (0, 0, 0)) -> int:
    """Example gradients that the passes take for so many chunks of queries, from ``place`` (chunk, pass, example) on."""
    each = [(engine.run.stages[where.stage].size, engine.data(where.stage, where.events).rows_per_example) for where in work]
    done, p, examples = place
    if done == chunks:
        return 0
    return (chunks - done) * sum(size * rows for size, rows in each) - sum(size * rows for size, rows in each[:p]) - examples * each[p][1]


def _fits(tables: list[Table]) -> set[Fit]:
    """Every curvature that the tables are answered with."""
    return {row.curvature for table in tables for row in table.rows if row.curvature is not None and (row.refine is None or row.refine.preconditioned)}


def _refining(engine: Engine, tables: list[Table]) -> int:
    """Examples that pass through the model to refine one query in all rows: at most."""
    return sum(engine.refining(row) for row in {row for table in tables for row in table.rows})


def _query_bytes(engine: Engine, tables: list[Table], asked: Asked) -> int:
    """Memory of one query's side at its fullest pass: psi of the pass's rows, the carried queries, and the raw ones. A layer
    applied once per example keeps factors, its own and those in the eigenbasis, where nothing has carried the query yet."""
    probe = to(asked.examples[0].batch(range(1)), engine.run.device)
    gradients = engine.capture.gradients(asked.measure, probe)
    number = torch.empty(0, dtype=dtype_of(engine)).element_size()
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


class Shown:
    """The plan, then a bar over example gradients, on stderr; nothing at all with progress=False."""

    def __init__(self, engine: Engine, plan: Plan, show: bool, job: Job) -> None:
        self.engine, self.plan, self.show, self.job = engine, plan, show, job

    def __enter__(self) -> None:
        if self.show:
            tqdm.write(str(self.plan), file=sys.stderr)
            if self.job.resumed:
                tqdm.write("headwater: resuming interrupted work", file=sys.stderr)
        total = self.plan.examples + self.plan.refined
        self.bar = tqdm(total=total, initial=total - self.plan.left, unit=" examples", disable=not self.show, desc="trace", leave=False, file=sys.stderr, mininterval=0.5)
        self.engine.advance = self.bar.update

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.show and kind is KeyboardInterrupt:
            tqdm.write("headwater: stopped; what was computed is kept, and the same call continues there", file=sys.stderr)
        self.engine.advance = lambda n: None
