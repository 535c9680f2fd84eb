"""Attributions as a pandas table: every number once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import MissingExtra
from headwater.result.views import View, views

if TYPE_CHECKING:
    import pandas

    from headwater.result.features import FeatureScores


def pandas_library() -> Any:
    """The library, or MissingExtra."""
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra("to_frame() without the library pandas", "pandas", "pip install headwater[frames]") from error
    return pandas


def frame(scores: FeatureScores) -> pandas.DataFrame:
    """See :meth:`FeatureScores.to_frame`."""
    pandas = pandas_library()
    who = np.array(scores.example_names if scores.example_names is not None else range(scores.n))
    found = [pandas.DataFrame(_columns(view, who)) for view in views(scores)]
    return found[0] if len(found) == 1 else pandas.concat(found, ignore_index=True)


def _columns(view: View, who: np.ndarray) -> dict[str, Any]:
    n, shape = len(view.values), view.values.shape[1:]
    size = int(np.prod(shape))
    columns: dict[str, Any] = {"example": np.repeat(who, size)}
    if view.name:
        columns["input"] = view.name
    if view.kind == "table":
        bare = view.parts() if not view.name else [part.removeprefix(f"{view.name}: ") for part in view.parts()]
        columns["feature"] = np.tile(np.array(bare, dtype=object), n)
    else:
        places = np.indices(shape).reshape(len(shape), -1)
        columns |= {axis: np.tile(place, n) for axis, place in zip(view.axes, places, strict=True)}
        if view.feature_names is not None:
            columns[view.axes[-1]] = np.tile(np.array(view.feature_names, dtype=object)[places[-1]], n)
    if view.tokens is not None:
        written = [[row[k] if k < len(row) else "" for k in range(shape[0])] for row in view.tokens]
        columns["token"] = np.repeat(np.array(written, dtype=object).reshape(-1), size // max(1, shape[0]))
    for column, name in (("value", "inputs"), ("baseline", "reference")):
        given = view.like_values(name)
        columns[column] = np.full(n * size, np.nan) if given is None else given.ravel()
    columns["score"] = view.values.ravel()
    columns["stderr"] = np.full(n * size, np.nan) if view.stderr is None else view.stderr.ravel()
    return columns
