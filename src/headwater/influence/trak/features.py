"""What TRAK keeps of a run's training examples: projected gradients of their outputs, and how hard training pushed on each.

Kept in the run's store as shards of examples, so that memory stays bounded and work that was stopped goes on where it was; named by
everything that they depend on, so that other queries and other regularisations read them instead of making them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.capture.stream import stream
from headwater.errors import NotFinite
from headwater.influence.engine import Engine
from headwater.influence.jobs import Job, guarded, place_of
from headwater.influence.queries import Asked
from headwater.influence.trak.outputs import Given, Output, output_of
from headwater.influence.trak.projecting import Projector
from headwater.linalg.projections import VERSION
from headwater.store import content_hash
from headwater.tasks.batches import Batch, to
from headwater.tasks.code import task_identity
from headwater.training import Run
from headwater.training.run import Stage

SHARD = 2**22  # numbers in a shard of features


@dataclass(frozen=True, eq=False)
class Outputs:
    """The output function of each stage of a run."""

    run: Run
    of: tuple[Output, ...]

    @classmethod
    def for_run(cls, run: Run, given: Given | None) -> Outputs:
        return cls(run, tuple(output_of(stage.task, given) for stage in run.stages))

    @cached_property
    def identity(self) -> list[Any]:
        """What outputs, their gradients and pushes depend on: weights, view, data, tasks and functions."""
        final = self.run.weights_hash(self.run.checkpoints[-1])
        return [final, self.run.architecture, [[s.fingerprint, task_identity(s.task), o.identity] for s, o in zip(self.run.stages, self.of, strict=True)]]

    def prove(self, engine: Engine) -> None:
        """Hold the gradients of every stage's output against autograd's, on two examples."""
        self.run_once(engine.model)
        for stage, output in zip(self.run.stages, self.of, strict=True):
            engine.capture.prove(output.value, to(stage.data.batch(range(min(2, stage.size))), self.run.device))

    def run_once(self, model: nn.Module) -> None:
        """Outputs and pushes of two examples of each stage: refuses what cannot be differentiated, before any work."""
        for stage, output in zip(self.run.stages, self.of, strict=True):
            probe = to(stage.data.batch(range(min(2, stage.size))), self.run.device)
            with torch.no_grad():
                output.push(model, probe)
                output.value(model, probe)


def pushes(engine: Engine, outputs: Outputs) -> np.ndarray:
    """How hard training pushes each example's output at the final weights, ``-dL/df``: forward passes alone. (train,)"""
    run = engine.run
    engine.load((run.checkpoints[-1],))
    found = np.empty(run.size)
    for stage, output in zip(run.stages, outputs.of, strict=True):

        def process(batch: Batch, ids: np.ndarray, stage: Stage = stage, output: Output = output) -> Tensor:
            return pushed(engine, output, batch, ids, stage)

        for ids, push in stream(stage.data, range(stage.size), process, batch_size=engine.batch_size, device=run.device):
            found[stage.columns.start + ids] = push.double().cpu().numpy()
            engine.advance(len(ids))
    return found


def pushed(engine: Engine, output: Output, batch: Batch, ids: np.ndarray, stage: Stage) -> Tensor:
    """The push of a batch, which must be finite."""
    with torch.no_grad():
        push = output.push(engine.model, batch)
    return finite(push, "a push -dL/df", ids, stage)


def finite(values: Tensor, what: str, ids: np.ndarray, stage: Stage | None) -> Tensor:
    """The values, (n, ...), if none is NaN or infinite."""
    bad = (~torch.isfinite(values)).flatten(1).any(1) if values.ndim > 1 else ~torch.isfinite(values)
    if bool(bad.any()):
        where = f"training example {ids[int(bad.nonzero()[0])]} of stage {stage.name!r}" if stage else f"query example {ids[int(bad.nonzero()[0])]}"
        mend = "look at that example; hw.tasks.log_odds is a stable log-odds"
        raise NotFinite(f"{what} that is NaN or infinite for {where}", "finite outputs and gradients", mend)
    return values


@dataclass(frozen=True, eq=False)
class Shard:
    """Features of examples ``ids`` of a stage: where they are kept, and the columns that they have in the scores."""

    name: str
    stage: Stage
    output: Output
    ids: range

    @property
    def columns(self) -> slice:
        return slice(self.stage.columns.start + self.ids.start, self.stage.columns.start + self.ids.stop)


@dataclass(frozen=True, eq=False)
class Features:
    """Features (train, dim) of all training examples, shard by shard."""

    engine: Engine
    outputs: Outputs
    projector: Projector

    @cached_property
    def name(self) -> str:
        """What features depend on besides examples. Not the batch size."""
        layout = [[name, list(block.shape), list(block.parameters)] for name, block in self.projector.blocks.items()]
        return content_hash("trak-1", VERSION, self.outputs.identity, layout, repr(self.projector.projection))

    @cached_property
    def shards(self) -> list[Shard]:
        """All shards, in the order of the scores' columns."""
        key = self.name
        rows = max(1, SHARD // self.projector.dim)
        return [
            Shard(f"trak/{key}-{stage.index}-{start}-{min(start + rows, stage.size)}", stage, output, range(start, min(start + rows, stage.size)))
            for stage, output in zip(self.engine.run.stages, self.outputs.of, strict=True)
            for start in range(0, stage.size, rows)
        ]

    def missing(self) -> int:
        """Training examples whose features are neither kept nor in interrupted work."""
        store = self.engine.run.store
        return sum(len(shard.ids) - place_of(store, _job(shard))[2] for shard in self.shards if not store.has(shard.name))

    def each(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, features (n, dim) and pushes (n,) of each shard, read or made now."""
        store = self.engine.run.store
        for shard in self.shards:
            held = store.read(shard.name) if store.has(shard.name) else self._make(shard)
            yield shard.columns, held["features"].to(self.engine.run.device), held["push"]

    def _make(self, shard: Shard) -> dict[str, Tensor]:
        """A shard, batch by batch; what is done of it when it is stopped is kept."""
        engine, n, dim = self.engine, len(shard.ids), self.projector.dim
        engine.load((engine.run.checkpoints[-1],))
        job = Job(engine.run.store, _job(shard), [(n, dim), (n, 1)], numbers(engine))

        def process(batch: Batch, ids: np.ndarray) -> tuple[Tensor, Tensor]:
            push = pushed(engine, shard.output, batch, ids, shard.stage)
            found = self.projector(engine.capture.gradients(shard.output.value, batch))
            return finite(found, "a gradient of the output", ids, shard.stage), push

        def go() -> None:
            todo = shard.ids[job.place[2] :]
            for ids, (found, push) in stream(shard.stage.data, todo, process, batch_size=engine.batch_size, device=engine.run.device):
                rows = slice(int(ids[0]) - shard.ids.start, int(ids[-1]) + 1 - shard.ids.start)
                job.add(0, rows, np.arange(dim), found)
                job.add(1, rows, np.arange(1), push.unsqueeze(1))
                job.reach(0, 0, rows.stop)
                engine.advance(len(ids))

        guarded(job, go)
        held = {"features": job.scores[0], "push": job.scores[1].squeeze(1).contiguous()}
        engine.run.store.write(shard.name, held, {"stage": shard.stage.name, "first": shard.ids.start, "projection": repr(self.projector.projection)})
        job.finish()
        return held

    def of(self, asked: Asked) -> Tensor:
        """Features (queries, dim) of the measure that was asked about; a named query's is the sum of its examples'."""
        engine = self.engine
        engine.load((engine.run.checkpoints[-1],))
        total = torch.zeros(asked.count, self.projector.dim, dtype=numbers(engine), device=engine.run.device)
        for examples, rows in zip(asked.examples, asked.rows, strict=True):

            def process(batch: Batch, ids: np.ndarray) -> Tensor:
                return finite(self.projector(engine.capture.gradients(asked.measure, batch)), "a gradient of the measure", ids, None)

            for ids, found in stream(examples, range(len(examples)), process, batch_size=engine.batch_size, device=engine.run.device):
                total.index_add_(0, torch.as_tensor(rows[ids], device=total.device), found.to(total.dtype))
                engine.advance(len(ids))
        return total


def _job(shard: Shard) -> str:
    return content_hash("trak-job-1", shard.name)


def numbers(engine: Engine) -> torch.dtype:
    """The precision of features: the model's, at least float32."""
    lowest = torch.float32
    for p in engine.model.parameters():
        lowest = torch.promote_types(lowest, p.dtype)
    return lowest
