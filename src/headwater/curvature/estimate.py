"""Estimating a curvature from a task and data: what every estimate shares.

An estimate is asked for the Gauss-Newton matrix of the mean loss over some *sources*: pairs of a dataset with its task and a set of
weights. Averaging over the checkpoints of a segment, and over the stages of a run, is averaging over sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from headwater.capture import Capture, Gradients
from headwater.errors import InputError
from headwater.linalg import Apply, Dense, Operator, Response
from headwater.tasks import Draws, Examples, Task
from headwater.tasks.batches import Batch, leaves, size
from headwater.tasks.task import MAX_EXACT_OUTPUTS

Vectors = dict[str, Tensor]
"""One tensor (queries, *shape) for each block."""


@dataclass(frozen=True)
class Point:
    """Where curvature is taken: ``load()`` puts the weights into the capture's model; ``examples`` under ``task``."""

    load: Callable[[], None]
    examples: Examples
    task: Task
    identity: str


@dataclass(frozen=True)
class Setting:
    """What an estimate needs besides its sources."""

    capture: Capture
    batch_size: int
    device: torch.device
    advance: Callable[[int], None] = lambda n: None  # progress: called with the number of examples done


class Estimate(Protocol):
    """A way to estimate curvature: a frozen record of settings. ``passes``: passes over the data per source."""

    @property
    def passes(self) -> int: ...

    def fit(self, sources: list[Point], setting: Setting) -> Curvature: ...

    def tensors(self, curvature: Curvature) -> dict[str, Tensor]: ...

    def rebuild(self, tensors: dict[str, Tensor], capture: Capture) -> Curvature: ...


class Curvature(Protocol):
    """Curvature of all blocks. ``flow``: as :meth:`headwater.linalg.Operator.flow` for all of them, one value a block."""

    def flow(self, gain: dict[str, Tensor | float], decay: dict[str, float], decoupled: dict[str, float]) -> VectorFlow: ...


class VectorFlow(Protocol):
    def respond(self, phi: Response) -> Callable[[Vectors], Vectors]: ...

    def carry(self, psi: Response) -> Callable[[Vectors], Vectors]: ...

    def symmetric(self, f: Response) -> Callable[[Vectors], Vectors]:
        """``f(M)`` itself, on vectors in the coordinates ``P^1/2 u`` in which M is symmetric."""
        ...


@dataclass(frozen=True)
class Blockwise:
    """Curvature without terms between blocks: one operator for each."""

    operators: dict[str, Operator]

    def flow(self, gain: dict[str, Tensor | float], decay: dict[str, float], decoupled: dict[str, float]) -> BlockwiseFlow:
        return BlockwiseFlow({n: op.flow(gain[n], decay[n], decoupled[n]) for n, op in self.operators.items()})


@dataclass(frozen=True)
class BlockwiseFlow:
    flows: dict[str, Any]

    def _each(self, applies: dict[str, Apply]) -> Callable[[Vectors], Vectors]:
        return lambda vectors: {n: applies[n](v) for n, v in vectors.items()}

    def respond(self, phi: Response) -> Callable[[Vectors], Vectors]:
        return self._each({n: f.respond(phi) for n, f in self.flows.items()})

    def carry(self, psi: Response) -> Callable[[Vectors], Vectors]:
        return self._each({n: f.carry(psi) for n, f in self.flows.items()})

    def symmetric(self, f: Response) -> Callable[[Vectors], Vectors]:
        return self._each({n: flow.matrix.map(f) for n, flow in self.flows.items()})


@dataclass(frozen=True)
class Joint:
    """One dense operator over all blocks together, flattened in order; ``shapes`` says which block is where."""

    operator: Dense
    shapes: dict[str, tuple[int, ...]]

    def _stack(self, values: dict[str, Tensor | float]) -> Tensor | float:
        """One value per block as one per parameter; a number where all agree and nothing varies."""
        if all(isinstance(v, float | int) for v in values.values()) and len(set(values.values())) == 1:
            return next(iter(values.values()))
        like = self.operator.basis
        parts = [torch.as_tensor(values[n], dtype=like.dtype, device=like.device).expand(s).reshape(-1) for n, s in self.shapes.items()]
        return torch.cat(parts)

    def flow(self, gain: dict[str, Tensor | float], decay: dict[str, float], decoupled: dict[str, float]) -> JointFlow:
        flow = self.operator.flow(self._stack(gain), self._stack(decay), self._stack(decoupled))  # type: ignore[arg-type]
        return JointFlow(flow, self.shapes)


@dataclass(frozen=True)
class JointFlow:
    inner: Any
    shapes: dict[str, tuple[int, ...]]

    def _through(self, apply: Apply) -> Callable[[Vectors], Vectors]:
        def run(vectors: Vectors) -> Vectors:
            flat = apply(flatten(vectors, self.shapes))
            parts = flat.split([torch.Size(s).numel() for s in self.shapes.values()], 1)
            return {n: part.reshape(len(flat), *s) for part, (n, s) in zip(parts, self.shapes.items(), strict=True)}

        return run

    def respond(self, phi: Response) -> Callable[[Vectors], Vectors]:
        return self._through(self.inner.respond(phi))

    def carry(self, psi: Response) -> Callable[[Vectors], Vectors]:
        return self._through(self.inner.carry(psi))

    def symmetric(self, f: Response) -> Callable[[Vectors], Vectors]:
        return self._through(self.inner.matrix.map(f))


def flatten(vectors: Vectors, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """Vectors of blocks as one matrix (queries, parameters)."""
    return torch.cat([vectors[n].flatten(1) for n in shapes], 1)


FISHERS = ("auto", "sampled", "exact", "empirical")


def check_fisher(fisher: str) -> str:
    if fisher not in FISHERS:
        raise InputError(f"fisher={fisher!r}", f"one of {FISHERS}", "see hw.EKFAC")
    return fisher


def resolve_fisher(fisher: str, task: Task, model: nn.Module, batch: Batch) -> str:
    """What "auto" stands for: exact where the task knows its outputs and they are few, else sampled labels."""
    if fisher != "auto":
        return fisher
    outputs = task.outputs(model, batch)
    return "exact" if outputs is not None and outputs <= MAX_EXACT_OUTPUTS else "sampled"


def prove_fisher(fisher: str, task: Task, model: nn.Module, batch: Batch) -> None:
    """Raise TaskError, by a forward pass, where a task has nothing to draw labels with, or does not know its outputs, and ``fisher`` needs it."""
    kind = resolve_fisher(fisher, task, model, batch)
    with torch.no_grad():
        if kind == "exact":
            task.exact(model, batch)
        elif kind == "sampled":
            count = size(batch)
            task.sampled(model, batch, Draws(0, np.arange(count), next(leaves(batch)).device))


def pseudo_gradients(setting: Setting, source: Point, fisher: str, seed: int, batch: Batch, ids: np.ndarray) -> Iterator[Gradients]:
    """Per-example gradients whose summed outer products estimate the Gauss-Newton matrix of each example's loss."""
    task = source.task
    if fisher == "exact":
        return setting.capture.each(task.exact, batch)
    if fisher == "empirical":
        return setting.capture.each(task.loss, batch)
    draws = Draws(seed, ids, setting.device)

    def sampled(model: nn.Module, placed: tuple[Batch, Tensor]) -> Tensor:
        batch, positions = placed  # however often and in whatever parts it is run, an example meets the same draws
        return task.sampled(model, batch, draws.at(positions))

    return setting.capture.each(sampled, (batch, torch.arange(len(ids), device=setting.device)), key=("sampled", task))


def check_examples(examples: int | None) -> int | None:
    if examples is not None and examples < 1:
        raise InputError(f"examples={examples}", "at least one example, or None for all", "see hw.EKFAC")
    return examples


def even_sample(n: int, count: int | None) -> np.ndarray:
    """All ids below n, or ``count`` evenly spaced ones."""
    return np.arange(n) if count is None or count >= n else np.linspace(0, n - 1, count).round().astype(int)
