"""Batches and datasets: the one place that knows how examples are packed, cut, stacked and moved to a device.

A *batch* is a tensor, or a tuple, list, dict, mapping or dataclass of tensors (nested as deep as you like) that all share the
length of their first axis; numpy arrays of numbers count as tensors. A *dataset* is anything with ``len`` and ``[i]``, or a batch
that holds all examples at once (a list is always a dataset: of its items).
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from headwater.errors import InputError

Batch = Any
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_REREAD = 16  # examples read twice to see whether reading is random
_LIMIT = 20_000  # examples hashed one by one before a fingerprint is taken from an even sample


def tree_map(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply ``function`` to every tensor of a batch, keeping its container; other leaves (strings, numbers) pass untouched."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        batch = _tensor(batch)
    if isinstance(batch, Tensor):
        return function(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{f.name: tree_map(function, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(tree_map(function, item) for item in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(tree_map(function, item) for item in batch)
    if isinstance(batch, Mapping):
        items = {key: tree_map(function, value) for key, value in batch.items()}
        return items if type(batch) is dict else _rebuild(batch, items)
    return batch


def _tensor(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor; read-only memory (a memory map) is fine, since batches are never written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _rebuild(mapping: Mapping[str, Any], items: dict[str, Any]) -> Any:
    """A mapping of the same class where it can be built from a dict (BatchEncoding, UserDict), else a dict."""
    try:
        return type(mapping)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def leaves(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch, in order."""
    found: list[Tensor] = []
    tree_map(lambda t: found.append(t), batch)
    return iter(found)


def size(batch: Batch) -> int:
    """The number of examples in a batch. Raises InputError when its tensors disagree or it holds none."""
    lengths = {len(t) if t.ndim else None for t in leaves(batch)}
    if len(lengths) != 1 or None in lengths:
        shapes = [tuple(t.shape) for t in leaves(batch)]
        raise InputError(
            f"a batch of type {type(batch).__name__} with tensors of shapes {shapes}",
            "at least one tensor, and the same first axis (the examples) in each",
            "return tensors whose first axis counts examples, or give the task a collate= function that makes such a batch",
        )
    return int(lengths.pop())  # type: ignore[arg-type]


def take(batch: Batch, index: Any) -> Batch:
    """The examples of a batch at ``index`` (a slice or integer tensor), in the same container."""
    return tree_map(lambda t: t[index], batch)


def to(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch to a device: the only place where that happens."""
    return tree_map(lambda t: t.to(device, non_blocking=True), batch)


class Examples:
    """A dataset seen as batches by index: ``examples.batch([3, 1, 4])``.

    ``data``: a map-style dataset (``len`` and ``[i]``), or a batch that holds every example. ``collate``: as in a DataLoader.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Batch] | None = None) -> None:
        self.data: Any = data.data if isinstance(data, Examples) else data
        self.collate: Callable[[list[Any]], Batch] | None = collate or (data.collate if isinstance(data, Examples) else None)
        self.columns = self._columns()
        self.length = size(self.columns) if self.columns is not None else self._measure()

    def _columns(self) -> Batch | None:
        """All examples as one batch, where the dataset already is one: then a batch is a slice and costs nothing."""
        if self.collate is not None:
            return None
        if isinstance(self.data, TensorDataset):
            return tuple(self.data.tensors)
        if isinstance(self.data, Tensor | np.ndarray | Mapping):
            return self.data
        if dataclasses.is_dataclass(self.data) and not hasattr(self.data, "__getitem__"):
            return self.data
        # A tuple whose tensors are equally long is columns; a tuple of single examples (0-d tensors, or ragged) is a dataset.
        if isinstance(self.data, tuple) and not any(isinstance(part, list | str) for part in self.data):
            lengths = {len(t) if t.ndim else None for t in leaves(self.data)}
            return self.data if len(lengths) == 1 and None not in lengths else None
        return None

    def _measure(self) -> int:
        try:
            return len(self.data)
        except TypeError as error:
            raise InputError(
                f"a dataset of type {type(self.data).__name__} without a length",
                "a map-style dataset (len(data) and data[i]), or tensors that hold all examples",
                "turn an iterable dataset into a list of examples, or index it: scores need to name examples by number",
            ) from error

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return take(self.columns, index) if self.columns is not None else self.data[index]

    @property
    def rows_per_example(self) -> int:
        """How many rows the model sees for each example: of a diffusion model its noise events, else 1."""
        return 1

    @property
    def view(self) -> str:
        """Names how the data are seen, where that is a choice: through which noise events."""
        return ""

    def over(self, events: Any) -> Examples:
        """The same data seen through other noise events: of a diffusion task. Raises InputError for any other."""
        raise InputError(f"noise events {events!r} for data without any", "a hw.tasks.Diffusion", "use the methods for all tasks: hw.TracIn(), hw.Source() ...")

    def asked(self) -> Examples:
        """The same data as queries: noise that belongs to an example is then a query's."""
        return self

    def spread(self) -> Examples:
        """What curvature is estimated on: each noise event an example of its own; the data as they are where there are none."""
        return self

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        """The examples at ``indices`` as one batch."""
        if self.columns is not None:
            if isinstance(indices, range) and indices.step == 1:
                return take(self.columns, slice(indices.start, indices.stop))
            return take(self.columns, torch.from_numpy(np.array(indices, dtype=np.int64)))
        items = [self.data[int(i)] for i in indices]
        if self.collate is not None:
            return self.collate(items)
        try:
            return default_collate(items)
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"examples of type {type(items[0]).__name__} that torch's default_collate cannot stack: {str(error).splitlines()[0]}",
                "examples whose tensors have equal shapes, in tuples, lists or dicts",
                "give the task the collate= function of your DataLoader (it pads, or knows your class)",
            ) from error


def _digest(example: Any, hasher: Any) -> None:
    """Feed an example's content (not its identity) to a hasher; every part ends with a mark, so that [1, 23] is not [12, 3]."""
    _feed(example, hasher)
    hasher.update(b"\0")


def _feed(example: Any, hasher: Any) -> None:
    if isinstance(example, Tensor):
        t = example.detach().cpu().contiguous()
        hasher.update(f"{t.dtype}{tuple(t.shape)}".encode())
        hasher.update(t.view(torch.uint8).numpy() if t.ndim and t.numel() else str(t.tolist()).encode())
    elif isinstance(example, np.ndarray):
        numbers = example.dtype.kind in "biufc"
        _digest(_tensor(np.ascontiguousarray(example, dtype=example.dtype.newbyteorder("="))) if numbers else example.tolist(), hasher)
    elif dataclasses.is_dataclass(example) and not isinstance(example, type):
        _digest({f.name: getattr(example, f.name) for f in dataclasses.fields(example)}, hasher)
    elif isinstance(example, Mapping):
        for key in example:
            _digest(str(key), hasher)
            _digest(example[key], hasher)
    elif isinstance(example, tuple | list):
        hasher.update(f"[{len(example)}]".encode())
        for item in example:
            _digest(item, hasher)
    elif isinstance(example, set | frozenset):
        hasher.update(repr(sorted(map(repr, example))).encode())
    elif hasattr(example, "tobytes") and hasattr(example, "size"):  # an image
        hasher.update(f"{type(example).__name__}{getattr(example, 'mode', '')}{example.size}".encode())
        hasher.update(example.tobytes())
    elif getattr(type(example), "__repr__", None) is object.__repr__ and hasattr(example, "__dict__"):
        _digest({type(example).__name__: vars(example)}, hasher)
    else:
        hasher.update(_ADDRESS.sub("", repr(example)).encode())


def fingerprint(data: Any) -> str:
    """A hash of a dataset's content: equal data, equal string. Up to 20,000 examples all count; beyond that an even sample of
    as many (the string then begins with ``sampled``). A dataset whose items change from read to read (random augmentation)
    gives ``unstable-LENGTH``: then only the length can be compared."""
    examples = data if isinstance(data, Examples) else Examples(data)
    hasher = hashlib.blake2b(digest_size=16)
    if examples.columns is not None:
        _digest(examples.columns, hasher)
        return hasher.hexdigest()
    with _randomness_restored():
        for i in np.linspace(0, len(examples) - 1, min(len(examples), _REREAD)).astype(int):
            if hash_of(examples[int(i)]) != hash_of(examples[int(i)]):
                return f"unstable-{len(examples)}"
        count = min(len(examples), _LIMIT)
        hasher.update(f"{len(examples)} ".encode())
        for i in np.linspace(0, len(examples) - 1, count).astype(int):
            _digest(examples[int(i)], hasher)
    return ("sampled-" if count < len(examples) else "") + hasher.hexdigest()


@contextmanager
def _randomness_restored() -> Iterator[None]:
    """Reading a dataset may draw from the user's generators (augmentation): leave them as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def hash_of(example: Any) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    _digest(example, hasher)
    return hasher.hexdigest()
