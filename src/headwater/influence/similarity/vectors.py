"""One vector for each example: what a layer of the model makes of it, or the example's own numbers.

A layer is read while a function ``ask(model, batch)`` runs (a task's loss, or the measure of a question), because only that function
knows how the model is called. The task says where in a batch its labels are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from headwater.errors import InputError, NotFinite
from headwater.tasks import Language, Measure, Task
from headwater.tasks.batches import Batch, leaves, size, to
from headwater.tasks.code import code_digest
from headwater.tasks.diffusion import Diffusion, Drawn
from headwater.tasks.diffusion.events import image_of
from headwater.tasks.task import at_least_float32, fields_of, split
from headwater.training import Run

POSITIONS = ("mean", "last", "all")
INPUT = "input"
_SHOWN = 40  # names of layers that an error lists
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


class Vectors(Protocol):
    """``where`` says in words what the vectors are; ``of(batch, task, ask)`` gives them, (n, d) in at least float32."""

    @property
    def where(self) -> str: ...

    def of(self, batch: Batch, task: Task, ask: Measure) -> Tensor: ...


def vectors_of(run: Run, layer: str | None, positions: str, model: nn.Module | None = None) -> Vectors:
    """The vectors that ``layer=`` names: None for the input of the last linear layer, "input" for the examples themselves, else a module's
    name. Raises InputError, listing the layers, where there is no such module. ``model``: the run's, where it is at hand."""
    if layer == INPUT:
        return Inputs()
    model = run.load(run.model(), run.checkpoints[-1]) if model is None else model
    if layer is None:
        name = _last_linear(model, run)
        return Layer(model, name, positions, entering=True)
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise _no_layer(f"layer={layer!r}", model, layer)
    return Layer(model, layer, positions, entering=False)


def prove_vectors(run: Run, layer: str | None, positions: str, model: nn.Module) -> None:
    """Raise InputError where examples have no such vectors: by one example of each stage."""
    vectors = vectors_of(run, layer, positions, model)
    for stage in run.stages:
        vectors.of(to(stage.data.batch(range(1)), run.device), stage.task, stage.task.loss)


# --------------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class Layer:
    """What leaves the module ``name`` at the model's present weights (what enters it, with ``entering``), one vector for each example.

    ``positions``: what becomes of further axes. "mean": the mean over the positions of a sequence (those that the batch's
    ``attention_mask`` shows), over the places of a feature map (channels first, as convolutions have them). "last": the last position
    that the mask shows. "all": everything, flattened.
    """

    model: nn.Module
    name: str
    positions: str
    entering: bool

    @property
    def where(self) -> str:
        return f"{'the input' if self.entering else 'the output'} of {f'layer {self.name!r}' if self.name else 'the model'}"

    def of(self, batch: Batch, task: Task, ask: Measure) -> Tensor:
        """(n, d). Raises InputError where the layer is not met exactly once, or does not have examples first."""
        module, seen = self.model.get_submodule(self.name), list[Any]()
        if self.entering:
            handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True)
        else:
            handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            with torch.no_grad():
                ask(self.model, batch)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise InputError(
                f"layer {self.name!r}, which is called {len(seen)} times for one batch",
                "a layer that the loss and the measure call once",
                "choose another layer, or a measure that calls the model once",
            )
        found = at_least_float32(_tensor(seen[0], self.name))
        if isinstance(batch, Drawn):
            return self._pooled(found, module, batch.rows()).unflatten(0, (-1, batch.each)).mean(1)
        return self._pooled(found, module, batch)

    def _pooled(self, t: Tensor, module: nn.Module, batch: Batch) -> Tensor:
        n = size(batch)
        if t.ndim == 0 or len(t) != n:
            raise InputError(f"{self.where}, of shape {tuple(t.shape)} for {n} examples", "examples on the first axis", "choose another layer")
        if t.ndim <= 2 or self.positions == "all":
            return t.reshape(n, -1)
        if not self.entering and _channels_first(module, t):
            if self.positions == "last":
                raise InputError(f"positions='last' for {self.where}, of shape {tuple(t.shape)}", "a sequence (n, positions, features)", "positions='mean' or 'all'")
            return t.flatten(2).mean(2)
        t = t.flatten(1, -2)
        shown = _shown(batch, t)
        if self.positions == "last":
            place = (shown * torch.arange(1, t.shape[1] + 1, device=t.device)).argmax(1)
            return t[torch.arange(n, device=t.device), place]
        weight = shown.to(t.dtype)
        return (t * weight.unsqueeze(2)).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)


def _tensor(held: Any, name: str) -> Tensor:
    """The first tensor in what a layer was given or gave: itself, the first of a tuple, the first field of an output object."""
    found = next(iter(leaves(held.to_tuple() if hasattr(held, "to_tuple") else held)), None)
    if found is None or not found.is_floating_point():
        raise InputError(f"layer {name!r}, which holds {'no tensor' if found is None else f'a tensor of {found.dtype}'}", "floating numbers", "choose another layer")
    return found


def _channels_first(module: nn.Module, t: Tensor) -> bool:
    """Whether axis 1 counts features: after convolutions, their norms and pools, and in whatever else has places along two axes or more."""
    pool = "Pool" in type(module).__name__
    return isinstance(module, _ConvNd | _BatchNorm) or pool or (t.ndim >= 4 and not isinstance(module, _FEATURES_LAST))


def _shown(batch: Batch, t: Tensor) -> Tensor:
    """Which positions of (n, positions, features) count: those of the attention mask where there is one of that shape. (n, positions)"""
    fields = fields_of(batch)
    mask = fields.get("attention_mask") if isinstance(fields, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == t.shape[:2]
    return (mask != 0) if fits and mask is not None else torch.ones(t.shape[:2], dtype=torch.bool, device=t.device)


def _last_linear(model: nn.Module, run: Run) -> str:
    """The name of the linear layer that is called last when the first training example of the last stage goes through the model."""
    stage, called = run.stages[-1], list[str]()
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, module in linear]
    try:
        with torch.no_grad():
            stage.task.loss(model, to(stage.data.batch(range(1)), run.device))
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise _no_layer("a model that calls no linear layer, and no layer=", model, "")
    return called[-1]


def _no_layer(given: str, model: nn.Module, wanted: str) -> InputError:
    names = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name]
    close = difflib.get_close_matches(wanted, [name for name, _ in model.named_modules() if name], 1)
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    mend = f"did you mean layer={close[0]!r}?" if close else "name one of them, or layer='input' for the examples themselves"
    return InputError(given, f"the name of a module of the model: {', '.join(names[:_SHOWN])}{more}", mend)


# --------------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, eq=False)
class Inputs:
    """The examples' own numbers, flattened and side by side: every tensor of the batch but the labels; of a diffusion task's, the images without
    noise."""

    where: str = "the inputs"

    def of(self, batch: Batch, task: Task, ask: Measure) -> Tensor:
        """(n, d). Token ids are refused: their numbers mean nothing."""
        if isinstance(batch, Drawn):
            batch = image_of(batch.batch, task.images if isinstance(task, Diffusion) else "images")
        parts = list(leaves(inputs_of(batch, task)))
        if tokens_in(batch, task) is not None or not parts:
            raise InputError(
                "token ids where numbers are compared", "inputs that are numbers", "compare texts with hw.floors.inputs('bm25'), or choose a layer"
            )
        numbers = [at_least_float32(t if t.is_floating_point() else t.float()).reshape(len(t), -1) for t in parts]
        return torch.cat(numbers, 1)


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a function of the user's makes of a batch, (n, ...): of a diffusion task's, of the batch without noise."""

    function: Callable[[Batch], Tensor]

    @property
    def where(self) -> str:
        return f"embedding {getattr(self.function, '__name__', type(self.function).__name__)}#{code_digest(self.function, held=True)}"

    def of(self, batch: Batch, task: Task, ask: Measure) -> Tensor:
        """(n, d). Raises InputError for what is not one vector each."""
        held = batch.batch if isinstance(batch, Drawn) else batch
        with torch.no_grad():
            found = self.function(held)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != size(held) or not found.is_floating_point():
            given = f"an embedding that returned {f'shape {tuple(found.shape)}' if isinstance(found, Tensor) else type(found).__name__} for {size(held)} examples"
            raise InputError(given, "floating numbers (n, d)", "embed=lambda batch: model(batch[0]), say")
        return at_least_float32(found).reshape(len(found), -1)


def inputs_of(batch: Batch, task: Task) -> Any:
    """A batch without its labels: the last item of a tuple, or the field that the task names. A bare tensor has none."""
    fields = fields_of(batch)
    if isinstance(fields, Tensor) or (isinstance(fields, tuple | list) and len(fields) == 1):
        return fields
    field = getattr(task, "labels", "labels")
    if isinstance(fields, Mapping):
        return {k: v for k, v in fields.items() if k != field}
    return split(batch, field)[0]


def tokens_in(batch: Batch, task: Task) -> tuple[Tensor, Tensor] | None:
    """Token ids and which of them count, both (n, length), where the batch is text; None where it is not."""
    inputs, fields = inputs_of(batch, task), fields_of(batch)
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if ids is None and isinstance(task, Language):
        ids = next(iter(leaves(inputs)), None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
        return None
    mask = fields.get("attention_mask") if isinstance(fields, Mapping) else None
    counted = ids >= 0 if not isinstance(mask, Tensor) or mask.shape != ids.shape else (mask != 0) & (ids >= 0)
    return ids, counted


def finite(vectors: Tensor, what: Callable[[int], str]) -> Tensor:
    """The vectors, if all their numbers are; else NotFinite names the first example, ``what(i)``."""
    good = torch.isfinite(vectors).all(1)
    if not bool(good.all()):
        raise NotFinite(f"NaN or infinite values in the vector of {what(int((~good).nonzero()[0]))}", "finite numbers", "look at that example, or choose another layer")
    return vectors
