"""Dropout that is decided beforehand: masks in the place of a model's dropout modules, the same at every call.

A mask stands for one draw of a dropout module in training mode: units are dropped and the rest is scaled as torch does it. The module's
activations show where the examples are (:class:`~headwater.capture.capture.Layout`); a mask has all other axes, so that positions of a
sequence have bits of their own, and those of ``Dropout1d/2d/3d`` one bit for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwater.capture.capture import Layout
from headwater.errors import GradientError
from headwater.influence.ensembles.bits import kept
from headwater.philox import key_of

SHAPES = 16
"""Masks that a module keeps, one for each shape it has met."""
_SATURATED = -1.7580993408473766  # what a dropped unit is set to by alpha dropout: -scale * alpha of SELU (Klambauer et al. 2017, sec. 1)


@dataclass(frozen=True)
class Site:
    """Where a mask goes: the module at ``path`` is replaced by it, or (``inserted``) followed by it.

    Args:
        rate: the probability of dropping a unit.
        channels: whole channels are dropped. ``alpha``: dropped units are saturated instead of zeroed, and the rest rescaled, so that mean
            and variance stay as they were.
        layouts: where the examples are at each call of one forward pass.
    """

    path: str
    rate: float
    channels: bool = False
    alpha: bool = False
    inserted: bool = False
    layouts: tuple[Layout, ...] = (Layout("first"),)


@dataclass(eq=False)
class Ids:
    """The ids of the batch that is in the model: what masks of examples are keyed by. They outlive the forward pass for the backward
    pass, which may run parts of the model again, and for nothing else."""

    values: Tensor | None = None
    inside: bool = False

    @contextmanager
    def of(self, values: Tensor) -> Iterator[None]:
        self.values, self.inside = values, True
        try:
            yield
        finally:
            self.inside = False

    def now(self) -> Tensor:
        if self.values is None or not (self.inside or _in_backward()):
            raise GradientError(
                "a model with a mask for each example that was called with examples that have no ids",
                "calls by the task's loss or measure, on batches of the run or of the queries",
                "use masks='member' with methods that call the model themselves",
            )
        return self.values


class Mask(nn.Module):
    """One draw of dropout; see the module's docstring. ``names``: what its random numbers are keyed by, besides its path and the call.
    ``p`` is there because some models read the rate of their dropout modules."""

    def __init__(self, site: Site, names: tuple[Any, ...], ids: Ids | None = None) -> None:
        super().__init__()
        self.site, self.names, self.ids, self.p = site, names, ids, site.rate
        self.calls = 0
        self._held: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.site.rate == 0:
            return x
        call = self._call()
        keep = self._keep(x, call)
        if not self.site.alpha:
            return x * (keep.to(x.dtype) * (1 / (1 - self.site.rate) if self.site.rate < 1 else 0.0))
        a = ((1 - self.site.rate) * (1 + self.site.rate * _SATURATED**2)) ** -0.5 if self.site.rate < 1 else 0.0
        return a * torch.where(keep, x, _SATURATED) - a * _SATURATED * self.site.rate

    def _call(self) -> int:
        """Which call of this forward pass it is: a module that is called several times has a mask for each."""
        count = len(self.site.layouts)
        if count == 1:
            return 0
        if _in_backward():
            raise GradientError(
                f"a dropout module that is called {count} times in a forward pass, within a checkpointed part of the model: {self.site.path!r}",
                "to know which call is run again by the backward pass",
                "give each use a module of its own, or switch checkpointing off for attribution",
            )
        self.calls += 1
        return (self.calls - 1) % count

    def _keep(self, x: Tensor, call: int) -> Tensor:
        """Whether each entry of x is kept, broadcastable to it."""
        known = self.site.layouts[call]
        led = (known.how == "absent" and x.ndim == known.axes + 1) or (known.how == "shared" and x.shape[0] != 1)
        how = "first" if led else known.how  # an output that was expanded to the examples (capture does that)
        if how == "absent":
            return self._drawn(x, call, tuple(x.shape))
        axis = 1 if how == "second" else 0
        shape = tuple(size for k, size in enumerate(x.shape) if k != axis)
        if self.ids is None or how == "shared":
            return self._drawn(x, call, shape).unsqueeze(axis)
        ids = self.ids.now().to(x.device)
        rows, n = x.shape[axis], len(ids)
        if rows % n:
            raise GradientError(
                f"an activation of shape {tuple(x.shape)} at {self.site.path!r} for {n} examples",
                "rows that belong to examples, as many for each",
                "use masks='member': this model's rows cannot be given to examples",
            )
        if rows == n:
            return kept(self._key(call), self.site.rate, self._bits_of(shape), ids).movedim(0, axis)
        return kept(self._key(call), self.site.rate, (rows // n, *self._bits_of(shape)), ids).flatten(0, 1)  # examples times positions

    def _drawn(self, x: Tensor, call: int, shape: tuple[int, ...]) -> Tensor:
        """The member's bits for a shape without examples, kept for the next call."""
        key = (call, shape, x.device)
        if key in self._held:
            return self._held[key]
        found = kept(self._key(call), self.site.rate, self._bits_of(shape), device=x.device)
        if not torch._C._functorch.is_functorch_wrapped_tensor(found):  # one made inside torch.func's transforms ends with them
            if len(self._held) >= SHAPES:
                self._held.pop(next(iter(self._held)))
            self._held[key] = found
        return found

    def _bits_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:1], *[1] * (len(shape) - 1)) if self.site.channels else shape

    def _key(self, call: int) -> tuple[int, int]:
        return key_of("dropout", *self.names, self.site.path, call)

    def extra_repr(self) -> str:
        return f"rate={self.site.rate}"


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True, eq=False)
class MaskedBuild:
    """A model builder with masks in place of dropout: what a view of a run builds its model by."""

    build: Callable[[], nn.Module]
    sites: tuple[Site, ...]
    names: tuple[Any, ...]
    ids: Ids | None = field(default=None)

    def __call__(self) -> nn.Module:
        return place(self.build(), self.sites, lambda site: Mask(site, self.names, self.ids))


def place(model: nn.Module, sites: tuple[Site, ...], make: Callable[[Site], nn.Module]) -> nn.Module:
    """Put what ``make`` gives for each site into the model: in place of its module (wherever that is used), or after it."""
    masks: list[nn.Module] = []
    homes = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items() if child is not None]
    for site in sites:
        mask, module = make(site), model.get_submodule(site.path)
        mask.register_forward_pre_hook(_nothing)  # torch's fused transformer layer, which would pass the mask by, is not used where there are hooks
        masks.append(mask)
        if site.inserted:
            module.register_forward_hook(_after(mask, site))
        else:
            for parent, name, child in homes:
                if child is module:
                    parent._modules[name] = mask
    counted = [mask for mask in masks if isinstance(mask, Mask) and len(mask.site.layouts) > 1]
    if counted:
        model.register_forward_pre_hook(lambda *_: _restart(counted))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fused path that passes masks by
    return model


def _restart(masks: list[Mask]) -> None:
    for mask in masks:
        mask.calls = 0


def _after(mask: nn.Module, site: Site) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise GradientError(
                f"an output of type {type(output).__name__} of {site.path!r}, after which dropout is to be inserted",
                "one tensor",
                "name a layer that returns a tensor in insert=",
            )
        return mask(output)

    return hook
