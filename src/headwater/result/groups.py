"""Sums of attributions over groups of parts: superpixels, columns that belong together, words, whole inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InputError
from headwater.result.arrays import flattened
from headwater.result.views import View, views

if TYPE_CHECKING:
    from headwater.result.features import FeatureScores

OTHERS = "(others)"
BOUND = "Standard errors of groups are upper bounds: the sums of those of their parts, which are not independent."
ACCEPTED = "names, one for each place of the axis; a map of labels of the input's shape; or a dict from name to places (numbers, feature names or a mask)"


@dataclass(frozen=True, eq=False)
class Membership:
    """To which group each part belongs: ``codes`` (1 or n, ...) numbers into ``names``, -1 for none."""

    codes: np.ndarray
    names: tuple[str, ...]


def grouped(scores: FeatureScores, groups: Any, axis: int | None = None) -> FeatureScores:
    """See :meth:`FeatureScores.group`."""
    columns: dict[str, np.ndarray] = {}
    errors: dict[str, np.ndarray] = {}
    for view, member in zip(views(scores), memberships(scores, groups, axis), strict=True):
        _gather(columns, view.values, member)
        if view.stderr is not None:
            _gather(errors, view.stderr, member)
    known = scores.stderr is not None and len(errors) == len(columns)
    return replace(
        scores,
        values=np.stack(list(columns.values()), 1),
        stderr=np.stack([errors[name] for name in columns], 1) if known else None,
        inputs=None,
        reference=None,
        kind="table",
        feature_names=tuple(columns),
        tokens=None,
        notes=(*scores.notes, f"Values are sums over {len(columns)} groups of parts.", *((BOUND,) if known else ())),
    )


def memberships(scores: FeatureScores, groups: Any, axis: int | None = None) -> list[Membership]:
    """Which group each part of each input belongs to. Raises InputError for what is no grouping of them."""
    found = views(scores)
    return [membership(view, given, axis) for view, given in zip(found, _for_each(found, groups), strict=True)]


def _for_each(found: list[View], groups: Any) -> list[Any]:
    """The groups of each input."""
    if isinstance(groups, str):
        if groups != "inputs":
            raise InputError(f"groups={groups!r}", f"{ACCEPTED}; or 'inputs' for one group for each input", "check what you pass")
        return [{view.name or "input": np.ones(view.values.shape[1:], bool)} for view in found]
    if len(found) == 1:
        return [groups]
    names = [view.name for view in found]
    if isinstance(groups, Mapping) and set(map(str, groups)) == set(names):
        by_name = {str(name): given for name, given in groups.items()}
        return [by_name[name] for name in names]
    if isinstance(groups, tuple) and len(groups) == len(found):
        return list(groups)
    raise InputError(
        f"groups of type {type(groups).__name__} for the inputs {names}", "groups for each input, in the same structure", "pass a tuple or a dict like the inputs"
    )


def membership(view: View, groups: Any, axis: int | None = None) -> Membership:
    """Which group each part of an input belongs to. Raises InputError for what is no grouping of it."""
    shape = view.values.shape
    if axis is not None and not (-len(shape) < axis < len(shape) and axis % len(shape) != 0):
        raise InputError(f"axis={axis} of values of shape {shape}", f"1 to {len(shape) - 1}; axis 0 are the examples", "e.at() picks examples, e.summary() averages them")
    along = len(shape) - 1 if axis is None else axis % len(shape)
    if isinstance(groups, Mapping):
        return _from_dict(view, groups, along)
    if hasattr(groups, "detach"):
        groups = groups.detach().cpu().numpy()
    if isinstance(groups, np.ndarray) and groups.ndim > 1:
        return _from_map(groups, shape)
    given = list(groups)
    if given and all(isinstance(row, list | tuple | np.ndarray) for row in given):
        return _from_rows(given, shape)
    if len(given) != shape[along]:
        raise InputError(f"{len(given)} group names for values of shape {shape}", f"{shape[along]}, one for each place of axis {along}", ACCEPTED)
    return _numbered(np.array(given, dtype=object).reshape([-1 if a == along else 1 for a in range(len(shape))]), shape)


def _from_dict(view: View, groups: Mapping[Any, Any], along: int) -> Membership:
    shape = (1, *view.values.shape[1:])
    codes = np.full(shape, -1)
    for number, (name, places) in enumerate(groups.items()):
        mask = _mask(view, name, places, along)
        taken = (codes >= 0) & mask
        if taken.any():
            other = list(groups)[int(codes[taken][0])]
            raise InputError(
                f"groups {other!r} and {name!r} share {int(taken.sum())} parts",
                "each part in one group at most, so that the groups sum to the whole",
                "ask for one of them at a time",
            )
        codes[np.broadcast_to(mask, shape)] = number
    return Membership(codes, tuple(map(str, groups)))


def _mask(view: View, name: Any, places: Any, along: int) -> np.ndarray:
    """(1, ...) whether each part is one of the places: a mask, numbers along the axis, or names of features."""
    shape = view.values.shape
    found = np.asarray(places.detach().cpu() if hasattr(places, "detach") else places)
    if found.dtype == bool:
        if found.shape not in (shape[1:], shape[2:]) or not found.ndim:
            raise InputError(f"the group {name!r} with a mask of shape {found.shape}", f"{shape[1:]}", "one True or False for each part")
        return np.broadcast_to(found, shape[1:])[None]
    if found.dtype.kind in "UO" and found.size:
        found = np.array([_index(view, name, str(place)) for place in np.atleast_1d(found)])
    numbers = np.atleast_1d(found).astype(int) if found.size else np.zeros(0, int)
    length = shape[along]
    if found.size and (found.dtype.kind not in "iu" or numbers.min() < -length or numbers.max() >= length):
        raise InputError(f"the group {name!r} with the places {places!r}", f"whole numbers below {length} along axis {along}", ACCEPTED)
    line = np.zeros(length, bool)
    line[numbers] = True
    return np.broadcast_to(line.reshape([-1 if a == along else 1 for a in range(len(shape))]), (1, *shape[1:]))


def _index(view: View, group: Any, feature: str) -> int:
    names = view.feature_names or ()
    if feature not in names:
        raise InputError(
            f"the group {group!r} with the feature {feature!r}", f"one of {list(names)}" if names else "numbers: the features have no names", "check its spelling"
        )
    return names.index(feature)


def _from_map(labels: np.ndarray, shape: tuple[int, ...]) -> Membership:
    """A map for all examples, or one for each; of the input's shape, or without its channels."""
    ways = [(shape[1:], (1, *shape[1:])), (shape, shape), (shape[2:], (1, 1, *shape[2:])), ((shape[0], *shape[2:]), (shape[0], 1, *shape[2:]))]
    fitting = {full for accepted, full in ways if labels.shape == accepted and len(accepted) > 1}
    if len(fitting) > 1:
        raise InputError(
            f"a map of labels of shape {labels.shape}, which is one map with {shape[1]} channels or one for each of {shape[0]} examples",
            "a map that says which",
            f"give it in the full shape {shape}",
        )
    if fitting:
        return _numbered(labels.reshape(fitting.pop()), shape, ordered=True)
    raise InputError(
        f"a map of labels of shape {labels.shape} for values of shape {shape}",
        f"{shape[1:]}, one for all examples, or {shape}, or either without channels",
        "check its shape",
    )


def _from_rows(rows: list[Any], shape: tuple[int, ...]) -> Membership:
    """Labels of the positions of each example, None for those in no group; what is beyond them (padding) is in none."""
    if len(rows) != shape[0] or any(len(row) > shape[1] for row in rows):
        given = f"{len(rows)} rows of labels of up to {max(map(len, rows))} places"
        raise InputError(f"{given} for values of shape {shape}", f"{shape[0]} rows, with up to {shape[1]} labels each", "one row for each example")
    labels = np.full(shape[:2], None, dtype=object)
    for k, row in enumerate(rows):
        labels[k, : len(row)] = list(row)
    return _numbered(labels.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape)


def _numbered(labels: np.ndarray, shape: tuple[int, ...], ordered: bool = False) -> Membership:
    """Groups by equal label: in the order of their labels, or of first appearance."""
    flat = labels.ravel().tolist()
    distinct = dict.fromkeys(label for label in flat if label is not None)
    names = sorted(distinct) if ordered else list(distinct)
    place = {name: k for k, name in enumerate(names)} | {None: -1}
    codes = np.array([place[label] for label in flat], dtype=np.int64).reshape(labels.shape)
    full = (len(codes), *shape[1:])
    return Membership(np.broadcast_to(codes, full), tuple(map(str, names)))


def _gather(columns: dict[str, np.ndarray], values: np.ndarray, member: Membership) -> None:
    """Add to each column, (n,), the values of its group; those of no group to one column more."""
    n, count = len(values), len(member.names)
    flat = flattened(values).astype(np.float64)
    codes = flattened(member.codes) % (count + 1)  # -1, none, becomes the last
    sums = np.array([np.bincount(codes[k % len(codes)], weights=flat[k], minlength=count + 1) for k in range(n)]).reshape(n, count + 1)
    names = (*member.names, OTHERS) if (member.codes < 0).any() else member.names
    for k, name in enumerate(names):
        columns[name] = columns.get(name, 0.0) + sums[:, k]


def merged_words(scores: FeatureScores, words: Sequence[Sequence[int | None]]) -> FeatureScores:
    """Tokens merged into words: positions of the same number, next to each other or not, become one; None stays a token by itself.

    Args:
        words: for each example the number of the word that each token belongs to (a fast tokenizer's ``word_ids()``).
    """
    view = views(scores)[0]
    if not isinstance(scores.values, np.ndarray) or view.tokens is None or view.values.ndim != 2:
        raise InputError(
            f"words() of scores of kind {scores.kind!r}", "the attributions (n, tokens) of one text input, with its tokens", "explain a text model with its tokenizer"
        )
    lengths = [len(row) for row in view.tokens]
    if [len(row) for row in words] != lengths:
        raise InputError(f"word numbers for {[len(row) for row in words]} tokens", f"one for each token: {lengths}", "pass tokenizer(...).word_ids(k) for each text")
    starts = [_starts(row) for row in words]
    width = max((max(row, default=-1) + 1 for row in starts), default=0)
    sums = {name: np.zeros((scores.n, width)) for name in ("values", "stderr") if getattr(view, name) is not None}
    merged: list[tuple[str, ...]] = []
    for k, (places, row) in enumerate(zip(starts, view.tokens, strict=True)):
        for name, out in sums.items():
            np.add.at(out[k], places, getattr(view, name)[k, : len(places)].astype(np.float64))
        merged.append(tuple(_joined([token for place, token in zip(places, row, strict=True) if place == w]) for w in range(max(places, default=-1) + 1)))
    stray = max((float(np.abs(view.values[k, length:]).sum()) for k, length in enumerate(lengths)), default=0.0)
    if stray:
        raise InputError(f"scores of size {stray:.3g} on positions without a token", "zero on padding", "explain with the attention mask")
    notes = (*scores.notes, "Tokens are merged into words: the values of a word are the sums of its tokens'.", *((BOUND,) if "stderr" in sums else ()))
    return replace(scores, values=sums["values"], stderr=sums.get("stderr"), inputs=None, reference=None, tokens=tuple(merged), notes=notes)


def _starts(words: Sequence[int | None]) -> list[int]:
    """The place of each token's word among the words, in the order of first appearance."""
    places: dict[Any, int] = {}
    found = []
    for k, word in enumerate(words):
        found.append(places.setdefault(("token", k) if word is None else word, len(places)))
    return found


def _joined(pieces: list[str]) -> str:
    return "".join([piece.removeprefix("##") if k else piece for k, piece in enumerate(pieces)])
