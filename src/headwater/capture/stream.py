"""One pass over a dataset in batches: moves each batch to the device, halves a batch that does not fit, and never loses its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from headwater.errors import HeadwaterError
from headwater.tasks.batches import Batch, Examples, to

T = TypeVar("T")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (CUDA's own class, Python's, or the CPU allocator's message)."""
    if isinstance(error, HeadwaterError):
        return False
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _MEMORY_WORDS))


def stream(
    examples: Examples,
    ids: Sequence[int] | np.ndarray | range,
    process: Callable[[Batch, np.ndarray], T],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[np.ndarray, T]]:
    """Yield ``(ids, process(batch, ids))`` for the examples in ``ids``, in order.

    ``batch_size`` counts what the model sees: of examples with several noise events fewer are taken at once.
    ``process`` must leave nothing behind but its result: when it runs out of memory its batch is cut in half and tried again.
    """
    ids, start = np.asarray(ids), 0
    batch_size = max(1, batch_size // examples.rows_per_example)
    while start < len(ids):
        part = ids[start : start + batch_size]
        failed = False
        try:
            result = process(to(examples.batch(part), device), part)
        except Exception as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
            failed = True  # leave the except block first: the traceback holds the tensors that did not fit
        if failed:
            batch_size = len(part) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield part, result
        start += len(part)
