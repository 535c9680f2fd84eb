"""A run made ready for scoring: weights by checkpoint, per-example gradients, and curvature as the optimizer met it, each built once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.capture import Capture
from headwater.capture.stream import stream
from headwater.curvature import Blockwise, Curvature, GaussNewton, Point, Setting
from headwater.curvature.estimate import VectorFlow, even_sample
from headwater.errors import NotFinite
from headwater.influence.methods import Fit, Pace, Row, Weights, total_rate
from headwater.influence.refine import Note, RefinedFlow
from headwater.influence.timing import seconds_of
from headwater.linalg import Diagonal
from headwater.store import content_hash
from headwater.tasks import Examples
from headwater.tasks.batches import Batch, to
from headwater.tasks.code import task_identity
from headwater.training import Run
from headwater.training.adapters import refuse_untrained

CACHE = 2**30  # bytes of checkpoints kept in memory


@dataclass
class Engine:
    """See the module's docstring. ``advance(n)`` is called as examples are processed; ``say`` with one line before long work."""

    run: Run
    model: nn.Module
    capture: Capture
    batch_size: int
    advance: Callable[[int], None] = lambda n: None
    _states: dict[tuple[Weights, bool], dict[str, Tensor]] = field(default_factory=dict)
    _curvatures: dict[Fit, Curvature] = field(default_factory=dict)
    _flows: dict[tuple[Fit | None, Pace | None, int], VectorFlow] = field(default_factory=dict)
    notes: dict[Row, list[Note]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, run: Run, batch_size: int | None) -> Engine:
        """Build the model, load the final weights, and prove per-example gradients on each stage's first two examples."""
        model = run.model()
        model.load_state_dict(_finite(run.weights(run.checkpoints[-1]), run.checkpoints[-1]), strict=False)
        refuse_untrained(model, f"at the final weights of {run.path}")
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        trained = tuple(n for n in names if any(n in stage.trainable for stage in run.stages))
        group = {n: tuple(_group(stage, n) for stage in run.stages) for n in trained}
        capture = None
        for stage in run.stages:
            probe = to(stage.data.batch(range(min(2, len(stage.data)))), run.device)
            if capture is None:
                capture = Capture(model, stage.task.loss, probe, trained, group_of=group.__getitem__)
            else:
                capture.prove(stage.task.loss, probe)
        assert capture is not None
        capture.at_once = batch_size or _batch_size(capture)
        return cls(run, model, capture, capture.at_once)

    def load(self, weights: Weights, averaged: bool = False) -> None:
        """Put the (mean) weights of these steps into the model; ``averaged``: their moving average."""
        place = weights, averaged
        if place not in self._states:
            state = _mean_state([_finite(self.run.weights(step, averaged), step) for step in weights])
            held = sum(t.numel() * t.element_size() for s in self._states.values() for t in s.values())
            if held > CACHE:
                self._states.clear()
            self._states[place] = {n: t.to(self.run.device) for n, t in state.items()}
        self.model.load_state_dict(self._states[place], strict=False)

    def data(self, stage: int, events: Any = None) -> Examples:
        """A stage's examples, seen through other noise events where a row asks for them."""
        data = self.run.stages[stage].data
        return data if events is None else data.over(events)

    def curvature(self, fit: Fit) -> Curvature:
        """The estimate, from memory, from the run's store (keyed by weights, data and settings), or made now and stored."""
        if fit in self._curvatures:
            return self._curvatures[fit]
        store, name = self.run.store, self._name(fit)
        if self.holds(fit):
            tensors = {k: t.to(self.run.device) for k, t in store.read(name).items()}
            self._curvatures[fit] = fit.estimate.rebuild(tensors, self.capture)
        else:
            points = [self._point(stage, weights) for stage, weights in fit.at]
            setting = Setting(self.capture, self.batch_size, self.run.device, self.advance)
            self._curvatures[fit] = fit.estimate.fit(points, setting)
            store.write(name, {k: t.detach().cpu().contiguous() for k, t in fit.estimate.tensors(self._curvatures[fit]).items()}, {"estimate": repr(fit.estimate)})
        return self._curvatures[fit]

    def holds(self, fit: Fit) -> bool:
        """Whether :meth:`curvature` finds the estimate made."""
        return fit in self._curvatures or self.run.store.has(self._name(fit))

    @cached_property
    def seconds_per_example(self) -> float:
        """How long the gradient of one row that the model sees takes, from warm batches of up to 32 (compared with nothing: a lower bound)."""
        stage = self.run.stages[0]
        each = stage.data.rows_per_example
        count = max(1, min(self.batch_size // each, 32, stage.size))

        def process(batch: Batch, _: np.ndarray) -> float:
            return sum(float(g.square_norms().sum()) for g in self.capture.gradients(stage.task.loss, batch).values())

        def batch() -> None:
            for _ in stream(stage.data, range(count), process, batch_size=count * each, device=self.run.device):
                pass

        return seconds_of(batch) / count / each

    def cost(self, fit: Fit) -> int:
        """Examples that pass through the model to make a curvature."""
        limit = getattr(fit.estimate, "examples", None)
        sizes = [len(self.run.stages[stage].data.spread()) for stage, _ in fit.at]
        return fit.estimate.passes * sum(min(limit or size, size) for size in sizes)

    def _point(self, stage: int, weights: Weights) -> Point:
        record = self.run.stages[stage]
        return Point(lambda: self.load(weights), record.data.spread(), record.task, f"{stage}@{weights}")

    def _name(self, fit: Fit) -> str:
        return "factors/" + self._key(fit)

    def _key(self, fit: Fit) -> str:
        at = [[stage, [self.run.weights_hash(step) for step in weights]] for stage, weights in fit.at]
        data = [[s.fingerprint, task_identity(s.task)] for s in self.run.stages]
        layout = [[n, list(b.shape), list(b.parameters)] for n, b in self.capture.blocks.items()]
        return content_hash("factors-1", at, self.run.architecture, data, layout, repr(fit.estimate), type(fit.estimate).__module__)

    def flow(self, row: Row) -> VectorFlow:
        """A row's curvature as the optimizer of its stage met it: preconditioned, with weight decay."""
        key = (row.curvature, row.pace, row.stage)
        if key not in self._flows:
            if row.curvature is None:
                zero = torch.zeros((), dtype=torch.float64, device=self.run.device)  # the response of it is exact in any dtype
                curvature: Curvature = Blockwise({name: Diagonal(zero) for name in self.capture.blocks})
            else:
                curvature = self.curvature(row.curvature)
            decay, decoupled = self._decays(row)
            self._flows[key] = curvature.flow(self._gains(row.pace), decay, decoupled)
        return self._flows[key]

    def refined(self, row: Row) -> RefinedFlow:
        """As :meth:`flow`, of the curvature itself: known by its products, begun from and preconditioned by the estimate."""
        assert row.curvature is not None and row.refine is not None
        shapes = {name: block.shape for name, block in self.capture.blocks.items()}
        like = next(self.model.parameters())

        def flat(values: dict[str, Any]) -> Tensor:
            parts = [torch.as_tensor(values[n], device=self.run.device).to(like.dtype).expand(s).reshape(-1) for n, s in shapes.items()]
            return torch.cat(parts)

        decay, decoupled = self._decays(row)
        estimate = row.curvature.estimate
        points = tuple(self._point(stage, weights) for stage, weights in row.curvature.at)
        setting = Setting(self.capture, self.batch_size, self.run.device, self.advance)
        product = GaussNewton(points, setting, getattr(estimate, "fisher", "auto"), getattr(estimate, "seed", 0), row.refine.examples)
        key = content_hash(self._key(row.curvature), repr(row), self.batch_size)
        diagonal = flat(self._gains(row.pace)), flat(decay), flat(decoupled)
        return RefinedFlow(lambda: self.flow(row), product, shapes, *diagonal, row.refine, key, self.run.store, self.notes.setdefault(row, []), self.kept)

    def refining(self, row: Row) -> int:
        """Examples that pass through the model to refine one query's vector in this row: at most."""
        if row.refine is None or row.curvature is None:
            return 0
        return row.refine.steps * sum(len(even_sample(len(self.run.stages[stage].data.spread()), row.refine.examples)) for stage, _ in row.curvature.at)

    def forget(self) -> None:
        """The scores are handed out: refined products that were kept for resuming have done their duty."""
        for name in self.kept:
            if self.run.store.has(name):
                self.run.store.delete(name)
        self.kept.clear()

    def _share(self, pace: Pace | None) -> dict[str, float]:
        """Each block's summed learning rate relative to the largest: 1 everywhere for one learning rate, 0 where nothing moved."""
        if pace is None:
            return dict.fromkeys(self.capture.blocks, 1.0)
        rates, total = self.run.rates(pace.start, pace.stop), total_rate(self.run, pace)
        return {name: rates.get(block.parameters[0], 0.0) / total for name, block in self.capture.blocks.items()}

    def _gains(self, pace: Pace | None) -> dict[str, Tensor | float]:
        gains: dict[str, Tensor | float] = dict(self._share(pace))
        if pace is None or not pace.moments:
            return gains
        stage = next(s for s in self.run.stages if s.start < pace.moments[-1] <= s.stop)
        moments = [self.run.second_moments(step) for step in pace.moments]
        shapes = {n: p.shape for n, p in self.model.named_parameters(remove_duplicate=False)}
        for name, block in self.capture.blocks.items():
            if gains[name]:
                inverse = {n: _preconditioner(n, moments, shapes[n], _epsilon(stage, n)).to(self.run.device) for n in block.parameters}
                gains[name] = float(gains[name]) * block.pack(inverse)
        return gains

    def _decays(self, row: Row) -> tuple[dict[str, float], dict[str, float]]:
        """Weight decay of each block: as part of the objective's Hessian, and decoupled (AdamW, in units of the row's time)."""
        decay, decoupled = dict.fromkeys(self.capture.blocks, 0.0), dict.fromkeys(self.capture.blocks, 0.0)
        if row.curvature is None:
            return decay, decoupled
        stage, share = self.run.stages[row.stage], self._share(row.pace)
        found = self.run.decays(row.pace.start, row.pace.stop) if row.pace is not None else self.run.decays(stage.start, stage.stop)
        for name, block in self.capture.blocks.items():
            group = stage.optimizer.group_of(block.parameters[0]) if block.parameters[0] in stage.trainable else None
            if group is not None and group.decoupled:
                decoupled[name] = found.get(block.parameters[0], 0.0) * share[name] if row.pace is not None and row.pace.moments else 0.0
            elif group is not None:
                decay[name] = found.get(block.parameters[0], 0.0)
        return decay, decoupled


def _group(stage: Any, name: str) -> tuple[Any, ...]:
    """What must agree for two parameters to share a block: the optimizer group, or not being trained."""
    if name not in stage.trainable:
        return (None,)
    return (stage.optimizer.groups.index(stage.optimizer.group_of(name)),)


def _epsilon(stage: Any, name: str) -> float:
    return float(stage.optimizer.group_of(name).eps)


def _preconditioner(name: str, moments: list[dict[str, Tensor]], shape: torch.Size, eps: float) -> Tensor:
    """Adam's ``1 / (sqrt(v) + eps)`` with v averaged over checkpoints; a parameter without moments never moved: 0."""
    found = [m[name] for m in moments if name in m]
    if not found:
        return torch.zeros(shape)
    return 1.0 / (torch.stack([v.double() for v in found]).mean(0).sqrt() + eps).to(found[0].dtype)


def _finite(state: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The state, if training had not diverged by then."""
    bad = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise NotFinite(f"NaN or infinite values in {bad[0]!r} at step {step}", "finite weights", "trace the run up to an earlier checkpoint: training diverged")
    return state


def _mean_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of weights (and running statistics); whole numbers are taken from the last."""
    if len(states) == 1:
        return states[0]
    last = states[-1]
    return {n: torch.stack([s[n] for s in states]).mean(0) if t.is_floating_point() else t for n, t in last.items()}


def _batch_size(capture: Capture) -> int:
    """So many examples that activations and per-example gradients stay near a quarter gigabyte, at most 512."""
    return int(max(1, min(512, 2**28 // max(1, capture.bytes_per_example))))
