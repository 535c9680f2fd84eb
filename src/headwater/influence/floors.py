"""Floors: what any method must beat to have said something. Each is a method, so a table of methods can begin with them:

    hw.trace(run, queries, [hw.Source(), hw.floors.same_label(), hw.floors.inputs("cosine"), hw.floors.loss(), hw.floors.random(0)])

``random`` says what chance reaches; ``same_label`` what the labels alone tell; ``inputs`` what can be seen without any model; ``loss`` and
``gradient_norm`` what can be said of a training example without looking at the query. All of them only rank.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater.capture.stream import stream
from headwater.errors import InputError, NotFinite
from headwater.influence.engine import Engine
from headwater.influence.jobs import Job, guarded
from headwater.influence.methods import COSINE, RANK_ONLY
from headwater.influence.request import SCORES, Parts, Request, mean_of_scores
from headwater.influence.similarity.labels import classes_of
from headwater.influence.similarity.pairs import BATCH, KERNELS, averaged, pairs, summed
from headwater.influence.similarity.representations import provenance_of
from headwater.influence.similarity.texts import bags, bm25, overlap
from headwater.influence.similarity.vectors import Embedded, Inputs, Vectors
from headwater.philox import key_of, normals
from headwater.store import content_hash
from headwater.tasks import Task
from headwater.tasks.batches import Batch
from headwater.tasks.code import task_identity

__all__ = ["gradient_norm", "inputs", "loss", "random", "same_label"]

_TEXTS = {"bm25": bm25, "overlap": overlap}


class _Floor:
    """What floors share: members of an ensemble are averaged as scores."""

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        return mean_of_scores(members)


@dataclass(frozen=True)
class Random(_Floor):
    """See :func:`random`."""

    seed: int = 0

    def parts(self, request: Request) -> Parts:
        drawn = normals(key_of("floors.random", self.seed), range(request.asked.count), range(request.run.size))
        return Parts({SCORES: drawn.numpy()}, f"random (seed {self.seed})", RANK_ONLY, provenance_of(request.run, {}))


def random(seed: int = 0) -> Random:
    """Normal numbers, drawn for each row and training example from the seed alone: an LDS near 0, and by how much it misses 0.

    >>> random(3)
    Random(seed=3)
    """
    return Random(int(seed))


@dataclass(frozen=True)
class SameLabel(_Floor):
    """See :func:`same_label`."""

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where there are no classes."""
        classes_of(request, "floors.same_label()", most=1)

    def parts(self, request: Request) -> Parts:
        same = classes_of(request, "floors.same_label()").same().astype(np.float32)
        return Parts({SCORES: summed(same, request)}, "same label", RANK_ONLY, provenance_of(request.run, {}))


def same_label() -> SameLabel:
    """1 for training examples of the query's class, 0 for others: what a method that only recognises classes reaches. A named query counts
    its examples of that class. Classification only."""
    return SameLabel()


@dataclass(frozen=True)
class RawInputs(_Floor):
    """See :func:`inputs`."""

    similarity: str = "cosine"
    embed: Callable[[Batch], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        known = (*KERNELS, *_TEXTS) if self.embed is None else tuple(KERNELS)
        if self.similarity not in known:
            raise InputError(f"similarity={self.similarity!r}", f"one of {', '.join(map(repr, known))}", "hw.floors.inputs('cosine'); 'bm25' for texts")

    def parts(self, request: Request) -> Parts:
        vectors: Vectors = Inputs() if self.embed is None else Embedded(self.embed)
        name, unit = f"{vectors.where.removeprefix('the ')} ({self.similarity})", COSINE if self.similarity == "cosine" else RANK_ONLY
        if self.similarity in _TEXTS:
            started = time.perf_counter()
            last = request.run.stages[-1].task
            asked, train = bags((e, last) for e in request.asked.examples), bags((s.data, s.task) for s in request.run.stages)
            values, cost = _TEXTS[self.similarity](asked, train), {"seconds": round(time.perf_counter() - started, 3)}
        else:
            found = pairs(request, vectors, KERNELS[self.similarity], name)
            values, cost = found.values, found.cost
        rows = averaged(values, request) if unit == COSINE else summed(values, request)
        return Parts({SCORES: rows}, name, unit, provenance_of(request.run, cost))


def inputs(similarity: str = "cosine", embed: Callable[[Batch], Tensor] | None = None) -> RawInputs:
    """How alike the examples themselves are, without any model.

    Args:
        similarity: of numbers, flattened: ``"cosine"``, ``"dot"``, or ``"l2"``, minus the distance. Of texts (token ids): ``"bm25"``, the
            weighting of full-text search (k1 = 1.5, b = 0.75), or ``"overlap"``, the Jaccard similarity of their sets of tokens.
        embed: what to compare in place of the examples: ``batch -> (n, d)``, features of another network, say. It is given batches on the
            run's device; of a diffusion task, the images (and conditions) without noise.

    A named query is the sum over its examples, for cosines the mean.

    >>> inputs("l2")
    RawInputs(similarity='l2')
    """
    return RawInputs(similarity, embed)


@dataclass(frozen=True)
class FinalLoss(_Floor):
    """See :func:`loss`."""

    def parts(self, request: Request) -> Parts:
        run = request.run
        model = run.load(run.model(), run.checkpoints[-1])

        def of(batch: Batch, task: Task) -> Tensor:
            with torch.no_grad():
                return task.loss(model, batch)

        return _same_for_all(request, "loss", of, request.batch_size or BATCH)


def loss() -> FinalLoss:
    """The training example's loss at the final weights, the same for every query. LDS and correlations per query then judge how much of
    a method's agreement with the truth says nothing about the query."""
    return FinalLoss()


@dataclass(frozen=True)
class GradientNorm(_Floor):
    """See :func:`gradient_norm`."""

    def parts(self, request: Request) -> Parts:
        engine = Engine.of(request.run, request.batch_size)

        def of(batch: Batch, task: Task) -> Tensor:
            found = engine.capture.gradients(task.loss, batch)
            return torch.stack([g.square_norms() for g in found.values()]).sum(0).sqrt()

        return _same_for_all(request, "gradient norm", of, engine.batch_size)


def gradient_norm() -> GradientNorm:
    """The length of the gradient of the training example's loss at the final weights, the same for every query: how large, not whereto."""
    return GradientNorm()


def _same_for_all(request: Request, name: str, of: Callable[[Batch, Task], Tensor], batch_size: int) -> Parts:
    """One number for each training example of all stages, at the final weights, repeated in every row."""
    run, started = request.run, time.perf_counter()
    key = content_hash("column-1", name, run.weights_hash(run.checkpoints[-1]), run.architecture, [[s.fingerprint, task_identity(s.task)] for s in run.stages])
    job = Job(run.store, key, [(1, run.size)], torch.float64)
    bar = tqdm(total=run.size, unit=" examples", desc=name, leave=False, file=sys.stderr, disable=not request.progress, mininterval=0.5)

    def go() -> None:
        for stage in run.stages:
            if job.place[:2] > (0, stage.index):
                continue
            done = job.place[2] if job.place[:2] == (0, stage.index) else 0

            def process(batch: Batch, ids: np.ndarray, task: Task = stage.task, where: str = stage.name) -> Tensor:
                return _finite(of(batch, task), ids, name, where)

            for ids, found in stream(stage.data, np.arange(done, stage.size), process, batch_size=batch_size, device=run.device):
                job.add(0, slice(0, 1), stage.columns.start + ids, found.unsqueeze(0))
                job.reach(0, stage.index, int(ids[-1]) + 1)
                bar.update(len(ids))
            job.reach(0, stage.index + 1, 0)

    with bar:
        guarded(job, go)
    job.finish()
    rows = np.repeat(job.scores[0].numpy(), request.asked.count, axis=0)
    cost: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 3), "examples": run.size}
    return Parts({SCORES: rows}, name, RANK_ONLY, provenance_of(run, cost))


def _finite(found: Tensor, ids: np.ndarray, name: str, stage: str) -> Tensor:
    if not bool(torch.isfinite(found).all()):
        bad = ids[int((~torch.isfinite(found)).nonzero()[0])]
        raise NotFinite(f"a NaN or infinite {name} of training example {bad} of stage {stage!r}", "finite losses and gradients", "look at that example and its loss")
    return found
