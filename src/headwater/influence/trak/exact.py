"""TRAK's kernel without a projection: from inner products of whole gradients, which layers' factors give without forming them.

``K = T G^T (G G^T + r I)^-1`` with the training outputs' gradients G (n, P) and the measures' T (q, P), neither of which is written down.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headwater.capture.stream import stream
from headwater.errors import InputError
from headwater.influence.engine import Engine
from headwater.influence.jobs import Job, guarded, place_of
from headwater.influence.queries import Asked
from headwater.influence.scoring import query_gradients
from headwater.influence.trak.features import Outputs, finite, numbers
from headwater.influence.trak.outputs import Output
from headwater.influence.vectors import Queries, dots_of, is_rank_one
from headwater.store import content_hash
from headwater.tasks.batches import Batch, to
from headwater.training.run import Run, Stage

COPIES = 20
"""Bytes for each pair of training examples, at the most: the matrix as it is kept, and in float64 with its factor."""


def check_room(run_size: int, memory: int) -> None:
    """Raise InputError where the matrix of all pairs of training examples does not fit into the memory that was allowed."""
    if COPIES * run_size**2 > memory:
        raise InputError(
            f"the exact kernel of {run_size:,} training examples, whose matrix takes {COPIES * run_size**2 / 2**30:,.1f} GB of the {memory / 2**30:,.1f} GB allowed",
            f"at most {int((memory / COPIES) ** 0.5):,} examples, or a projection",
            f"hw.Trak(dim=4096), or hw.trace(..., memory={COPIES * run_size**2})",
        )


def gram_name(outputs: Outputs) -> str:
    return f"trak/{content_hash('gram-1', outputs.identity)}"


def gram(engine: Engine, outputs: Outputs, memory: int) -> Tensor:
    """``G G^T`` (train, train) of the outputs' gradients, from the run's store or made now and kept. Half of it is computed, by blocks:
    each chunk of rows against the examples from there on."""
    run, name = engine.run, gram_name(outputs)
    if run.store.has(name):
        return run.store.read(name)["gram"]
    rows = _rows(engine, outputs, memory)
    job = Job(run.store, _job(engine, name, rows), [(run.size, run.size)], numbers(engine))
    chunks = _chunks(run, rows)

    def go() -> None:
        for c, (stage, start) in list(enumerate(chunks))[job.place[0] :]:
            ids = slice(start, min(start + rows, stage.size))
            side = query_gradients(engine, _asked(stage, outputs.of[stage.index]), (run.checkpoints[-1],), ids)
            engine.advance(ids.stop - ids.start)
            columns = slice(stage.columns.start + ids.start, stage.columns.start + ids.stop)
            for other, first in [(other, start if other is stage else 0) for other in run.stages[stage.index :]]:
                done = max(first, job.place[2]) if job.place[:2] == (c, other.index) else first
                if job.place[:2] > (c, other.index):
                    continue
                for part, dots in _against(engine, other, outputs.of[other.index], side, np.arange(done, other.size)):
                    job.add(0, columns, other.columns.start + part, dots)
                    job.reach(c, other.index, int(part[-1]) + 1)
            job.reach(c + 1, 0, 0)

    guarded(job, go)
    matrix = job.scores[0]
    for stage, start in chunks:  # the lower half is the upper one's mirror image
        own = slice(stage.columns.start + start, stage.columns.start + min(start + rows, stage.size))
        matrix[own.stop :, own] = matrix[own, own.stop :].mT
        matrix[own, own] = (matrix[own, own] + matrix[own, own].mT) / 2
    run.store.write(name, {"gram": matrix}, {"examples": run.size})
    job.finish()
    return matrix


def cross(engine: Engine, outputs: Outputs, asked: Asked, memory: int) -> Tensor:
    """``T G^T`` (queries, train): the measures' gradients against the outputs'."""
    run, rows = engine.run, _rows(engine, outputs, memory)
    out = torch.zeros(asked.count, run.size, dtype=numbers(engine), device=run.device)
    for start in range(0, asked.count, rows):
        chunk = slice(start, min(start + rows, asked.count))
        side = query_gradients(engine, asked, (run.checkpoints[-1],), chunk)
        engine.advance(chunk.stop - chunk.start)
        for stage, output in zip(run.stages, outputs.of, strict=True):
            for part, dots in _against(engine, stage, output, side, np.arange(stage.size)):
                out[chunk, stage.columns.start + part[0] : stage.columns.start + part[-1] + 1] = dots
    return out


def passes(engine: Engine, outputs: Outputs, asked: Asked, memory: int) -> int:
    """Example gradients that :func:`gram` (where it is not kept) and :func:`cross` will take."""
    run, rows = engine.run, _rows(engine, outputs, memory)
    total = asked.count + run.size * -(-asked.count // rows)
    name = gram_name(outputs)
    if not run.store.has(name):
        place = place_of(run.store, _job(engine, name, rows))
        for stage, start in _chunks(run, rows)[place[0] :]:
            total += min(rows, stage.size - start) + run.size - (stage.columns.start + start)
        if place[1:] != (0, 0):  # some stages are compared with that chunk, and a part of one
            stage, start = _chunks(run, rows)[place[0]]
            total -= max(0, run.stages[place[1]].columns.start + place[2] - (stage.columns.start + start))
    return total


def _chunks(run: Run, rows: int) -> list[tuple[Stage, int]]:
    """The first row of each chunk, ``rows`` of them or what is left of a stage."""
    return [(stage, start) for stage in run.stages for start in range(0, stage.size, rows)]


def _job(engine: Engine, name: str, rows: int) -> str:
    return content_hash("gram-job-1", name, rows, engine.batch_size)


def _asked(stage: Stage, output: Output) -> Asked:
    """A stage's examples as queries about their own outputs."""
    return Asked((stage.data,), (np.arange(stage.size),), None, output.value)


def _against(engine: Engine, stage: Stage, output: Output, side: Queries, ids: np.ndarray):  # type: ignore[no-untyped-def]
    """Inner products of queries with the outputs' gradients of a stage's examples, batch by batch: (ids, (queries, n))."""
    engine.load((engine.run.checkpoints[-1],))

    def process(batch: Batch, part: np.ndarray) -> Tensor:
        gradients = engine.capture.gradients(output.value, batch)
        total = torch.zeros(())
        for name, gradient in gradients.items():
            total = total + dots_of([side[name]], gradient)[0]
        finite(total.mT, "a gradient of the output", part, stage)
        return total

    for part, dots in stream(stage.data, ids, process, batch_size=engine.batch_size, device=engine.run.device):
        engine.advance(len(part))
        yield part, dots


def _rows(engine: Engine, outputs: Outputs, memory: int) -> int:
    """So many gradients fit in half the memory: as factors where layers are applied once per example, whole elsewhere."""
    stage, output = engine.run.stages[0], outputs.of[0]
    one = engine.capture.gradients(output.value, to(stage.data.batch(range(1)), engine.run.device))
    blocks = engine.capture.blocks
    size = sum(2 * sum(blocks[n].shape[1:]) if is_rank_one(g) else 2 * blocks[n].size for n, g in one.items())
    return int(max(1, memory // (2 * numbers(engine).itemsize * size)))
