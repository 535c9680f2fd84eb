"""How a torch model is called: its inputs in whatever structure, extra arguments, quiet (in eval mode, restored after), rows picked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.features.arrays import as_tensor
from headwater.tasks.batches import tree_map
from headwater.tasks.task import logits_of

NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Modules whose output in training mode is random, or depends on the other examples of the batch."""


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs of n examples, and how a model takes them.

    Args:
        tensors: the inputs (n, ...), in order.
        names: their names where they came as a mapping (then they are keyword arguments), else None.
        single: whether they came as one tensor.
        args, kwargs: extra arguments. Tensors in them that have n rows hold one for each example; others are passed as they are.
    """

    model: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] | None
    single: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: Any, inputs: Any, extra: Any) -> Call:
        """From the arguments of ``explain``. Raises InputError."""
        names = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else None
        single = names is None and not isinstance(inputs, tuple | list)
        parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs] if single else list(inputs)
        like = next((p for p in parameters(model)), None)
        tensors = tuple(_tensor(part, like, names[k] if names else f"input {k}") for k, part in enumerate(parts))
        if not tensors or not len(tensors[0]) or len({len(t) for t in tensors}) != 1:
            raise InputError(
                f"inputs with {', '.join(str(len(t)) for t in tensors) or 'no'} examples",
                "at least one example, the same number in every input",
                "the first axis counts examples",
            )
        args = tuple(extra) if isinstance(extra, tuple | list) else ()
        kwargs = dict(extra) if isinstance(extra, Mapping) else {}
        if extra is not None and not args and not kwargs:
            args = (extra,)
        return cls(model, tensors, names, single, args, kwargs)

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.tensors[0])

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.tensors[0].device

    def __call__(self, tensors: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """The model's output (m, ...) for inputs (m, ...) of the examples ``rows`` (m,)."""
        args = [self._at(v, rows) for v in self.args]
        kwargs = {k: self._at(v, rows) for k, v in (self.kwargs or {}).items()}
        if self.names is None:
            return checked(logits_of(self.model(*tensors, *args, **kwargs)), len(rows))
        return checked(logits_of(self.model(*args, **dict(zip(self.names, tensors, strict=True)), **kwargs)), len(rows))

    def _at(self, value: Any, rows: Tensor) -> Any:
        return tree_map(lambda t: t[rows.to(t.device)] if t.ndim and len(t) == self.n else t, value)


def checked(out: Tensor, rows: int) -> Tensor:
    """The output when it has one row for each example, else an InputError."""
    if out.ndim == 0 or len(out) != rows:
        raise InputError(
            f"a model that returned shape {tuple(out.shape)} for {rows} examples",
            f"one row for each example, ({rows}, ...)",
            "a model that sums or averages over the batch cannot be explained example by example: return one value each",
        )
    return out


def parameters(model: Any) -> Iterator[Tensor]:
    """The parameters of every module that a model is made of."""
    for module in modules_of(model):
        yield from module.parameters()


def modules_of(model: Any) -> list[nn.Module]:
    """The module that a callable is, is a method of, or holds: as a partial argument or in a function's closure."""
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        return [m for part in (model.func, *model.args, *model.keywords.values()) for m in modules_of(part)]
    if inspect.ismethod(model):
        return modules_of(model.__self__)
    if inspect.isfunction(model):
        held = inspect.getclosurevars(model)
        return [v for v in (*held.nonlocals.values(), *held.globals.values()) if isinstance(v, nn.Module)]
    return []


@contextmanager
def quiet(model: Any) -> Iterator[list[str]]:
    """The model in eval mode, gradients enabled, cuDNN off where there are recurrent layers (its backward pass needs training mode); all is put
    back after. Yields what was done, in sentences."""
    modules = [m for root in modules_of(model) for m in root.modules()]
    training = [m for m in modules if m.training]
    noisy = sorted({type(m).__name__ for m in training if isinstance(m, NOISY) and not (isinstance(m, NOISY[0]) and m.p == 0)})
    notes = [f"{' and '.join(noisy)} in training mode: the model was explained in eval mode, and put back."] if noisy else []
    recurrent = any(isinstance(m, nn.RNNBase) for m in modules)
    try:
        for m in training:
            m.training = False
        with torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent):
            yield notes
    finally:
        for m in training:
            m.training = True


def _tensor(part: Any, like: Tensor | None, name: str) -> Tensor:
    """An input as a detached tensor on the model's device, checked; numpy arrays of floats take the model's dtype."""
    if isinstance(part, np.ndarray) or not isinstance(part, Tensor):
        try:
            array = as_tensor(part)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} of type {type(part).__name__}", "a tensor or an array of numbers, (n, ...)", "texts need tokenizer=") from error
        part = array.to(like.dtype) if like is not None and array.is_floating_point() and like.is_floating_point() else array
    found = part.detach()
    found = found.clone() if found.is_inference() else found
    found = found.to(like.device) if like is not None else found
    if found.ndim == 0:
        raise InputError(f"{name} is a single number", "a tensor (n, ...) whose first axis counts examples", "x[None] makes one example a batch")
    if found.ndim == 1 and found.is_floating_point():
        raise InputError(
            f"{name} of shape {tuple(found.shape)}", "at least two axes, the first of which counts examples", "x[:, None] for one number each, x[None] for one example"
        )
    if found.is_floating_point() and not torch.isfinite(found).all():
        bad = (~torch.isfinite(found)).flatten(1).any(1).nonzero()[:5, 0].tolist() if found.ndim > 1 else []
        raise InputError(f"{name} with NaN or infinity in examples {bad}", "finite numbers", "replace or drop them first")
    return found
