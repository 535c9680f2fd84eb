"""The one loop over pairs: vectors of the queries once, vectors of the training examples streamed, a kernel between them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.capture.stream import stream
from headwater.influence.jobs import Job, guarded
from headwater.influence.request import Request
from headwater.influence.similarity.vectors import Vectors, finite
from headwater.store import content_hash
from headwater.tasks import Measure, Task
from headwater.tasks.batches import Batch, Examples
from headwater.tasks.code import task_identity

BATCH = 256  # examples of one forward pass, where nothing else is said
Kernel = Callable[[Tensor, Tensor], Tensor]
"""``(queries, d), (n, d) -> (queries, n)``."""


def cosine(queries: Tensor, train: Tensor) -> Tensor:
    """Cosines of the angles between rows; 0 for a row of zeros."""
    return _unit(queries) @ _unit(train).mT


def dot(queries: Tensor, train: Tensor) -> Tensor:
    """Inner products of rows."""
    return queries @ train.mT


def minus_distance(queries: Tensor, train: Tensor) -> Tensor:
    """Minus the Euclidean distances of rows, from differences: equal rows are at distance 0, and equal pairs equally far."""
    return -torch.cdist(queries, train, compute_mode="donot_use_mm_for_euclid_dist")


KERNELS: dict[str, Kernel] = {"cosine": cosine, "dot": dot, "l2": minus_distance}


def _unit(t: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(t, dim=1, keepdim=True)
    return torch.where(length > 0, t / torch.where(length > 0, length, 1.0), 0.0)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The kernel of all pairs. ``values`` (query examples, training examples); ``cost`` for the provenance of scores."""

    values: np.ndarray
    cost: dict[str, Any]


def pairs(request: Request, vectors: Vectors, kernel: Kernel, name: str) -> Pairs:
    """The ``kernel`` of each example asked about with each training example of all stages, at the run's final weights.

    Interrupted work resumes when the same request comes again: ``name`` must say all that the numbers depend on besides the request.
    """
    run, asked = request.run, request.asked
    counts = [len(examples) for examples in asked.examples]
    started, batch = time.perf_counter(), request.batch_size or BATCH
    last = run.stages[-1].task
    first = _read(asked.examples[0], range(1), last, asked.measure, vectors, request, "query")
    chunk = int(max(1, min(sum(counts), request.memory // max(1, first.numel() * first.element_size()))))
    facts = [[s.fingerprint, task_identity(s.task)] for s in run.stages]
    key = content_hash("pairs-1", name, run.weights_hash(run.checkpoints[-1]), run.architecture, facts, asked.identity, chunk)
    job = Job(run.store, key, [(sum(counts), run.size)], first.dtype)
    places = [(start, min(start + chunk, sum(counts))) for start in range(0, sum(counts), chunk)]
    total = sum(counts) + run.size * len(places)
    if request.progress:
        tqdm.write(f"headwater: {name} on {vectors.where}: {sum(counts):,} query examples x {run.size:,} training examples, {total:,} forward passes", file=sys.stderr)
    bar = tqdm(total=total, unit=" examples", desc="compare", leave=False, file=sys.stderr, disable=not request.progress, mininterval=0.5)

    def go() -> None:
        for c in range(job.place[0], len(places)):
            start, stop = places[c]
            theirs = _queries(request, vectors, start, stop, batch)
            bar.update(len(theirs))
            for stage in run.stages:
                done = job.place[2] if job.place[:2] == (c, stage.index) else 0
                if job.place[:2] > (c, stage.index):
                    continue

                def process(held: Batch, ids: np.ndarray, task: Task = stage.task, at: Tensor = theirs) -> Tensor:
                    mine = finite(vectors.of(held, task, task.loss), lambda i: f"training example {ids[i]}")
                    return kernel(at, mine.to(at.dtype))

                for ids, block in stream(stage.data, np.arange(done, stage.size), process, batch_size=batch, device=run.device):
                    job.add(0, slice(start, stop), stage.columns.start + ids, block)
                    job.reach(c, stage.index, int(ids[-1]) + 1)
                    bar.update(len(ids))
            job.reach(c + 1, 0, 0)

    with bar:
        guarded(job, go)
    job.finish()
    return Pairs(job.scores[0].numpy(), {"seconds": round(time.perf_counter() - started, 3), "forward_passes": total})


def _queries(request: Request, vectors: Vectors, start: int, stop: int, batch: int) -> Tensor:
    """Vectors of the query examples start ... stop, counted over all sets."""
    parts, before = [], 0
    task = request.run.stages[-1].task
    for examples in request.asked.examples:
        low, high = max(start - before, 0), min(stop - before, len(examples))
        parts += [_read(examples, range(i, min(i + batch, high)), task, request.asked.measure, vectors, request, "query") for i in range(low, high, batch)]
        before += len(examples)
    return torch.cat(parts)


def _read(examples: Examples, ids: range, task: Task, ask: Measure, vectors: Vectors, request: Request, what: str) -> Tensor:
    """Vectors of some examples."""

    def process(held: Batch, part: np.ndarray) -> Tensor:
        return finite(vectors.of(held, task, ask), lambda i: f"{what} {part[i]}")

    return torch.cat([found for _, found in stream(examples, ids, process, batch_size=len(ids), device=request.run.device)])


def rows_of(request: Request) -> np.ndarray:
    """For each example asked about, over all sets, the row that it counts in."""
    return np.concatenate(request.asked.rows)


def summed(values: np.ndarray, request: Request) -> np.ndarray:
    """Rows of examples (query examples, train) added up to rows of queries (queries, train): a named query is the sum of its examples."""
    if request.asked.names is None:
        return values
    out = np.zeros((request.asked.count, values.shape[1]), dtype=values.dtype)
    np.add.at(out, rows_of(request), values)
    return out


def averaged(values: np.ndarray, request: Request) -> np.ndarray:
    """The same with the mean over a query's examples, so that a cosine stays one."""
    return summed(values, request) / np.bincount(rows_of(request), minlength=request.asked.count)[:, None].astype(values.dtype)
