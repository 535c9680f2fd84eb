"""Which features matter over a whole data set: explained batch by batch, summed up, nothing kept.

hw.summarize(model, loader, inputs=0, target=hw.targets.log_odds(1))                   # batches are (x, labels): x goes into the model
hw.summarize(model, loader, inputs=0, each=lambda batch: {"target": batch[1]})         # every example's own class
hw.summarize(forest, X_test, target=1, groups=hw.regions.columns(names, of=["age", "job"]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from headwater.errors import InputError
from headwater.features import targets
from headwater.features.explain import explain
from headwater.features.question import Question
from headwater.features.tables import is_frame, is_sparse
from headwater.result.summary import Accumulator, Summary
from headwater.tasks.batches import Examples

SETTINGS = frozenset(f.name for f in dataclasses.fields(Question)) - {"model", "inputs", "progress"}
"""What may be said once for all batches, or, in ``each``, for one batch."""


def summarize(
    model: Any,
    batches: Any,
    target: Any = None,
    *,
    inputs: Any = None,
    each: Callable[[Any], Mapping[str, Any]] | None = None,
    groups: Any = None,
    axis: int | None = None,
    at_once: int = 256,
    into: Accumulator | None = None,
    progress: bool = True,
    **settings: Any,
) -> Summary:
    """Explain a data set of any length and keep the summary: mean, mean size, spread, share of each sign and rank of every feature.

    Equal to ``hw.explain(...).summary()`` of all examples at once, but for rounding. (Noise of ``smooth=`` depends on the place of an
    example in its batch; there, only on average.)

    Args:
        batches: a DataLoader, a list or any other iterable of batches; or the data themselves, which are cut into batches of ``at_once``
            examples: an array, a tensor, a data frame, a tuple or dict of arrays, or a data set (``len`` and ``[i]``).
        target: as in :func:`headwater.explain`. Where it holds one index or label for each example, these are those of all the data in order.
        inputs: what of a batch goes into the model: its place or key, or a function of the batch. Default: all of it. Batches that are
            tuples or lists need it, since ``(x, labels)`` and two inputs look alike.
        each: ``each(batch)`` gives arguments of ``explain`` that hold for this batch alone: ``{"target": batch[1]}``, ``extra``, ...
        groups, axis: fold parts together first, as :meth:`FeatureScores.group` does; groups that are the same for all examples.
        at_once: examples explained at a time, where data are cut.
        into: an accumulator that the examples are added to. It keeps what has been summed up when Ctrl-C or an error ends the call, and
            ``into.summary()`` reads it; passing it again goes on with further batches.
        settings: further arguments of ``explain``: baseline, tolerance, rule, extra, ...

    Raises InputError for batches that the model cannot take, naming the examples; what ``explain`` raises; KeyboardInterrupt on Ctrl-C.

    >>> import torch
    >>> data = torch.arange(12.0).reshape(6, 2)
    >>> summarize(torch.nn.Linear(2, 1), data, at_once=4, progress=False).n
    6
    """
    unknown = set(settings) - SETTINGS
    if unknown:
        raise InputError(f"the argument {sorted(unknown)[0]}=", f"one of {', '.join(sorted(SETTINGS))}", "see hw.explain")
    if at_once < 1 or at_once != int(at_once):
        raise InputError(f"at_once={at_once}", "a whole number of at least 1", "at_once=256")
    gathered, seen = Accumulator() if into is None else into, 0
    source, count = _cut(batches, int(at_once))
    _long_enough(target, count)
    with tqdm(source, desc="summarize", unit="batch", total=_length(source), disable=not progress, delay=2.0, leave=False) as bar:
        for number, batch in enumerate(bar):
            try:
                given = _picked(batch, inputs)
                size = _size(given)
                if size:
                    asked = _asked(batch, _sliced(target, seen, seen + size), each, settings)
                    scores = explain(model, given, **asked, progress=False)
                    gathered.add(scores if groups is None else scores.group(groups, axis))
                seen += size
            except BaseException as error:
                error.add_note(f"While summing up batch {number}, after {seen:,} examples. An accumulator passed as into= keeps what was summed up before.")
                raise
    return gathered.summary()


# ---- batches -------------------------------------------------------------------------------------------------------------------------


def _cut(data: Any, at_once: int) -> tuple[Iterable[Any], int | None]:
    """The batches, and how many examples they hold where that is known beforehand."""
    if is_frame(data):
        return _Cut(lambda a, b: data.iloc[a:b], len(data), at_once), len(data)
    if is_sparse(data):
        rows = data.tocsr()
        return _Cut(lambda a, b: rows[a:b], rows.shape[0], at_once), int(rows.shape[0])
    if isinstance(data, np.ndarray) and data.ndim:  # of text too
        return _Cut(lambda a, b: data[a:b], len(data), at_once), len(data)
    if isinstance(data, Tensor | Mapping | tuple) or (hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, list | str)):
        examples = Examples(data)
        return _Cut(lambda a, b: examples.batch(range(a, b)), len(examples), at_once), len(examples)
    if isinstance(data, Iterable) and not isinstance(data, str):
        return data, None
    raise InputError(
        f"batches of type {type(data).__name__}", "an iterable of batches, or data: an array, a tensor, a frame, a data set", "pass a DataLoader, or the array itself"
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Data in pieces: ``piece(a, b)`` holds the examples from a to b."""

    piece: Callable[[int, int], Any]
    count: int
    at_once: int

    def __len__(self) -> int:
        return -(-self.count // self.at_once)

    def __iter__(self) -> Iterator[Any]:
        return (self.piece(a, min(a + self.at_once, self.count)) for a in range(0, self.count, self.at_once))


def _length(source: Iterable[Any]) -> int | None:
    """How many batches, where that is known."""
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None


def _picked(batch: Any, inputs: Any) -> Any:
    """What of a batch goes into the model."""
    if callable(inputs):
        return inputs(batch)
    if inputs is not None:
        try:
            return batch[inputs]
        except (KeyError, IndexError, TypeError) as error:
            found = list(batch) if isinstance(batch, Mapping) else f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
            raise InputError(f"inputs={inputs!r} of a batch with {found}", "a place or a key that the batch has", "inputs=lambda batch: ... for anything else") from error
    if isinstance(batch, tuple) or (isinstance(batch, list) and any(isinstance(part, Tensor | np.ndarray) for part in batch)):
        raise InputError(
            f"batches that are a {type(batch).__name__} of {len(batch)}",
            "inputs=, which says what of a batch goes into the model",
            "inputs=0 where batches are (x, labels); inputs=tuple where all of it are inputs",
        )
    return batch


def _size(given: Any) -> int:
    """How many examples the inputs hold."""
    parts = list(given.values()) if isinstance(given, Mapping) else list(given) if isinstance(given, tuple) else [given]
    if not parts:
        return 0
    shape = getattr(parts[0], "shape", None)
    return int(shape[0]) if shape else len(parts[0])


# ---- what is asked of each ------------------------------------------------------------------------------------------------------------


def _asked(batch: Any, target: Any, each: Callable[[Any], Mapping[str, Any]] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``explain`` for a batch."""
    own = dict(each(batch)) if each is not None else {}
    unknown = set(own) - SETTINGS
    if unknown:
        raise InputError(f"each(batch) gave {sorted(map(str, unknown))[0]!r}", f"some of {', '.join(sorted(SETTINGS))}", 'each=lambda batch: {"target": batch[1]}')
    twice = set(own) & ({*settings} | ({"target"} if target is not None else set()))
    if twice:
        raise InputError(f"{sorted(twice)[0]} both for all batches and in each(batch)", "one of them", "leave one out")
    return {"target": target, **settings, **own}


def _sliced(target: Any, start: int, stop: int) -> Any:
    """A target for some of the examples: what it holds for each example is cut, everything else stays."""
    if _one_each(target):
        if len(target) < stop:
            raise InputError(f"{len(target)} targets for example {stop - 1}", "one for each example of the data", "target=[...] as long as the data, or each=")
        return target.iloc[start:stop] if hasattr(target, "iloc") else target[start:stop]
    if _ours(target):
        return dataclasses.replace(target, **{f.name: _sliced(getattr(target, f.name), start, stop) for f in dataclasses.fields(target) if f.init})
    return target


def _long_enough(target: Any, count: int | None) -> None:
    """Raise InputError before any work where a target holds another number of examples than the data."""
    if count is None:
        return
    if _one_each(target) and len(target) != count:
        raise InputError(f"{len(target)} targets for {count} examples", "one for each", "target=[...] as long as the data, or a single number")
    if _ours(target):
        for f in dataclasses.fields(target):
            _long_enough(getattr(target, f.name), count)


def _ours(target: Any) -> bool:
    """Whether a target is one of hw.targets, whose arrays are known to hold one value for each example."""
    return type(target).__module__ == targets.__name__ and dataclasses.is_dataclass(target)


def _one_each(target: Any) -> bool:
    return isinstance(target, list) or (isinstance(target, np.ndarray | Tensor) and target.ndim > 0) or (hasattr(target, "iloc") and hasattr(target, "index"))
