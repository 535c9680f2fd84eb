"""Do the scores stay the same when the input hardly changes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError, NotFinite
from headwater.evaluate.means import Mean, mean_of
from headwater.evaluate.parts import arrays_of
from headwater.features.tables import is_frame
from headwater.result.arrays import flattened
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class MaxSensitivity:
    """The largest relative change of the scores in a small neighbourhood (see :func:`max_sensitivity`).

    ``values`` (n,): NaN for examples whose scores are all 0. ``changes`` (draws, n): of every draw.
    """

    values: np.ndarray
    mean: Mean
    changes: np.ndarray
    radius: Any
    method: str

    def __repr__(self) -> str:
        near = self.radius if isinstance(self.radius, int | float) else "as given"
        good = "good: small; 0 is also reached by ignoring the input"
        return f"MaxSensitivity({self.method}: {self.mean} of the scores' norm, radius {near}, {len(self.changes)} draws; {good})"

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example. Needs pandas."""
        return pandas_library().DataFrame({"example": np.arange(len(self.values)), "max_sensitivity": self.values})


def max_sensitivity(explain: Callable[[Any], Any], inputs: Any, *, radius: Any = 0.02, draws: int = 10, bootstrap: int = 1000, seed: int = 0) -> MaxSensitivity:
    """``max_{|δ_j| ≤ r} ‖φ(x + δ) - φ(x)‖ / ‖φ(x)‖`` (Yeh et al. 2019, arXiv 1901.09392, Definition 4.1), by the largest of ``draws`` uniform δ.

    Good: small. It is a lower bound that grows with ``draws``: compare methods at equal draws, radius and seed. Read it beside a faithfulness
    metric: scores that ignore the input reach 0. Stability of the scores of a model that is itself unstable there would be a fault (caveat as
    everywhere: Bilodeau et al. 2022, arXiv 2212.11870).

    Args:
        explain: from inputs to scores, of *fixed* targets: ``lambda x: hw.explain(model, x, target=labels)``. Every call must be the same
            question; a method with chance in it needs its seed.
        inputs: a tensor, an array, a frame, or a tuple or dict of tensors and arrays; floating parts move, ids and texts stay.
        radius: in units of the input: a number, an array that broadcasts against the input (columns of different scale), or, for several
            inputs, a tuple or dict of these.

    Raises InputError where nothing can move, and NotFinite.

    >>> max_sensitivity(lambda x: 3 * x, np.ones((2, 4)), radius=0.1).values < 0.1
    array([ True,  True])
    """
    if draws < 1:
        raise InputError(f"draws={draws}", "at least 1", "draws=10")
    rng = np.random.default_rng(seed)
    first = explain(inputs)
    own = _flat(first)
    norm = np.linalg.norm(own, axis=1)
    changes = []
    for _ in range(draws):
        other = _flat(explain(_moved(inputs, radius, rng)))
        if other.shape != own.shape:
            raise InputError(f"scores of shape {other.shape} after {own.shape}", "scores of the same parts at every call", "fix what explain() depends on")
        changes.append(np.divide(np.linalg.norm(other - own, axis=1), norm, out=np.full(len(own), np.nan), where=norm > 0))
    found = np.stack(changes)
    values = found.max(0)
    return MaxSensitivity(values, mean_of(values, bootstrap, seed), found, radius, str(getattr(first, "method", "the given scores")))


def _flat(scores: Any) -> np.ndarray:
    flat = np.concatenate([flattened(a) for a in arrays_of(scores)], 1)
    if not np.isfinite(flat).all():
        raise NotFinite("scores that are NaN or infinite", "finite scores", "explain again, and look at the notes")
    return flat


def _moved(inputs: Any, radius: Any, rng: np.random.Generator) -> Any:
    """The inputs plus uniform noise within the radius, in their own structure."""
    found = list(_each(inputs, radius, rng))
    if not any(moved for _, moved in found):
        raise InputError("inputs of which no part can move", "floating inputs", "ids and texts have no neighbourhood: explain their embeddings")
    arrays = [array for array, _ in found]
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, arrays, strict=True))
    return tuple(arrays) if isinstance(inputs, tuple) else arrays[0]


def _each(inputs: Any, radius: Any, rng: np.random.Generator) -> Iterator[tuple[Any, bool]]:
    keys = list(inputs) if isinstance(inputs, Mapping) else range(len(inputs)) if isinstance(inputs, tuple) else None
    if keys is None:
        yield _one(inputs, radius, rng)
        return
    for key in keys:
        yield _one(inputs[key], radius[key] if isinstance(radius, tuple | Mapping) else radius, rng)


def _one(array: Any, radius: Any, rng: np.random.Generator) -> tuple[Any, bool]:
    if is_frame(array):
        names = [name for name in array.columns if getattr(array[name].dtype, "kind", "O") == "f"]
        return array.assign(**dict(zip(names, _noisy(array[names].to_numpy(), radius, rng).T, strict=True))), bool(names)
    if isinstance(array, Tensor):
        if not array.is_floating_point():
            return array, False
        return array + torch.from_numpy(_noise(tuple(array.shape), radius, rng)).to(array), True
    array = np.asarray(array)
    return (_noisy(array, radius, rng), True) if array.dtype.kind == "f" else (array, False)


def _noisy(array: np.ndarray, radius: Any, rng: np.random.Generator) -> np.ndarray:
    return (array + _noise(array.shape, radius, rng)).astype(array.dtype)


def _noise(shape: tuple[int, ...], radius: Any, rng: np.random.Generator) -> np.ndarray:
    reach = np.asarray(radius.detach().cpu() if isinstance(radius, Tensor) else radius, dtype=float)
    try:
        reach = np.broadcast_to(reach, shape)
    except ValueError as error:
        raise InputError(f"a radius of shape {reach.shape} for inputs of shape {shape}", "a number, or a shape that broadcasts", "radius=0.02") from error
    if not np.isfinite(reach).all() or (reach < 0).any() or not (reach > 0).any():
        raise InputError(f"radius={radius!r}", "at least 0, and above 0 somewhere", "radius=0.02")
    return rng.uniform(-1, 1, shape) * reach
