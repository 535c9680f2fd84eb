"""A user's examples as cards: a picture where an example looks like one, its text where it is one, else its first numbers.

Knows arrays only: whatever numpy can read (a tensor on the CPU too) is an array, and a dataset is anything that can be indexed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.report.explanations import Overlay
from headwater.report.parts import Attribution, Card

SMALLEST = 8  # a matrix with fewer rows or columns is a table of numbers, not a picture
NUMBERS = 8  # how many numbers of an example are written
LETTERS = 600  # how much of a text is shown


@dataclass(frozen=True, eq=False)
class Exhibit:
    """Examples that can be shown.

    Args:
        data: a batch that holds all of them, a dataset, or None (then cards have names only).
        names: what each is called; default ``#0``, ``#1`` and so on.
        notes: a line about each, such as its label; default: the label where an example ends in one.
        flags: number of an example -> what to notice about it.
        overlays: number of an example -> which of its pixels carried what is asked about.

    >>> Exhibit((np.zeros((5, 28, 28), np.uint8), np.arange(5))).card(3).subtitle
    'label 3'
    >>> Exhibit(["a text", "another"], flags={1: "seen twice"}).card(1).text
    'another'
    >>> Exhibit({"x": np.arange(6.0).reshape(2, 3)}).card(1).text
    '3.00, 4.00, 5.00'
    """

    data: Any = None
    names: Sequence[str] | None = None
    notes: Sequence[str] | None = None
    flags: Mapping[int, str] | None = None
    overlays: Mapping[int, Overlay] | None = None

    def card(self, index: int, score: float | None = None, stderr: float | None = None) -> Card:
        """The card of one example."""
        example = None if self.data is None else item(self.data, index)
        image = next((p for p in map(picture, _parts(example)) if p is not None), None)
        return Card(
            title=f"#{index}" if self.names is None else str(self.names[index]),
            subtitle=_label(example) if self.notes is None else str(self.notes[index]),
            image=image,
            text=wording(example) if image is None else None,
            score=score,
            stderr=stderr,
            flag=(self.flags or {}).get(index),
            overlay=(self.overlays or {}).get(index),
        )


def attribution(query: Card, values: np.ndarray, stderr: np.ndarray | None, train: Exhibit, k: int = 6) -> Attribution:
    """A query with the ``k`` training examples of the largest positive scores and the ``k`` of the most negative ones.

    >>> shown = attribution(Card("query"), np.array([0.5, -1.0, 2.0]), None, Exhibit())
    >>> [card.title for card in shown.proponents], [card.title for card in shown.opponents]
    (['#2', '#0'], ['#1'])
    """
    order = np.argsort(-values, kind="stable")
    up = [int(i) for i in order[:k] if values[i] > 0]
    down = [int(i) for i in order[::-1][:k] if values[i] < 0]

    def cards(chosen: list[int]) -> tuple[Card, ...]:
        return tuple(train.card(i, float(values[i]), None if stderr is None else float(stderr[i])) for i in chosen)

    return Attribution(query, cards(up), cards(down))


def item(data: Any, index: int) -> Any:
    """One example of a dataset, or of a batch (tuple, mapping or array) that holds all."""
    if isinstance(data, Mapping):
        return {key: column[index] for key, column in data.items()}
    if _is_columns(data):
        return tuple(column[index] for column in data)
    return data[index]


def count(data: Any) -> int:
    """How many examples a dataset holds, or a batch that holds all of them.

    >>> count((np.zeros((5, 2)), np.zeros(5))), count({"x": np.zeros(3)}), count(["a", "b"])
    (5, 3, 2)
    """
    if isinstance(data, Mapping):
        return len(next(iter(data.values())))
    return len(data[0]) if _is_columns(data) else len(data)


def _is_columns(data: Any) -> bool:
    """Whether a tuple holds the examples' parts, each for all of them, rather than examples."""
    return isinstance(data, tuple) and len({len(column) if hasattr(column, "shape") and len(column.shape) else None for column in data} | {None}) == 2


def picture(part: Any) -> np.ndarray | None:
    """The part as a uint8 image where it looks like one: (height, width), or with 1 or 3 channels before or after.

    Floats from 0 to 1 or from -1 to 1 and integers from 0 to 255 are shown as they are; anything else (standardised images) is stretched to full range.
    """
    pixels = _array(part)
    if pixels is None:
        return None
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and min(pixels.shape[1:]) >= SMALLEST:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or min(pixels.shape[:2]) < SMALLEST or (pixels.ndim == 3 and pixels.shape[2] != 3):
        return None
    if pixels.dtype == np.uint8:
        return pixels
    low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
    if pixels.dtype.kind == "f" and low >= -1 and high <= 1:
        low, high = (0.0 if low >= 0 else -1.0), 1.0
    elif pixels.dtype.kind != "f" and low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    span = high - low
    scaled = (pixels.astype(np.float64) - low) / (span if span > 0 else 1.0)
    return (np.clip(np.nan_to_num(scaled), 0, 1) * 255).round().astype(np.uint8)


def wording(example: Any) -> str | None:
    """The first text of an example, or the first numbers of its first array."""
    for part in _parts(example):
        if isinstance(part, str):
            return part if len(part) <= LETTERS else part[:LETTERS] + " …"
    numbers = next((a for a in map(_array, _parts(example)) if a is not None and a.ndim), None)
    if numbers is None:
        return None
    flat = numbers.ravel()
    written = [str(v) if flat.dtype.kind in "iub" else f"{v:.2f}" for v in flat[:NUMBERS].tolist()]
    return ", ".join(written) + (f", … ({flat.size} numbers)" if flat.size > NUMBERS else "")


def _label(example: Any) -> str:
    """The label of an example: a last part that is a single number."""
    parts = list(_parts(example))
    last = _array(parts[-1]) if len(parts) > 1 else None
    if last is None or last.size != 1:
        return ""
    value = last.reshape(-1)[0].item()
    return f"label {value}" if last.dtype.kind in "iub" else f"target {value:.3g}"


def _parts(example: Any) -> Iterator[Any]:
    """What an example is made of, in order."""
    if isinstance(example, Mapping):
        yield from example.values()
    elif isinstance(example, tuple | list):
        yield from example
    elif example is not None:
        yield example


def _array(part: Any) -> np.ndarray | None:
    """The part as an array of numbers, None where it is none."""
    if isinstance(part, str) or part is None:
        return None
    found = np.asarray(part.detach().cpu() if hasattr(part, "detach") else part)
    return found if found.dtype.kind in "biuf" and found.size else None
