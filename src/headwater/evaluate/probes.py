"""Asking a model about changed inputs: its target as one number for each example, with parts of the input taken away.

A probe is made of the same arguments as an explanation (model, inputs, target, extra, output) and gives f in the same unit:

- torch: tensors in any structure, ids too (a part of a text is a token, and what replaces it is a token);
- functions and estimators: arrays of any shape and frames, in which columns of text are kept as codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, NotFinite
from headwater.features import baselines, kernels, tables
from headwater.features.asked import FIXED
from headwater.features.calls import Call, quiet
from headwater.features.explain import explain
from headwater.features.question import Question
from headwater.features.targets import Target, target_of

Points = tuple[Tensor, ...]
AT_ONCE = 2**22
"""Numbers of the input that the model gets at a time, at most."""


class Probe(Protocol):
    """``output(points, rows)``: f (m,) in float64 at points, one tensor (m, ...) for each input, of the examples ``rows`` (m,).

    ``x``: the inputs that may change. ``own(arrays)``: of arrays for all inputs, those for the ones that may. ``fills(fill, seed)``: what
    parts are replaced with: K points (K, n or 1, ...) and their weights.
    """

    @property
    def x(self) -> Points: ...

    def own(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]: ...

    def output(self, points: Points, rows: Tensor) -> Tensor: ...

    def fills(self, fill: Any, seed: int) -> baselines.References: ...


def probe_of(model: Any, inputs: Any, target: Any = None, extra: Any = None, output: str | None = None) -> Probe:
    """The probe for a model, from the arguments that :func:`headwater.explain` was given. Raises InputError."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    if isinstance(model, nn.Module) or (callable(model) and any(isinstance(p, Tensor) for p in parts)):
        if output is not None:
            raise InputError(f"output={output!r} for a network", "no output, which has no meaning there", "say what is explained with target=")
        return Network.of(Call.of(model, inputs, extra), target_of(target))
    if extra is not None:
        raise InputError("extra= for a function of a table", "no extra, which has no meaning there", "bind arguments with functools.partial")
    return Rows.of(model, inputs, target, output)


@dataclass(frozen=True, eq=False)
class Network:
    """A torch module or function of tensors. ``moving``: which inputs change; masks, positions and the like, which describe others, never do."""

    call: Call
    target: Target
    moving: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, target: Target) -> Network:
        """All inputs move but those whose names say that they describe others. Raises InputError where none is left."""
        names = call.names or ("",) * len(call.tensors)
        moving = tuple(k for k, t in enumerate(call.tensors) if t.is_floating_point() or names[k] not in FIXED)
        if not moving:
            raise InputError(f"only inputs that describe others ({', '.join(names)})", "an input that can change", "give the input that they describe")
        return cls(call, target, moving)

    @property
    def x(self) -> Points:
        """The inputs that change."""
        return self.own(self.call.tensors)

    def own(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those for the inputs that change."""
        return tuple(arrays[k] for k in self.moving) if len(arrays) == len(self.call.tensors) else arrays

    def pick(self, points: Points, rows: Tensor) -> Tensor:
        """The target (m,) with these tensors in place of the inputs that change."""
        tensors = [t[rows] for t in self.call.tensors]
        for k, point in zip(self.moving, points, strict=True):
            tensors[k] = point
        return self.target.pick(self.call(tuple(tensors), rows), rows)

    def output(self, points: Points, rows: Tensor) -> Tensor:
        """The target, in eval mode, without gradients."""
        with quiet(self.call.model), torch.no_grad():
            return self.pick(points, rows).double()

    def fills(self, fill: Any, seed: int) -> baselines.References:
        """Points of floating inputs as ``baseline=`` means them; of ids, a token (``hw.baselines.token(id)`` or a number), or ids."""
        names = [self.call.names[k] for k in self.moving] if self.call.names else ()
        fill = self.own(tuple(fill)) if isinstance(fill, tuple | list) else fill
        fill = {name: fill[name] for name in names if name in fill} if isinstance(fill, Mapping) else fill
        found = baselines.references(_tokens(fill, self.x), self.x, seed, names)
        ids = isinstance(fill, int | baselines.token) and not any(t.is_floating_point() for t in self.x)
        return baselines.References(found.points, found.weights, f"token {_tokens(fill, self.x)}") if ids else found

    def gradient(self) -> Points:
        """∇f at the inputs, for floating inputs; zeros for the others."""
        found: list[list[Tensor]] = []
        for rows in torch.arange(self.call.n, device=self.call.device).split(chunk_of(self.x)):
            at = tuple(t[rows].clone().requires_grad_() if t.is_floating_point() else t[rows] for t in self.x)
            moving = [t for t in at if t.requires_grad]
            with quiet(self.call.model):
                value = self.pick(at, rows)
                grads = iter(torch.autograd.grad(value.sum(), moving, allow_unused=True) if value.requires_grad else [None] * len(moving))
            found.append([_or_zeros(next(grads), t) if t.requires_grad else torch.zeros(t.shape) for t in at])
        return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.detach()


def _tokens(fill: Any, x: Points) -> Any:
    """A token as the number of its id."""
    if isinstance(fill, baselines.token):
        if isinstance(fill.which, str):
            raise InputError(f"the token {fill.which!r} as a fill", "its id: parts of a text are replaced before they are embedded", f"hw.baselines.token({0})")
        return fill.which
    if fill is None and any(not t.is_floating_point() for t in x):
        raise InputError("no fill, and inputs of ids", "the id that stands for a removed token", "fill=tokenizer.mask_token_id, or pad_token_id")
    return fill


@dataclass(frozen=True, eq=False)
class Rows:
    """A function of an array or a frame, or an estimator.

    ``books``: for each column of a frame the texts that its codes stand for; empty for numbers.
    """

    model: Any
    given: Any
    numbers: Tensor
    value: Callable[[Any, np.ndarray], np.ndarray]
    books: tuple[list[Any], ...] = field(default_factory=tuple)

    @classmethod
    def of(cls, model: Any, inputs: Any, target: Any, output: str | None) -> Rows:
        """From the arguments of ``explain``."""
        if tables.is_frame(inputs):
            given = inputs.reset_index(drop=True)
            books: tuple[list[Any], ...] = tuple([] for _ in given.columns)
            numbers = _coded(given, books, _texts(given))
        else:
            given = inputs.toarray() if tables.is_sparse(inputs) else inputs
            books, numbers = (), tables.numbers(given)
        if numbers.ndim < 2 or not numbers.size:
            raise InputError(f"inputs of shape {numbers.shape}", "(examples, ...) with at least one example and one feature", "for one example: X[:1]")
        return cls(model, given, torch.from_numpy(np.array(numbers)), _value(model, given, target, output, len(numbers)), books)

    @property
    def x(self) -> Points:
        """The inputs, texts as codes."""
        return (self.numbers,)

    def own(self, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """All of them."""
        return arrays

    def output(self, points: Points, rows: Tensor) -> Tensor:
        """What the function or the estimator says there."""
        value = self.value(self._rebuilt(points[0].numpy()), rows.numpy())
        if value.shape != (len(rows),):
            raise InputError(f"a target of shape {value.shape} for {len(rows)} examples", "one number for each", "reduce every axis but the first")
        return torch.from_numpy(np.asarray(value, dtype=np.float64))

    def fills(self, fill: Any, seed: int) -> baselines.References:
        """Rows as ``baseline=`` means them for a table."""
        texts = self.books and any(self.books)
        if self.numbers.ndim > 2:
            return baselines.references(fill, self.x, seed)
        against = tables.references(fill, self.given if texts else self.numbers.numpy(), self._names(), seed, missing=True)
        found = [_coded(p, self.books, [bool(book) for book in self.books]) if tables.is_frame(p) else np.asarray(p, dtype=np.float64) for p in against.points]
        each = max(len(p) for p in found)
        points = torch.stack([torch.from_numpy(np.array(p)).expand(each, -1) for p in found])
        return baselines.References((points,), torch.from_numpy(np.asarray(against.weights, dtype=np.float64)), against.name)

    def _names(self) -> Sequence[str] | None:
        return tuple(map(str, self.given.columns)) if tables.is_frame(self.given) else None

    def _rebuilt(self, points: np.ndarray) -> Any:
        if not tables.is_frame(self.given):
            dtype = str(getattr(self.given, "dtype", "float64")).removeprefix("torch.")
            return points.astype(dtype if dtype.startswith("float") else "float64")
        columns = {}
        for j, name in enumerate(self.given.columns):
            book = self.books[j]
            columns[name] = [book[int(code)] for code in points[:, j]] if book else points[:, j]
        return type(self.given)(columns).astype({name: self.given[name].dtype for j, name in enumerate(self.given.columns) if self.books[j]})


def _texts(frame: Any) -> list[bool]:
    """(columns,) whether a column holds something else than numbers."""
    return [getattr(frame[name].dtype, "kind", "O") not in "iufb" or frame[name].dtype.name == "category" for name in frame.columns]


def _coded(frame: Any, books: tuple[list[Any], ...], texts: Sequence[bool]) -> np.ndarray:
    """(rows, columns) numbers; texts as their place in the column's book, which grows as needed."""
    found = np.empty((len(frame), len(frame.columns)))
    for j, name in enumerate(frame.columns):
        if not texts[j]:
            found[:, j] = tables.numbers(frame[[name]])[:, 0]
            continue
        for i, value in enumerate(frame[name]):
            place = next((k for k, known in enumerate(books[j]) if known is value or known == value or (known != known and value != value)), len(books[j]))
            if place == len(books[j]):
                books[j].append(value)
            found[i, j] = place
    return found


def _value(model: Any, given: Any, target: Any, output: str | None, n: int) -> Callable[[Any, np.ndarray], np.ndarray]:
    """``value(rows of inputs, their examples) -> (m,)``."""
    if callable(model) and not isinstance(model, type):
        if output is not None:
            raise InputError(f"output={output!r} for a function", "no output, which has no meaning there", "pass the function that gives it: model.predict_proba")
        told = None if callable(target) and not isinstance(target, Target) else target_of(target)
        return lambda batch, rows: _told(model(batch), target, told, rows)
    question = Question(model, given, target, output=output)
    if not tables.is_frame(given) and kernels.recognises(question) and output is None:
        reading = kernels.reading_of(question, tables.numbers(given))
        weights, _ = reading.aim(target, n)
        return lambda batch, rows: (reading.outputs(np.asarray(batch, dtype=np.float64)) * weights[rows]).sum(1)
    return lambda batch, rows: explain(model, batch, _of_rows(target, rows, n), baseline=batch, output=output, progress=False).output


def _told(found: Any, target: Any, told: Target | None, rows: np.ndarray) -> np.ndarray:
    outputs = found.to_numpy() if hasattr(found, "to_numpy") else found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    if outputs.ndim == 0 or len(outputs) != len(rows) or outputs.dtype.kind not in "fiub":
        raise InputError(
            f"outputs {outputs.dtype} of shape {outputs.shape} for {len(rows)} rows", "one row of numbers for each row of inputs", "do not reduce over the batch"
        )
    if told is None:
        return np.asarray(target(outputs), dtype=np.float64)
    return told.pick(torch.from_numpy(np.ascontiguousarray(outputs, dtype=np.float64)), torch.from_numpy(rows)).numpy()


def _of_rows(target: Any, rows: np.ndarray, n: int) -> Any:
    """An estimator's target for some of the examples: one for each stays one for each."""
    if isinstance(target, tuple) and len(target) == 2:
        return tuple(_of_rows(one, rows, n) for one in target)
    if isinstance(target, str) or target is None or np.ndim(target) == 0:
        return target
    return np.asarray(target.cpu() if isinstance(target, Tensor) else target)[rows]


# ---- asking many times -----------------------------------------------------------------------------------------------------------


def chunk_of(x: Points) -> int:
    """Examples at a time."""
    return int(min(4096, max(1, AT_ONCE // sum(max(1, t[0].numel()) for t in x))))


def once(fill: baselines.References) -> baselines.References:
    """The first point of a fill alone, for what does not depend on it."""
    return baselines.References(fill.points, torch.ones(1, dtype=torch.float64), fill.name)


def measured(probe: Probe, rows: Tensor, change: Callable[[Tensor, Points, Points], Points], fill: baselines.References, batch_size: int | None = None) -> Tensor:
    """(m,) the mean of f over the fills, at ``change(places, x, b)`` of the examples ``rows`` (m,); ``places`` number the rows.

    Raises NotFinite where an output is no number.
    """
    device, found = probe.x[0].device, []
    for places in torch.arange(len(rows), device=device).split(batch_size or chunk_of(probe.x)):
        r = rows[places]
        x = tuple(t[r] for t in probe.x)
        total = torch.zeros(len(r), dtype=torch.float64, device=device)
        for k, weight in enumerate(fill.weights.tolist()):
            b = tuple(p[k, r if p.shape[1] > 1 else torch.zeros_like(r)].to(t) for p, t in zip(fill.points, probe.x, strict=True))
            total += weight * probe.output(change(places, x, b), r)
        found.append(total)
    value = torch.cat(found)
    if not torch.isfinite(value).all():
        bad = rows[~torch.isfinite(value)][:5].tolist()
        raise NotFinite(f"an output that is NaN or infinite for changed inputs of examples {bad}", "finite outputs", "choose another fill")
    return value
