"""Layers as places where a path can run: their outputs are read and replaced through forward hooks, which are always removed.

A layer's output may be a tensor or any structure of tensors (an LSTM returns three); all its floating tensors move together, so that the
layer cuts the graph whole. States without a row for each example (an LSTM's h and c) stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from headwater.errors import InputError
from headwater.features.calls import modules_of


def layers_of(model: Any, layer: Any) -> tuple[list[nn.Module], str]:
    """The modules that ``layer=`` names (a module, its dotted name, or a list of them), and their names in words."""
    roots = modules_of(model)
    known = {name: module for root in roots for name, module in root.named_modules()}
    found, names = [], []
    for one in layer if isinstance(layer, list | tuple) else [layer]:
        if isinstance(one, str):
            if one not in known or not one:
                raise InputError(f"layer={one!r}", "the name of a module of the model", f"one of {', '.join(name for name in list(known)[:12] if name)}")
            found.append(known[one])
            names.append(one)
        elif isinstance(one, nn.Module):
            name = next((name for name, module in known.items() if module is one), None)
            if name is None:
                raise InputError(f"a layer ({type(one).__name__}) that is no part of the model", "a module of the model itself", "layer=model.some_layer, or its name")
            found.append(one)
            names.append(name or type(one).__name__)
        else:
            raise InputError(f"layer={one!r}", "a module of the model, its name, or a list of them", "layer='features.3', say")
    return found, ", ".join(names)


@dataclass(frozen=True, eq=False)
class Seat:
    """A place in the graph: the floating tensors that a module puts out with one row for each example, by their numbers among its leaves."""

    module: nn.Module
    leaves: tuple[int, ...] = (0,)

    def pick(self, out: Any) -> list[Tensor]:
        """These tensors of an output."""
        flat = tree_flatten(out)[0]
        return [flat[k] for k in self.leaves]

    def put(self, out: Any, values: Sequence[Tensor]) -> Any:
        """The output with other tensors in their place: clones, so that an in-place operation after the layer does not write into the points."""
        flat, spec = tree_flatten(out)
        for k, value in zip(self.leaves, values, strict=True):
            flat[k] = value.clone()
        return tree_unflatten(flat, spec)


def seats_of(modules: Sequence[nn.Module], run: Callable[[int], Any]) -> tuple[Seat, ...]:
    """Which tensors of the modules' outputs have a row for each example, seen by two runs ``run(m)`` of two and of three examples."""
    shapes: list[list[list[tuple[int, ...] | None]]] = [[] for _ in modules]

    def look(k: int) -> Callable[..., None]:
        return lambda module, args, out: shapes[k].append([tuple(x.shape) if _floating(x) else None for x in tree_flatten(out)[0]])

    for m in (2, 3):
        handles = [module.register_forward_hook(look(k)) for k, module in enumerate(modules)]
        try:
            with torch.no_grad():
                run(m)
        finally:
            for handle in handles:
                handle.remove()
    return tuple(_seat(module, seen) for module, seen in zip(modules, shapes, strict=True))


def _seat(module: nn.Module, seen: list[list[tuple[int, ...] | None]]) -> Seat:
    if len(seen) != 2:
        raise InputError(
            f"a layer ({type(module).__name__}) that ran {len(seen) / 2:g} times in one forward pass",
            "a layer that runs exactly once",
            "give the module around it, or two modules with shared weights" if seen else "choose a layer that the model uses",
        )
    two, three = seen
    leaves = tuple(k for k, (a, b) in enumerate(zip(two, three, strict=True)) if a and b and a[0] == 2 and b[0] == 3)
    if not leaves:
        raise InputError(
            f"a layer ({type(module).__name__}) whose outputs have the shapes {two} for two examples",
            "one row for each example",
            "choose a layer that keeps the batch first",
        )
    return Seat(module, leaves)


class Taps:
    """What some seats hold in the last forward pass, with the graph that it has: a list of tensors in order."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self.seats = seats
        self._seen: list[list[Tensor]] = [[] for _ in seats]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all seats."""
        return tuple(t for one in self._seen for t in one)

    @contextmanager
    def open(self) -> Iterator[Taps]:
        """Listen while the model runs."""

        def listen(k: int) -> Callable[..., None]:
            def take(module: nn.Module, args: Any, out: Any) -> None:
                self._seen[k] = self.seats[k].pick(out)

            return take

        handles = [seat.module.register_forward_hook(listen(k)) for k, seat in enumerate(self.seats)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def replaced(seats: Sequence[Seat], values: Sequence[Tensor]) -> Iterator[None]:
    """Give the seats the tensors ``values``, in the order of :attr:`Taps.tensors`."""
    places = [sum(len(s.leaves) for s in seats[:k]) for k in range(len(seats))]

    def put(k: int) -> Callable[..., Any]:
        return lambda module, args, out: seats[k].put(out, values[places[k] : places[k] + len(seats[k].leaves)])

    handles = [seat.module.register_forward_hook(put(k)) for k, seat in enumerate(seats)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embeddings_of(model: Any, ids: Sequence[Tensor], run: Callable[[], Any]) -> list[nn.Module | None]:
    """For each tensor of integers the embedding module that it goes into, in one run of the model; None where there is none."""
    found: list[nn.Module | None] = [None] * len(ids)

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0] if args else None
        if isinstance(given, Tensor) and not given.is_floating_point():
            for k, wanted in enumerate(ids):
                if found[k] is None and given.shape == wanted.shape and (given.data_ptr() == wanted.data_ptr() or torch.equal(given, wanted.to(given))):
                    found[k] = module

    embeddings = [m for root in modules_of(model) for m in root.modules() if isinstance(m, nn.Embedding) or type(m).__name__.endswith("Embedding")]
    embeddings = [m for m in embeddings if isinstance(getattr(m, "weight", None), Tensor)]
    handles = [m.register_forward_pre_hook(look) for m in embeddings]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def neuron(hidden: Tensor, unit: tuple[int, ...]) -> Tensor:
    """One unit (m,) of a layer's output (m, ...). Raises InputError where there is none of that number."""
    shape = tuple(hidden.shape[1:])
    if len(unit) != len(shape) or any(not -size <= u < size for u, size in zip(unit, shape, strict=False)):
        raise InputError(
            f"neuron={unit if len(unit) != 1 else unit[0]} of a layer of shape {shape}", f"{len(shape)} numbers below {shape}", "neuron=(channel, row, column), say"
        )
    return hidden.flatten(1)[:, int(np.ravel_multi_index([u % size for u, size in zip(unit, shape, strict=True)], shape)) if shape else 0]


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0
