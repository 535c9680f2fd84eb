"""One array, or several in the structure that a model's inputs have; all begin with the axis of examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Arrays = np.ndarray | tuple[np.ndarray, ...] | dict[str, np.ndarray]
"""One array, or several in the structure that the model's inputs have; all begin with the axis of examples."""


def leaves(arrays: Arrays) -> tuple[np.ndarray, ...]:
    """The arrays of a structure, in order."""
    if isinstance(arrays, np.ndarray):
        return (arrays,)
    return tuple(arrays.values()) if isinstance(arrays, Mapping) else tuple(arrays)


def rebuilt(like: Arrays, found: Sequence[np.ndarray]) -> Arrays:
    """``found`` in the structure of ``like``.

    >>> rebuilt({"a": np.zeros(1), "b": np.ones(1)}, [np.ones(1), np.zeros(1)])
    {'a': array([1.]), 'b': array([0.])}
    """
    if isinstance(like, np.ndarray):
        return found[0]
    return dict(zip(like, found, strict=True)) if isinstance(like, Mapping) else tuple(found)


def called(arrays: Arrays) -> tuple[str, ...]:
    """What each array of a structure is called: nothing for one alone.

    >>> called(np.zeros(1)), called((np.zeros(1), np.zeros(1))), called({"camera": np.zeros(1)})
    (('',), ('input 0', 'input 1'), ('camera',))
    """
    if isinstance(arrays, np.ndarray):
        return ("",)
    return tuple(map(str, arrays)) if isinstance(arrays, Mapping) else tuple(f"input {k}" for k in range(len(arrays)))


def flattened(array: np.ndarray) -> np.ndarray:
    """(n, parts): all axes but that of the examples in one, of no examples too."""
    return array.reshape(len(array), math.prod(array.shape[1:]))


def named_leaves(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Each array with a name that says which structure it stands in: '', '/0', '.key'."""
    if isinstance(arrays, np.ndarray):
        yield "", arrays
    elif isinstance(arrays, Mapping):
        yield from ((f".{key}", array) for key, array in arrays.items())
    else:
        yield from ((f"/{k}", array) for k, array in enumerate(arrays))


def restructured(name: str, arrays: Mapping[str, np.ndarray]) -> Arrays | None:
    """The structure that was kept under ``name``; None where there is none."""
    if name in arrays:
        return arrays[name]
    keyed = {key[len(name) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{name}.")}
    listed = sorted((int(key[len(name) + 1 :]), array) for key, array in arrays.items() if key.startswith(f"{name}/"))
    return keyed or tuple(array for _, array in listed) or None
