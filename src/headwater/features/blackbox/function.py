"""A function of which only values are known, as one number for each point: its inputs flattened, its outputs checked, its calls counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import BatchCoupling, InputError, NotFinite
from headwater.features import tables, targets
from headwater.features.question import Question

Array = np.ndarray


@dataclass
class Inputs:
    """What is explained, as numbers (n, F), and how a point becomes what the function takes.

    ``switched`` (F,): columns that cannot be interpolated (text, missing values, declared discrete). Their numbers are 1 for the input's
    own value and 0 for the baseline's; a point takes the input's from one half on.
    """

    given: Any
    switched: Array
    names: tuple[str, ...] | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return len(self.given)

    def pair(self, b: Any) -> Pair:
        """The inputs and one baseline (1 or n rows) as ends of paths."""
        n, size = len(self), len(self.switched)
        x, base = (_plain(rows, self.switched).reshape(-1, size) for rows in (self.given, b))
        base = np.array(np.broadcast_to(base, x.shape))
        for j in np.flatnonzero(self.switched).tolist():
            own, other = _column(self.given, j), _column(b, j)
            same = np.array([_same(own[i], other[i % len(other)]) for i in range(n)])
            x[:, j], base[:, j] = np.where(same, 0.0, 1.0), 0.0
        return Pair(self, b, x, base)


@dataclass
class Pair:
    """Ends of paths: x and b, both (n, F)."""

    inputs: Inputs
    baseline: Any
    x: Array
    b: Array

    def rebuilt(self, points: Array, rows: Array) -> Any:
        """Points (m, F) of the examples ``rows`` (m,) as the function takes them."""
        given, switched = self.inputs.given, self.inputs.switched
        if tables.is_frame(given):
            return self._frame(points, rows)
        plain = points
        if switched.any():
            own, other = np.asarray(given, dtype=float)[rows], np.broadcast_to(np.asarray(self.baseline, dtype=float), self.x.shape)[rows]
            plain = np.where(switched, np.where(points >= 0.5, own, other), points)
        found = plain.reshape(len(points), *self.inputs.shape).astype(self.inputs.dtype)
        return torch.from_numpy(found) if isinstance(given, Tensor) else found

    def _frame(self, points: Array, rows: Array) -> Any:
        given, which = self.inputs.given, rows % len(self.baseline)
        columns = {}
        for j, name in enumerate(given.columns):
            if self.inputs.switched[j]:
                own, other = given[name].iloc[rows].reset_index(drop=True), self.baseline[name].iloc[which].reset_index(drop=True)
                columns[name] = own.where(points[:, j] >= 0.5, other)
            else:
                columns[name] = points[:, j]
        return type(given)(columns)


def read_inputs(question: Question) -> Inputs:
    """The question's inputs: an array of any shape, nested lists, a tensor, or a frame. Raises InputError."""
    given = question.inputs
    names = tables.column_names(given, question.feature_names)
    if tables.is_frame(given):
        frame = given.reset_index(drop=True)
        switched = np.array([not numeric(frame[name]) or bool(frame[name].isna().any()) for name in frame.columns])
        return Inputs(frame, switched | _declared(question.discrete, names, len(switched)), names, (len(switched),), np.dtype(float))
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        values, dtype = given.double().numpy(), np.dtype(str(given.dtype).removeprefix("torch.")) if given.is_floating_point() else np.dtype(float)
    else:
        given = given.toarray() if tables.is_sparse(given) else given
        values = tables.numbers(given)
        given = np.asarray(given)
        dtype = given.dtype if given.dtype.kind == "f" else np.dtype(float)
    if values.ndim < 2 or not values.size:
        raise InputError(f"inputs of shape {values.shape}", "(examples, ...) with at least one example and one feature", "for one example: X[:1]")
    if np.isinf(values).any():
        raise InputError("infinite inputs", "finite numbers", "replace infinity first")
    flat = values.reshape(len(values), -1)
    missing = np.isnan(flat).any(0)
    return Inputs(given, missing | _declared(question.discrete, names, flat.shape[1]), names, values.shape[1:], dtype)


def numeric(column: Any) -> bool:
    """Whether a frame's column holds numbers that can be interpolated: not text, truth values or categories."""
    kind = getattr(column.dtype, "kind", "O")
    return kind in "iuf" and column.dtype.name != "category"


def _declared(discrete: Any, names: tuple[str, ...] | None, count: int) -> Array:
    """(count,) which columns ``discrete=`` names: by name, by place, or all of them (True)."""
    found = np.zeros(count, dtype=bool)
    if discrete is None or discrete is False:
        return found
    if discrete is True:
        return ~found
    for one in discrete:
        if isinstance(one, str) and (names is None or one not in names):
            raise InputError(f"discrete column {one!r}", "a name of a column" if names else "the place of a column, as none has a name", "see X.columns")
        place = names.index(one) if isinstance(one, str) and names else int(one)
        if not 0 <= place < count:
            raise InputError(f"discrete column {place} of {count}", f"0 to {count - 1}", "count from 0")
        found[place] = True
    return found


def _plain(rows: Any, switched: Array) -> Array:
    """Numbers of all columns that are interpolated, 0 elsewhere."""
    if not tables.is_frame(rows):
        values = tables.numbers(rows)
        return np.where(switched, 0.0, values.reshape(len(values), -1))
    columns = [np.zeros(len(rows)) if s else tables.numbers(rows[[name]])[:, 0] for name, s in zip(rows.columns, switched, strict=True)]
    if not all(np.isfinite(column).all() for column in columns):
        raise InputError("a frame with infinity, or a baseline with missing values where the inputs have none", "finite numbers", "declare the column: discrete=[name]")
    return np.stack(columns, 1)


def _column(rows: Any, j: int) -> Any:
    return rows.iloc[:, j].to_numpy() if tables.is_frame(rows) else np.asarray(rows, dtype=float).reshape(len(rows), -1)[:, j]


def _same(a: Any, b: Any) -> bool:
    return bool(a is b or a == b or (a != a and b != b))


def _single(outputs: Array) -> bool:
    """Whether outputs carry no more than float32's digits, by their type or by themselves (short fractions tell nothing)."""
    telling = outputs.dtype.kind == "f" and bool((outputs * 1024 != np.round(outputs * 1024)).any())
    return outputs.dtype.kind == "f" and (outputs.dtype.itemsize < 8 or (telling and bool((outputs == outputs.astype(np.float32)).all())))


class Function:
    """``measured(points, rows)``: the target (m,) of the function's outputs for points (m, F); raises for anything but one finite number each."""

    def __init__(self, call: Callable[[Any], Any], target: Any, n: int, chunk: int) -> None:
        self.call, self.target, self.n, self.chunk = call, target, n, chunk
        self.single, self.last_single, self.spent = False, False, 0
        self.told = None if callable(target) and not isinstance(target, targets.Target) else targets.target_of(target)

    @property
    def name(self) -> str:
        """In words."""
        owner = getattr(self.call, "__self__", None)
        words = targets.target_of(self.target).name
        named = [str(label) for label in getattr(owner, "classes_", ())] if isinstance(self.target, int) else []
        known = f" (class {named[self.target]})" if named and self.target < len(named) else ""
        return f"{words}{known} of {getattr(self.call, '__name__', type(self.call).__name__)}"

    def measured(self, pair: Pair, points: Array, rows: Array) -> Array:
        """(m,) in float64."""
        parts = [slice(k, k + self.chunk) for k in range(0, len(points), self.chunk)]
        self.spent += len(points)
        return np.concatenate([self._one(pair.rebuilt(points[s], rows[s]), rows[s]) for s in parts])

    def _one(self, batch: Any, rows: Array) -> Array:
        found = self.call(batch)
        if tables.is_frame(found) or hasattr(found, "to_numpy"):
            found = found.to_numpy()
        outputs = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
        self._check(outputs, len(rows))
        self.last_single = _single(outputs)
        if self.told is None:
            value = np.asarray(self.target(outputs), dtype=float)
        else:
            value = self.told.pick(torch.from_numpy(np.array(outputs, dtype=float)), torch.from_numpy(rows)).numpy()
        if value.shape != (len(rows),):
            raise InputError(f"a target of shape {value.shape} for {len(rows)} examples", "one number for each", "reduce every axis but the first")
        if not np.isfinite(value).all():
            where = f"an output that is NaN or infinite on the path of example {int(rows[~np.isfinite(value)][0])}"
            raise NotFinite(where, "finite outputs between baseline and input", "choose another baseline")
        return value

    def _check(self, outputs: Array, count: int) -> None:
        if outputs.dtype.kind not in "fiub":
            owner = getattr(self.call, "__self__", None)
            better = "hw.explain(model.predict_proba, X, target=1)" if hasattr(owner, "predict_proba") else "return numbers"
            raise InputError(f"a function whose outputs are {outputs.dtype} and not numbers", "one number, or several, for each row", better)
        if outputs.ndim == 0 or len(outputs) != count:
            given = f"a function that gives outputs of shape {outputs.shape} for {count} rows"
            raise InputError(given, "one row of outputs for each row of inputs", "do not reduce over the batch")

    def check_rows(self, pair: Pair) -> Array:
        """f at the inputs (n,). Raises BatchCoupling where an example's output depends on the others, or on chance."""
        rows = np.arange(self.n)
        together = self.measured(pair, pair.x, rows)
        self.single = self.last_single
        alone = self.measured(pair, pair.x[:1], rows[:1])
        if abs(alone[0] - together[0]) > 1e-4 * max(abs(alone[0]), np.abs(together).max(), 1e-300):
            raise BatchCoupling(
                f"an output of {together[0]:.6g} for the first example among {self.n}, and {alone[0]:.6g} for it alone",
                "a function that treats each row by itself, without chance",
                "fix its seed, or evaluate the batch's statistics beforehand",
            )
        return together
