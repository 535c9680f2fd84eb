"""TRAK as a method: features, kernel and weight of one model, and the rule by which several models are averaged."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater.errors import InputError
from headwater.influence.engine import Engine
from headwater.influence.methods import RANK_ONLY
from headwater.influence.request import Parts, Request
from headwater.influence.trak import exact
from headwater.influence.trak.features import Features, Outputs, numbers, pushes
from headwater.influence.trak.kernel import Ridge
from headwater.influence.trak.outputs import Given, check, describe
from headwater.influence.trak.projecting import Projector
from headwater.linalg.projections import Projection
from headwater.linalg.structured import KhatriRao
from headwater.report.numbers import duration
from headwater.store import content_hash

KERNEL, WEIGHT = "kernel", "weight"


@dataclass(frozen=True, repr=False)
class Trak:
    """TRAK: the model seen as linear in the gradients of its output, and one Newton step in a projected space (Park et al. 2023,
    arXiv 2303.14186).

    With f the output function of the training examples, ``Phi`` (train, k) its projected gradients and ``Phi_q`` those of the measure,

        score[q, i] = Phi_q (Phi^T Phi + r I)^-1 Phi_i^T  *  (-dL_i/df)

    at the final weights. Training on i moves the weights along ``-dL/df grad f``, so a positive score pushed the measurement up. The
    factors are kept apart: the *kernel* (queries, train) and the *weight* (train,), for classification ``1 - p_y``. Members of an ensemble
    average each and then multiply, ``mean(kernel) * mean(weight)``, as the paper does. Scores rank; they are in no unit.

    Args:
        dim: how many numbers a gradient is projected to; None: no projection, the kernel from inner products of whole gradients, exactly
            (for as many training examples as have a matrix of all pairs in ``memory``). A model with no more parameters than
            ``dim`` is not projected.
        projection: how it is projected, a value of ``hw.projections``; default: ``KhatriRao(dim)``.
        regularisation: r relative to the sum of the eigenvalues: ``r = regularisation * trace(Phi^T Phi)``. So it means the same for every
            scale of the gradients and every dimension, and leaves fewer than ``1 / regularisation`` effective directions.
        output: the output function ``(model, batch) -> (n,)`` of which an example's loss is a function, or a pair of it and its push
            ``-dL/df``; default: log-odds for Classification, the prediction for Regression with one output, the sum of the tokens'
            log-odds for Language. Other tasks need one. Query features are gradients of the *measure*, whatever that is.

    Every trained parameter counts. The training examples of all stages make one matrix, each under its own stage's output. Features
    are kept in the run's directory, so that other queries and regularisations cost no second pass.

    >>> Trak(dim=512)
    Trak(dim=512)
    >>> Trak(dim=512).member(3).projection
    KhatriRao(dim=512, seed=3, terms=1)
    """

    dim: int | None = None
    projection: Projection | None = None
    regularisation: float = 0.005
    output: Given | None = field(default=None)

    def __post_init__(self) -> None:
        if self.projection is not None and not isinstance(self.projection, Projection):
            raise InputError(f"projection={self.projection!r}", "a value of hw.projections", "hw.Trak(projection=hw.projections.Rademacher(2048))")
        if self.projection is not None and self.dim not in (None, self.projection.dim):
            raise InputError(f"dim={self.dim} and projection={self.projection!r}", "one dimension", "leave dim= out: the projection has it")
        if self.dim is not None:
            KhatriRao(self.dim)  # refuses what is no dimension
        if isinstance(self.regularisation, bool) or not isinstance(self.regularisation, int | float) or not 0 <= self.regularisation < float("inf"):
            raise InputError(f"regularisation={self.regularisation!r}", "a number of at least 0, relative to the sum of the eigenvalues", "leave it out for the default")
        check(self.output)

    def __repr__(self) -> str:
        given = [f"projection={self.projection!r}"] if self.projection is not None else [f"dim={self.dim}"] if self.dim is not None else []
        given += [f"regularisation={self.regularisation!r}"] if self.regularisation != type(self).regularisation else []
        return f"Trak({', '.join(given + ([f'output={describe(self.output)}'] if self.output is not None else []))})"

    @property
    def sketch(self) -> Projection | None:
        """The projection that is used; None for the exact kernel."""
        return KhatriRao(self.dim) if self.projection is None and self.dim is not None else self.projection

    def member(self, k: int) -> Trak:
        """The method as member k of an ensemble applies it: with a projection of its own (the seed ``k`` further); the exact kernel as it is."""
        own = self.sketch
        return self if own is None else replace(self, dim=None, projection=replace(own, seed=own.seed + k))

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise TaskError, by forward passes alone, where the run's tasks have no output that TRAK can take; InputError where the exact
        kernel of so many examples has no room."""
        Outputs.for_run(request.run, self.output).run_once(model)
        if self.sketch is None and trained > request.run.size:
            exact.check_room(request.run.size, request.memory)

    def parts(self, request: Request) -> Parts:
        """One model's kernel (queries, train) and weight (train,)."""
        found, facts = solved(Kernel(repr(self), self.sketch, self.regularisation), Outputs.for_run(request.run, self.output), request)
        kind = torch.empty(0, dtype=found.kernel.dtype).numpy().dtype
        arrays = {KERNEL: found.kernel.cpu().numpy(), WEIGHT: np.asarray(found.weight, dtype=kind)}
        return Parts(arrays, repr(self), RANK_ONLY, facts)

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """``mean(kernel) * mean(weight)``: scores (queries, train)."""
        kernel, weight = (np.mean([m[part] for m in members], axis=0) for part in (KERNEL, WEIGHT))
        return kernel * weight

    def weight(self, request: Request) -> np.ndarray:
        """One model's weight alone, ``-dL/df`` of each training example (train,): forward passes, no gradients."""
        outputs = Outputs.for_run(request.run, self.output)
        engine = Engine.of(request.run, request.batch_size)
        return pushes(engine, outputs)


@dataclass(frozen=True)
class Kernel:
    """TRAK's kernel as a method wants it: its name, how gradients are projected (None: not at all), and what is added to the diagonal."""

    name: str
    sketch: Projection | None
    regularisation: float

    def __repr__(self) -> str:
        return self.name


def solved(method: Kernel, outputs: Outputs, request: Request) -> tuple[Found, dict[str, Any]]:
    """The kernel of the measure that was asked about with the training examples' ``outputs``, and what to say of it in the provenance."""
    started = time.perf_counter()
    engine = Engine.of(request.run, request.batch_size)
    engine.load((request.run.checkpoints[-1],))
    outputs.prove(engine)
    found = _carried_out(method, engine, outputs, request)
    _warn_of_zeros(found.zero_rows, request.run.size, not found.projected.startswith("none"))
    facts = _facts(method, engine, found)
    facts["cost"] = {"seconds": round(time.perf_counter() - started, 3), "example_gradients": found.examples, "kept_bytes": found.kept}
    return found, facts


def _carried_out(method: Kernel, engine: Engine, outputs: Outputs, request: Request) -> Found:
    sketch, run = method.sketch, request.run
    projector = Projector(engine.capture.blocks, sketch, run.device, request.memory // 4)
    whole = projector.size <= (run.size if sketch is None else sketch.dim)  # features no larger than what would stand for them
    if whole:
        projector = replace(projector, projection=None)
    if sketch is None and not whole:
        exact.check_room(run.size, request.memory)
        return _by_inner_products(method, engine, outputs, request)
    return _by_features(method, Features(engine, outputs, projector), request)


def _facts(method: Kernel, engine: Engine, found: Found) -> dict[str, Any]:
    run = engine.run
    return {
        "run": str(run.path),
        "method": repr(method),
        "checkpoints": [run.checkpoints[-1]],
        "weights": run.weights_hash(run.checkpoints[-1]),
        "data": [stage.fingerprint for stage in run.stages],
        "coverage": engine.capture.coverage,
        "projection": found.projected,
        "projection_noise": None if method.sketch is None or found.projected.startswith("none") else round(method.sketch.noise, 4),
        "regularisation": {"relative": method.regularisation, "absolute": found.ridge.shift},
        "effective_dimension": round(found.ridge.effective_dimension, 2),
        "rank": found.ridge.rank,
        "zero_rows": found.zero_rows,
        "constant_columns": found.constant_columns,
    }


@dataclass(frozen=True, eq=False)
class Found:
    """What one model gives, and what is known about its features. ``leverage()``: of each training example, ``phi^T (Phi^T Phi + r I)^-1 phi``
    (train,), float64."""

    kernel: Tensor
    weight: np.ndarray
    ridge: Ridge
    projected: str
    zero_rows: int
    constant_columns: int | None
    examples: int
    kept: int
    leverage: Callable[[], Tensor]


def _by_features(method: Kernel, features: Features, request: Request) -> Found:
    """From features (train, k): by the (k, k) matrix of their products, or by the (train, train) one where that is smaller."""
    engine, dim, n = features.engine, features.projector.dim, request.run.size
    todo, name = features.missing(), f"{features.name} {content_hash(request.asked.identity)}"
    count = todo + (0 if name in request.shared else sum(len(examples) for examples in request.asked.examples))
    seen = _Seen(dim)
    with _told(method, engine, request, count, 8 * min(dim, n) ** 2 + 4 * dim * min(n, 2 * dim)):
        if name not in request.shared:
            request.shared[name] = features.of(request.asked).double()
        asked = request.shared[name]
        held = []
        total = torch.zeros(dim, dim, dtype=torch.float64, device=asked.device) if dim <= n else None
        weight = np.empty(n)
        for columns, found, push in features.each():
            seen.add(found)
            weight[columns] = push.double().numpy()
            if total is None:
                held.append(found)
            else:
                total.addmm_(found.double().mT, found.double())
    kernel = torch.empty(len(asked), n, dtype=numbers(engine), device=asked.device)
    if total is None:
        every = torch.cat(held).double()
        products = every @ every.mT
        ridge = Ridge.of(products, method.regularisation, seen.rounding)
        kernel.copy_(ridge.solve(every @ asked.mT).mT)
        leverage = partial(_dual_leverage, ridge, products)
    else:
        ridge = Ridge.of(total, method.regularisation, seen.rounding)
        through = ridge.solve(asked.mT).mT
        for columns, found, _ in features.each():
            kernel[:, columns] = (through @ found.double().mT).to(kernel.dtype)
        leverage = partial(_leverage, ridge, features)
    size = features.projector.size
    projected = f"none: {size:,} parameters" if features.projector.projection is None else f"{features.projector.projection!r} of {size:,} parameters"
    kept = sum(request.run.store.file(shard.name).stat().st_size for shard in features.shards)
    return Found(kernel, weight, ridge, projected, seen.zero_rows, seen.constant_columns, count, kept, leverage)


def _leverage(ridge: Ridge, features: Features) -> Tensor:
    """From the (k, k) matrix."""
    return torch.cat([(ridge.solve(found.mT) * found.double().mT).sum(0) for _, found, _ in features.each()])


def _dual_leverage(ridge: Ridge, products: Tensor) -> Tensor:
    """From the matrix K of all pairs: the diagonal of ``K (K + r I)^-1``."""
    return ridge.solve(products.double()).diagonal()


def _by_inner_products(method: Kernel, engine: Engine, outputs: Outputs, request: Request) -> Found:
    """From inner products of whole gradients."""
    run, size = request.run, sum(block.size for block in engine.capture.blocks.values())
    name = f"{exact.gram_name(outputs)} {content_hash(request.asked.identity)}"
    count = 0 if name in request.shared else exact.passes(engine, outputs, request.asked, request.memory)
    with _told(method, engine, request, count + run.size, exact.COPIES * run.size**2):
        if name not in request.shared:
            request.shared[name] = exact.cross(engine, outputs, request.asked, request.memory)
        cross = request.shared[name]
        weight = pushes(engine, outputs)
        matrix = exact.gram(engine, outputs, request.memory).to(run.device)
    zero = int((matrix.diagonal() == 0).sum())
    ridge = Ridge.of(matrix, method.regularisation, torch.finfo(matrix.dtype).eps)
    kernel = ridge.solve(cross.mT).mT.to(cross.dtype)
    kept = run.store.file(exact.gram_name(outputs)).stat().st_size
    leverage = partial(_dual_leverage, ridge, matrix)
    return Found(kernel, weight, ridge, f"none: inner products of {size:,} parameters", zero, None, count, kept, leverage)


class _Seen:
    """Features that say nothing: rows of zeros (examples without a gradient), and columns that are the same for all."""

    def __init__(self, dim: int) -> None:
        self.zero_rows = 0
        self.rounding = torch.finfo(torch.float64).eps
        self._low, self._high = torch.full((dim,), float("inf"), dtype=torch.float64), torch.full((dim,), float("-inf"), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        self.zero_rows += int((features == 0).all(1).sum())
        self.rounding = max(self.rounding, (16 * torch.finfo(features.dtype).eps) ** 2)  # of products of them
        low, high = (t.double().cpu() for t in torch.aminmax(features, dim=0))
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    @property
    def constant_columns(self) -> int:
        return int((self._low == self._high).sum())


def _warn_of_zeros(count: int, size: int, projected: bool) -> None:
    if count:
        why = "the output saturates there, or so small a projection lost them: another seed or a larger dim= would tell" if projected else "the output saturates there"
        gradients = "projected gradients that are" if projected else "outputs whose gradient is"
        warnings.warn(f"{count:,} of {size:,} training examples have {gradients} exactly zero, and scores of zero with every query: {why}", stacklevel=4)


@contextmanager
def _told(method: Kernel, engine: Engine, request: Request, count: int, memory: int) -> Iterator[None]:
    """A plan, then a bar over example gradients, on stderr."""
    run = request.run
    if request.progress:
        seconds = duration(count * engine.seconds_per_example)
        lines = (
            f"{method!r}: {request.asked.count:,} queries x {run.size:,} training examples, {sum(b.size for b in engine.capture.blocks.values()):,} parameters",
            f"{count:,} example gradients, about {seconds} by timed batches, before projecting; batches of {engine.batch_size}; about {memory / 2**20:,.0f} MB",
        )
        tqdm.write("\n".join("headwater: " + line for line in lines), file=sys.stderr)
    with tqdm(total=count, unit=" examples", desc="TRAK", leave=False, file=sys.stderr, disable=not request.progress, mininterval=0.5) as bar:
        engine.advance = bar.update
        try:
            yield
        except KeyboardInterrupt:
            if request.progress:
                tqdm.write("headwater: stopped; what was computed is kept, and the same call continues there", file=sys.stderr)
            raise
        finally:
            engine.advance = lambda n: None

