"""Playing moves again: the gradient of a step as it was computed then, the state after it, and the graph that a derivative needs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import NotFinite
from headwater.tasks import Task
from headwater.tasks.batches import Batch, to
from headwater.tasks.diffusion import Noised
from headwater.training.experiment import settled
from headwater.training.replay.clipping import Clipping
from headwater.training.replay.norms import tracked, written_out
from headwater.training.replay.script import Move, Part, Script
from headwater.training.replay.state import State
from headwater.training.replay.updates import Bundle, Moments, Rule, Sgd, bundles
from headwater.training.run import Run, Stage
from headwater.training.watching import norms_of_each

Terms = Callable[[Task, nn.Module, Batch], Tensor]
"""(task, model, batch) -> (n, terms): the parts of each example's loss that are weighted apart."""


@dataclass(frozen=True, eq=False)
class Gradient:
    """Of one step. ``values``: of each trained parameter that took part, clipped; ``buffers``: after its forward passes; ``loss``: of the
    batch as the loop reduced it (with all weights 1, whatever they were); ``clip``: what the gradient was multiplied with."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
    loss: float
    clip: float

    @property
    def norm(self) -> float:
        """Of all of it together."""
        found = norms_of_each(list(self.values.values()))
        return float(torch.linalg.vector_norm(torch.stack(found), dtype=torch.float64)) if found else 0.0


@dataclass(frozen=True, eq=False)
class Graph:
    """A part's gradient as a differentiable function of what comes first in the step.

    ``gradients``: of the trained parameters that took part; ``terms`` (n, terms); ``weights``: of these, all 1; ``leaves``: the
    parameters; ``before`` and ``after``: running statistics that the pass read and wrote; ``buffers``: all, after it.
    """

    gradients: dict[str, Tensor]
    terms: Tensor
    weights: Tensor
    leaves: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Player:
    """Plays the moves of a :class:`Script`. Between calls only the model remembers what was placed in it."""

    def __init__(self, run: Run, script: Script) -> None:
        self.run, self.script, self.device = run, script, run.device
        self.model = run.load(run.model(), 0)
        self.names = [n for n, _ in self.model.named_parameters() if any(n in stage.trainable for stage in run.stages)]
        self.norms = tracked(self.model)
        self._mode: frozenset[str] | bool | None = False
        self._modules = dict(self.model.named_modules())
        self._parameters = {n: p for n, p in self.model.named_parameters() if n in self.names}
        names = {id(p): n for n, p in self._parameters.items()}
        self._uses = [(m, leaf, names[id(p)]) for m in self._modules.values() for leaf, p in m._parameters.items() if id(p) in names]
        self._homes = {n: (self._modules[n.rpartition(".")[0]], n.rpartition(".")[2]) for n, _ in self.model.named_buffers()}
        self.idle: dict[int, frozenset[str]] = {}  # parameters that took no part in a step, of the steps played so far

    # -- states ----------------------------------------------------------------------------------------------------------------

    def start(self) -> State:
        """Before training."""
        return self.at(0)

    def at(self, step: int) -> State:
        """The weights and buffers of a recorded checkpoint, with an optimizer that remembers nothing."""
        held = {n: t.to(self.device) for n, t in self.run.weights(step).items()}
        buffers = {n for n, _ in self.model.named_buffers()}
        return State(step, {n: held[n] for n in self.names}, {n: t for n, t in held.items() if n in buffers})

    def begin(self, state: State, move: Move) -> State:
        """The state that a move begins with: at the start of a stage its optimizer is a new one (or remembers what was recorded)."""
        if not move.begins:
            return state
        moments: dict[str, dict[str, Tensor]] = {}
        counts: dict[str, int] = {}
        for path, tensor in self.script.remembered(move.stage).items():
            key, _, name = path.partition("/")
            if key == "step":
                counts[name] = int(tensor)
            else:
                moments.setdefault(name, {})[key] = tensor.to(self.device)
                counts.setdefault(name, 1)
        return State(state.step, state.weights, state.buffers, moments, counts)

    def step(self, state: State, move: Move, gradient: Gradient) -> State:
        """The state after a move (``state``: as :meth:`begin` gives it)."""
        weights, moments, counts = dict(state.weights), dict(state.moments), dict(state.counts)
        for rule, count, bundle in self.bundles(state, move, gradient.values) if move.moved else ():
            held = self.held(state, rule, bundle)
            after, new = rule.forward(bundle.join(state.weights), held, count, bundle.join(gradient.values))
            weights.update(bundle.split(after))
            if not isinstance(rule, Sgd) or rule.momentum:
                counts.update(dict.fromkeys(bundle.shapes, count))
                split = {key: bundle.split(t) for key, t in new.items()}
                moments.update({n: {key: found[n] for key, found in split.items()} for n in bundle.shapes})
        return State(move.step, weights, gradient.buffers, moments, counts)

    def bundles(self, state: State, move: Move, names: Iterable[str]) -> Iterator[tuple[Rule, int, Bundle]]:
        """The parameters of a move by their rule and the number of this step for them (from 1)."""
        rules = {n: rule for rule, group in zip(move.rules, move.stage.optimizer.groups, strict=True) for n in group.names}
        for bundle in bundles(names, lambda n: (rules[n], state.counts.get(n, 0)), state.weights):
            first = next(iter(bundle.shapes))
            yield rules[first], state.counts.get(first, 0) + 1, bundle

    def held(self, state: State, rule: Rule, bundle: Bundle) -> Moments:
        """What the optimizer remembers of a bundle; nothing yet where it never moved it."""
        first = next(iter(bundle.shapes))
        if first not in state.moments:
            return rule.empty(bundle.join(state.weights))
        return {key: bundle.join({n: state.moments[n][key] for n in bundle.shapes}) for key in state.moments[first]}

    # -- gradients -------------------------------------------------------------------------------------------------------------

    def gradient(self, state: State, move: Move, weights: Tensor | None = None, terms: Terms | None = None, clipping: Clipping | None = None) -> Gradient:
        """The gradient of a step as it was computed then.

        ``weights`` (n, or n x terms): of the examples of the batch (default: all 1, computed as the loop did). ``clipping``: clip anew by
        this bound (default: the recorded factor).
        Raises NotFinite where the loss is not.
        """
        total: dict[str, Tensor] = {}
        buffers, loss = state.buffers, 0.0
        for part in move.parts:
            passed = {n: t.clone() for n, t in buffers.items()}
            wanted = self.place(state.weights, passed, move.stage.trainable)
            with self._setting(move, part):
                found = self.call(move.stage, self.batch(move, part), terms)
                reduced = _reduced(found, move, part, None if weights is None else weights[part.start : part.stop])
                gradients = torch.autograd.grad(reduced, list(wanted.values()), allow_unused=True) if reduced.requires_grad else [None] * len(wanted)
            for n, g in zip(wanted, gradients, strict=True):
                if g is not None:
                    g = g.to_dense() if g.is_sparse else g
                    total[n] = total[n] + g if n in total else g
            buffers = _shared(passed, buffers)
            plain = reduced if weights is None else _reduced(found, move, part, None)
            loss += float(plain.detach())
        self._note(move, total, loss)
        clip = move.clip if clipping is None else clipping.factor(total)
        clipped = {n: g.mul(clip) for n, g in total.items()} if clip != 1.0 else total
        return Gradient(clipped, buffers, loss, clip)

    def _note(self, move: Move, total: Mapping[str, Tensor], loss: float) -> None:
        """Which parameters took no part. Raises NotFinite."""
        self.idle[move.step] = frozenset(move.stage.trainable - total.keys())
        if not np.isfinite(loss) and move.moved:
            raise NotFinite(f"a loss of {loss} at step {move.step}", "finite losses", "replay a training that did not diverge")

    def batch(self, move: Move, part: Part) -> Batch:
        """The examples of a part, on the device; of a diffusion model with the noise events that they were met with."""
        ids, data = move.ids[part.start : part.stop], move.stage.data
        if isinstance(data, Noised):
            events = self.run.events_of(move.step)[part.start : part.stop]
            return data.met(ids, events["t"], events["seed"], self.device)
        return to(data.batch(ids), self.device)

    def place(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
        """Put weights and buffers into the model; of its parameters those in ``wanted``, which now require gradients (the others do not).
        Buffers are the given tensors themselves, so a pass in training mode writes to them."""
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]
            parameter.requires_grad_(name in wanted)
        for name, tensor in buffers.items():
            module, leaf = self._homes[name]
            module._buffers[leaf] = tensor
        return {n: p for n, p in self._parameters.items() if p.requires_grad}

    def call(self, stage: Stage, batch: Batch, terms: Terms | None = None) -> Tensor:
        """The task's losses (n,) of a batch, or their terms (n, terms), under the placed weights and buffers."""
        return stage.task.loss(self.model, batch) if terms is None else terms(stage.task, self.model, batch)

    # -- graphs ----------------------------------------------------------------------------------------------------------------

    def graph(self, state: State, move: Move, part: Part, terms: Terms | None = None, lasting: bool = False) -> Graph:
        """A part's contribution to the step's gradient, not clipped yet, with its graph. ``lasting``: its leaves are tensors of its own, not
        the model's parameters, so that it outlives the next placing."""
        buffers = {n: t.clone() for n, t in state.buffers.items()}
        statistics = self.statistics if self.trains_norms(part) else ()
        for n in statistics:
            buffers[n].requires_grad_()
        leaves = self.place(state.weights, buffers, state.weights)
        own, written = self._lasting(state.weights if lasting else None), written_out(self.model, bool(statistics))
        with own as lasting_leaves, self._setting(move, part), twice_differentiable(), written as after:
            leaves = lasting_leaves or leaves
            found = self.call(move.stage, self.batch(move, part), terms)
            found = found if found.ndim == 2 else found.unsqueeze(1)
            weights = torch.ones_like(found, requires_grad=True)
            total = (weights * found).sum() * move.scale
            names = [n for n in leaves if n in move.stage.trainable]
            gradients = torch.autograd.grad(total, [leaves[n] for n in names], create_graph=True, allow_unused=True)
        held = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        return Graph(held, found, weights, leaves, {n: buffers[n] for n in statistics}, dict(after), buffers)

    def gradient_of(self, graph: Graph, state: State, move: Move) -> Gradient:
        """What :meth:`gradient` returns, from the graph of a step's only part."""
        values = {n: g.detach() for n, g in graph.gradients.items()}
        losses = graph.terms.detach()
        loss = float(_reduced(losses.squeeze(1) if losses.shape[1] == 1 else losses, move, move.parts[0], None))
        self._note(move, values, loss)
        clipped = {n: g.mul(move.clip) for n, g in values.items()} if move.clip != 1.0 else values
        return Gradient(clipped, _shared(graph.buffers, state.buffers), loss, move.clip)

    @contextmanager
    def _lasting(self, weights: Mapping[str, Tensor] | None) -> Iterator[dict[str, Tensor]]:
        """Within it the model's parameters are new leaves, which it yields; nothing changes where there are no ``weights``."""
        own = {} if weights is None else {n: weights[n].detach().requires_grad_() for n in self._parameters}
        try:
            for module, leaf, name in self._uses if own else ():
                module._parameters[leaf] = own[name]
            yield own
        finally:
            for module, leaf, name in self._uses if own else ():
                module._parameters[leaf] = self._parameters[name]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The names of BatchNorm's running statistics."""
        return tuple(f"{name}.{kind}" for name in self.norms for kind in ("running_mean", "running_var"))

    def trains_norms(self, part: Part) -> bool:
        """Whether some BatchNorm took the batch's statistics in this pass."""
        return any(part.mode is None or name in part.mode for name in self.norms)

    # -- settings --------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _setting(self, move: Move, part: Part) -> Iterator[None]:
        """Mode, autocast and random numbers as they were; gradients on."""
        self.set_mode(part.mode)
        if part.random is not None:
            cpu, cuda = self.script.random(part.random)
            torch.set_rng_state(cpu)
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.device)
        with torch.enable_grad(), torch.autocast(part.cast[0], getattr(torch, part.cast[1])) if part.cast else nullcontext():
            yield

    def set_mode(self, mode: frozenset[str] | None) -> None:
        """Put the named modules in training mode, the others in eval mode (None: all in training mode)."""
        if mode != self._mode:
            for name, module in self._modules.items():
                module.training = mode is None or name in mode
            self._mode = mode


def _shared(passed: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers after a pass, those that it did not change being the tensors from before it."""
    return {n: before[n] if torch.equal(t, before[n]) else t for n, t in passed.items()}


def _reduced(found: Tensor, move: Move, part: Part, weights: Tensor | None) -> Tensor:
    """One number of the losses (n,), or terms (n, terms), of a part, as the loop made it."""
    if weights is not None:
        return (weights.to(found) * found).sum() * move.scale
    losses = found if found.ndim == 1 else found.sum(1)
    if move.stage.reduction == "sum":
        return losses.sum()
    return losses.mean() if len(losses) == len(move.ids) else losses.mean() * (len(losses) / len(move.ids))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Kernels that can be differentiated twice: the plain attention (fused ones cannot), and recurrent layers without cuDNN."""
    # the flags themselves: torch's own context manager for them costs as much as a small network's forward pass
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    were = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds]
    try:
        for kind in kinds:
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(kind == "math")
        with torch.backends.cudnn.flags(enabled=False) if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        for kind, was in zip(kinds, were, strict=True):
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(was)


@contextmanager
def as_recorded(run: Run) -> Iterator[None]:
    """The number of threads of the recording; every generator is put back afterwards."""
    machine: dict[str, Any] = run.manifest.get("replay", {}).get("machine", {})
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), settled(0, machine.get("threads")):
        yield
