"""Rows and columns of whatever holds a table (an array, a tensor, a sparse matrix, a frame), checked once for every audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.features import tables
from headwater.features.explain import explain
from headwater.result import FeatureScores


def table_of(X: Any, what: str = "X") -> Any:
    """X as something with ``shape`` and rows. Raises InputError for anything but two axes, or no rows."""
    held = X if hasattr(X, "shape") else np.asarray(X)
    if len(held.shape) != 2 or 0 in held.shape:
        raise InputError(f"{what} of shape {tuple(held.shape)}", "a table (rows, columns) with at least one of each", "pass an array (n, p) or a frame")
    return held


def rows_of(X: Any, rows: np.ndarray) -> Any:
    """Some of its rows, in the order given.

    >>> rows_of(np.arange(6).reshape(3, 2), np.array([2, 0]))
    array([[4, 5],
           [0, 1]])
    """
    if tables.is_frame(X):
        return X.iloc[rows].reset_index(drop=True)
    return X.tocsr()[rows] if tables.is_sparse(X) else X[rows]


def columns_of(X: Any, columns: Sequence[int] | np.ndarray) -> Any:
    """Some of its columns, in the order given.

    >>> columns_of(np.arange(6).reshape(2, 3), [2, 0])
    array([[2, 0],
           [5, 3]])
    """
    which = np.asarray(columns, dtype=int)
    if tables.is_frame(X):
        return X.iloc[:, which]
    return X.tocsc()[:, which].tocsr() if tables.is_sparse(X) else X[:, which]


def column(X: Any, j: int) -> np.ndarray:
    """One column (n,), numbers or text."""
    found = columns_of(X, [j])
    if tables.is_frame(found):
        return np.asarray(found.iloc[:, 0].to_numpy())
    if isinstance(found, Tensor):
        found = found.detach().cpu().numpy()
    return np.asarray(found.toarray() if tables.is_sparse(found) else found)[:, 0]


def names_of(X: Any, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """Those given, a frame's own, or ``feature 0``, ... Raises InputError for another count of them."""
    found = tables.column_names(X, given) or tuple(f"feature {j}" for j in range(X.shape[1]))
    if len(found) != X.shape[1]:
        raise InputError(f"{len(found)} feature_names for {X.shape[1]} columns", "one each", "name every column, or none")
    return found


def labels_of(y: Any, n: int, what: str = "labels") -> np.ndarray:
    """(n,) as an array. Raises InputError for another length, and for labels that are missing."""
    found = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if found.shape != (n,):
        raise InputError(f"{what} of shape {found.shape} for {n} rows", "one for each row, (n,)", "check what you pass")
    bad = ~np.isfinite(found) if found.dtype.kind == "f" else np.array([v is None or v != v for v in found.tolist()])
    if bad.any():
        raise InputError(f"{what} that are missing, the first in row {int(bad.argmax())}", "a value for each row", "leave those rows out")
    return found


def numeric(values: np.ndarray) -> bool:
    """Whether a column holds numbers."""
    return values.dtype.kind in "iufb"


def predicted(model: Any, X: Any) -> np.ndarray:
    """What a model says of each row: (n,) labels or numbers; of a torch module, the place of the largest output."""
    if isinstance(model, nn.Module):
        found = module_outputs(model, X)
        return found.argmax(1) if found.ndim == 2 and found.shape[1] > 1 else found.reshape(len(found))
    if not hasattr(model, "predict"):
        raise InputError(f"a model of type {type(model).__name__}", "one with predict, or a torch module", "pass measure= and explain= for other models")
    return np.asarray(model.predict(X)).reshape(-1)


def module_outputs(model: nn.Module, X: Any) -> np.ndarray:
    """(n, ...) of a torch module in evaluation mode."""
    import torch

    from headwater.features.calls import quiet

    like = next(iter(model.parameters()), torch.zeros(0))
    with quiet(model), torch.no_grad():
        return np.asarray(model(torch.as_tensor(X).to(like)).cpu())


def explained(model: Any, X: Any, **settings: Any) -> FeatureScores:
    """Of the class that the model predicts where there are more than two, else of its one output (or its second class)."""
    if "target" not in settings:
        if isinstance(model, nn.Module):
            outputs = module_outputs(model, X)
            settings["target"] = outputs.argmax(1) if outputs.ndim == 2 and outputs.shape[1] > 1 else None
        elif len(getattr(model, "classes_", ())) > 2:
            settings["target"] = predicted(model, X)
    return explain(model, X, progress=False, **settings)
