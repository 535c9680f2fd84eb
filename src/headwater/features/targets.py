"""Targets: which number of a model's output is explained, as values with a name. Logits by default; a probability saturates and mixes classes.

hw.explain(model, images, target=3)                                   # output 3
hw.explain(model, images, target=[3, 1, 4])                           # one for each example
hw.explain(model, images, target=hw.targets.margin(3, 5))             # why 3 and not 5?
hw.explain(model, images, target=hw.targets.loss(F.cross_entropy, labels))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.arrays import as_tensor
from headwater.features.text.targets import continuation, span
from headwater.tasks.task import log_odds as stable_log_odds

__all__ = ["continuation", "function", "log_odds", "loss", "margin", "output", "probability", "span"]

Index = int | tuple[int, ...]


@runtime_checkable
class Target(Protocol):
    """``pick(output, rows)``: one number (m,) of the output (m, ...) of the examples whose numbers stand in ``rows`` (m,). ``name``: in words."""

    @property
    def name(self) -> str: ...

    def pick(self, output: Tensor, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class output:  # reads as a function at the door, and is a value
    """One output: an index (a tuple for outputs with several axes), one index for each example, or None where there is only one output."""

    index: Any = None

    @property
    def name(self) -> str:
        """In words."""
        return "the output" if self.index is None else f"output {self.index}" if isinstance(self.index, int | tuple) else "the output chosen for each example"

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """The output (m,)."""
        if self.index is None:
            if output.ndim > 1 and output[0].numel() != 1:
                raise InputError(
                    f"no target for outputs of shape {tuple(output.shape[1:])}", "which output to explain", f"target=0 .. {output.shape[1] - 1}, or one of hw.targets"
                )
            return output.reshape(len(output))
        if isinstance(self.index, int | tuple):
            index = self.index if isinstance(self.index, tuple) else (self.index,)
            _inside(torch.tensor([index]), output)
            return output[(slice(None), *index)]
        each = _each(self.index, rows, output)
        _inside(each, output)
        return output[(torch.arange(len(output), device=output.device), *each.unbind(1))]


@dataclass(frozen=True, eq=False)
class margin:
    """Output ``a`` minus output ``b``, each an index or one index for each example: why a and not b?"""

    a: Any
    b: Any

    @property
    def name(self) -> str:
        """In words."""
        return f"{output(self.a).name} minus {output(self.b).name}"

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The difference (m,)."""
        return output(self.a).pick(given, rows) - output(self.b).pick(given, rows)


@dataclass(frozen=True, eq=False)
class log_odds:
    """``log p / (1 - p)`` of a class under the softmax of outputs (m, classes)."""

    of: Any

    @property
    def name(self) -> str:
        """In words."""
        return f"log-odds of {output(self.of).name}"

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The log-odds (m,)."""
        _flat(given, "log-odds")
        return stable_log_odds(given, _classes(self.of, rows, given))


@dataclass(frozen=True, eq=False)
class probability:
    """The softmax probability of a class, of outputs (m, classes). It saturates: attributions need more points, and mix in the other classes."""

    of: Any

    @property
    def name(self) -> str:
        """In words."""
        return f"probability of {output(self.of).name}"

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The probability (m,)."""
        _flat(given, "a probability")
        return given.softmax(-1).gather(-1, _classes(self.of, rows, given)[:, None]).squeeze(-1)


@dataclass(frozen=True, eq=False)
class loss:
    """A whole loss: ``function(outputs, labels) -> (m,)``, with ``reduction="none"`` where the function takes it. Which parts made it wrong?"""

    function: Callable[..., Any]
    labels: Any

    @property
    def name(self) -> str:
        """In words."""
        return f"the loss {getattr(self.function, '__name__', type(self.function).__name__)}"

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """The loss of each example (m,)."""
        labels = as_tensor(self.labels).to(output.device)
        if len(labels) <= int(rows.max()):
            raise InputError(f"{len(labels)} labels for example {int(rows.max())}", "one for each example", "hw.targets.loss(function, labels of all inputs)")
        options = {"reduction": "none"} if "reduction" in _parameters(self.function) else {}
        return _one_each(self.function(output, labels[rows.to(labels.device)], **options), output, self.name)


@dataclass(frozen=True, eq=False)
class function:
    """Any ``function(outputs) -> (m,)``."""

    of: Callable[..., Any]

    @property
    def name(self) -> str:
        """In words."""
        named = getattr(self.of, "__name__", type(self.of).__name__)
        return "a function of the output" if named == "<lambda>" else f"{named} of the output"

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """Its value for each example (m,)."""
        return _one_each(self.of(output), output, self.name)


def target_of(given: Any) -> Target:
    """What any ``target=`` argument means."""
    if isinstance(given, Target):
        return given
    if isinstance(given, np.integer) or (isinstance(given, Tensor | np.ndarray) and given.ndim == 0):
        given = int(given)
    if given is None or isinstance(given, int | tuple | list | np.ndarray | Tensor):
        if isinstance(given, bool):
            raise InputError(f"target={given}", "the number of an output", "target=1, say")
        return output(given)
    if callable(given):
        return function(given)
    raise InputError(f"target={given!r}", "an index, one for each example, a function of the output, or one of hw.targets", "target=3, say")


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _each(index: Any, rows: Tensor, output: Tensor) -> Tensor:
    """One index for each of ``rows``, (m, axes)."""
    table = as_tensor(index).to(output.device)
    if table.is_floating_point() or table.dtype == torch.bool:
        raise InputError(f"targets of type {table.dtype}", "whole numbers: the index of an output for each example", "targets.long()")
    table = table[:, None] if table.ndim == 1 else table
    if len(table) <= int(rows.max()):
        raise InputError(f"{len(table)} targets for example {int(rows.max())}", "one for each example", "target=[...] as long as the inputs, or a single number")
    return table[rows.to(table.device)]


def _inside(index: Tensor, output: Tensor) -> None:
    shape = output.shape[1:]
    if index.shape[1] != len(shape):
        raise InputError(
            f"a target with {index.shape[1]} numbers for outputs of shape {tuple(shape)}",
            f"{len(shape)}, one for each axis" if shape else "no target: there is one output",
            "target=(i, j) for two axes",
        )
    sizes = torch.tensor(shape, device=index.device)
    if bool(((index >= sizes) | (index < -sizes)).any()):
        bad = index[((index >= sizes) | (index < -sizes)).any(1)][0].tolist()
        raise InputError(
            f"target {bad[0] if len(bad) == 1 else tuple(bad)} of outputs of shape {tuple(shape)}",
            f"an index below {tuple(shape)}" if len(shape) > 1 else f"0 to {shape[0] - 1}",
            "check the target against the model's output",
        )


def _flat(given: Tensor, what: str) -> None:
    if given.ndim != 2:
        raise InputError(f"{what} of outputs of shape {tuple(given.shape[1:])}", "outputs (m, classes)", "write it as a function of the output: target=lambda out: ...")


def _classes(of: Any, rows: Tensor, given: Tensor) -> Tensor:
    each = torch.full((len(given), 1), of, device=given.device) if isinstance(of, int) else _each(of, rows, given)
    _inside(each, given)
    return each[:, 0]


def _one_each(value: Any, output: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (len(output),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{name} gave {shape} for {len(output)} examples", f"one number each, shape ({len(output)},)", 'reduce every axis but the first, and use reduction="none"'
        )
    return value
