"""Do explanations agree with each other, and with a region that is known to matter?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.means import Mean, mean_of, written
from headwater.evaluate.parts import arrays_of
from headwater.result.arrays import flattened
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas

MEASURES = ("spearman", "pearson", "top", "sign")


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far explanations agree, pair by pair (see :func:`agreement`).

    ``per_example[measure][a, b]`` (n,), NaN where it is undefined. ``k``: of the top-k overlap, ``chance``: what random rankings reach there.
    """

    names: tuple[str, ...]
    per_example: dict[str, dict[tuple[str, str], np.ndarray]]
    means: dict[str, dict[tuple[str, str], Mean]]
    k: int
    chance: float

    def matrix(self, measure: str = "spearman") -> np.ndarray:
        """(methods, methods): mean over examples, 1 on the diagonal."""
        if measure not in MEASURES:
            raise InputError(f"measure={measure!r}", f"one of {', '.join(MEASURES)}", 'measure="spearman"')
        found = np.eye(len(self.names))
        for (a, b), mean in self.means[measure].items():
            i, j = self.names.index(a), self.names.index(b)
            found[i, j] = found[j, i] = mean.mean
        return found

    def __repr__(self) -> str:
        pairs = []
        for pair in self.means["spearman"]:
            said = ", ".join(f"{f'top-{self.k} overlap' if m == 'top' else m} {self.means[m][pair]}" for m in MEASURES)
            pairs.append(f"{' and '.join(pair)}: {said}")
        return f"Agreement({'; '.join(pairs)}; 1: the same, chance 0 (top-{self.k}: {written(self.chance)}, sign: 0.5); agreement is not faithfulness)"

    @property
    def table(self) -> report.Table:
        """One row for each pair, for a report."""
        rows = tuple((" and ".join(pair), *(repr(self.means[m][pair]) for m in MEASURES)) for pair in self.means["spearman"])
        return report.Table(("", "Spearman", "Pearson", f"top-{self.k} overlap", "same sign"), rows)

    def to_frame(self) -> pandas.DataFrame:
        """One row for each pair and example. Needs pandas."""
        pandas = pandas_library()
        found = []
        for a, b in self.means["spearman"]:
            columns = {m: self.per_example[m][a, b] for m in MEASURES}
            found.append(pandas.DataFrame({"first": a, "second": b, "example": np.arange(len(columns["sign"])), **columns}))
        return pandas.concat(found, ignore_index=True)


def agreement(first: Any, second: Any = None, *, k: int = 10, names: tuple[str, str] | None = None, bootstrap: int = 1000, seed: int = 0) -> Agreement:
    """Spearman and Pearson correlation, overlap of the k largest ``|φ|``, and share of equal signs, for each example, between explanations.

    Good: depends on the question. Two runs, two baselines of one meaning, or two training seeds should agree (near 1); two methods that
    disagree cannot both be what the model does. Agreement is no evidence of faithfulness: two wrong methods can agree (and complete ones can
    be no better than chance about counterfactual behaviour: Bilodeau et al. 2022, arXiv 2212.11870).

    Args:
        first, second: FeatureScores or arrays (tuples, dicts of them) of the same shapes; or ``first`` a dict of several, by name: all pairs.
        k: parts compared by the overlap ``|A ∩ B| / k``, at most all of them. Equal scores: those that come first.
        names: of the two.

    Signs are compared on parts that are not 0 in either; a constant explanation has no correlation (NaN, left out).

    >>> agreement(np.array([[3.0, -1.0, 2.0]]), np.array([[6.0, -2.0, 4.0]]), k=1).matrix("sign")
    array([[1., 1.],
           [1., 1.]])
    """
    flat = _named(first, second, names)
    size = next(iter(flat.values())).shape[1]
    if k < 1:
        raise InputError(f"k={k}", "at least 1", "k=10")
    k = min(k, size)
    per: dict[str, dict[tuple[str, str], np.ndarray]] = {m: {} for m in MEASURES}
    for a, b in combinations(flat, 2):
        per["spearman"][a, b] = spearman(flat[a], flat[b])
        per["pearson"][a, b] = correlation(flat[a], flat[b])
        per["top"][a, b] = _overlap(flat[a], flat[b], k)
        per["sign"][a, b] = _signs(flat[a], flat[b])
    means = {m: {pair: mean_of(v, bootstrap, seed) for pair, v in found.items()} for m, found in per.items()}
    return Agreement(tuple(flat), per, means, k, k / size)


@dataclass(frozen=True, eq=False)
class MassIn:
    """How much of an explanation lies in a region (see :func:`mass_in`).

    ``values`` (n,): share of the positive scores inside, NaN where none is positive. ``hits`` (n,): whether the largest score is inside (the
    pointing game). ``area`` (n,): share of the parts inside, which is what scores without any knowledge reach in both.
    """

    values: np.ndarray
    mean: Mean
    hits: np.ndarray
    hit: Mean
    area: np.ndarray
    method: str

    def __repr__(self) -> str:
        chance = written(float(self.area.mean()))
        return f"MassIn({self.method}: {self.mean} of the positive mass inside, pointing game {self.hit}; good: near 1 if the region alone matters; chance {chance})"

    @property
    def bars(self) -> report.Bars:
        """For a report."""
        rows = (report.Bar("mass inside", self.mean.mean, *self.mean.bounds), report.Bar("largest inside", self.hit.mean, *self.hit.bounds))
        return report.Bars(rows, (report.Line("chance (area)", float(self.area.mean())),))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example. Needs pandas."""
        columns = {"example": np.arange(len(self.values)), "mass": self.values, "hit": self.hits, "area": self.area}
        return pandas_library().DataFrame(columns)


def mass_in(scores: Any, mask: Any, *, bootstrap: int = 1000, seed: int = 0) -> MassIn:
    """``Σ_{j in mask} max(φ_j, 0) / Σ_j max(φ_j, 0)``, and the pointing game (Zhang et al. 2016, arXiv 1608.00507): is the largest score inside?

    Good: near 1, and far above the area of the mask. The region is known to be right only for *planted* cues (a patch put into images of one
    class): a low value for an annotated object may mean that the model looks elsewhere, which is what was asked.
    Caveat: mass inside does not say that the region causes the output (Bilodeau et al. 2022, arXiv 2212.11870).

    Args:
        scores: FeatureScores or an array (a tuple or dict: with masks in the same structure).
        mask: True inside; of the scores' shape, without the examples (the same for all), or broadcasting against it (no channels: give them
            an axis of 1).

    >>> mass_in(np.array([[3.0, -1.0, 1.0]]), np.array([True, False, False])).values
    array([0.75])
    """
    values = arrays_of(scores)
    masks = _masks(mask, values)
    flat = np.concatenate([flattened(v) for v in values], 1)
    inside = np.concatenate([flattened(m) for m in masks], 1)
    _finite(flat)
    if not inside.any(1).all():
        raise InputError("a mask with nothing inside for some example", "at least one part inside", "leave those examples out: scores.at(...)")
    positive = np.maximum(flat, 0)
    total = positive.sum(1)
    share = np.divide((positive * inside).sum(1), total, out=np.full(len(flat), np.nan), where=total > 0)
    best = flat == flat.max(1, keepdims=True)
    hits = (best & inside).sum(1) / best.sum(1)  # equal largest ones share the hit
    method = str(getattr(scores, "method", "the given scores"))
    return MassIn(share, mean_of(share, bootstrap, seed), hits, mean_of(hits, bootstrap, seed), inside.mean(1), method)


# ---- their mathematics -----------------------------------------------------------------------------------------------------------


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) Pearson correlation of rows (n, parts); NaN where one is constant up to round-off.

    >>> correlation(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]]))
    array([1.])
    """
    size = np.abs(a).max(1, initial=0), np.abs(b).max(1, initial=0)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    spread = np.sqrt((a * a).mean(1)), np.sqrt((b * b).mean(1))
    varied = (spread[0] > 1e-12 * size[0]) & (spread[1] > 1e-12 * size[1])
    found = np.divide((a * b).mean(1), spread[0] * spread[1], out=np.full(len(a), np.nan), where=varied)
    return np.clip(found, -1, 1)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) correlation of ranks of rows (n, parts), ties sharing their average rank; NaN where one is constant."""
    from scipy.stats import rankdata

    return correlation(rankdata(a, axis=1), rankdata(b, axis=1))


def _overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    top = [np.zeros(a.shape, bool) for _ in range(2)]
    for mask, scores in zip(top, (a, b), strict=True):
        np.put_along_axis(mask, np.argsort(-np.abs(scores), axis=1, kind="stable")[:, :k], True, axis=1)
    return (top[0] & top[1]).sum(1) / k


def _signs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = (a != 0) & (b != 0)
    return np.divide(((np.sign(a) == np.sign(b)) & both).sum(1), both.sum(1), out=np.full(len(a), np.nan), where=both.any(1))


def _named(first: Any, second: Any, names: tuple[str, str] | None) -> dict[str, np.ndarray]:
    """Flat scores (n, parts) by name, all of one shape."""
    if second is None:
        if not isinstance(first, Mapping) or len(first) < 2:
            raise InputError("one explanation", "two, or a dict of several by name", 'agreement({"IG": a, "gradient": b, "occlusion": c})')
        held = dict(first)
    else:
        called = names or tuple(str(getattr(s, "method", "")) for s in (first, second))
        called = called if all(called) and called[0] != called[1] else ("first", "second")
        if len(called) != 2:
            raise InputError(f"names={names!r}", "two names", 'names=("IG", "gradient")')
        held = dict(zip(called, (first, second), strict=True))
    arrays = {str(name): arrays_of(scores) for name, scores in held.items()}
    shapes = {name: [a.shape for a in found] for name, found in arrays.items()}
    if len({str(s) for s in shapes.values()}) != 1:
        raise InputError(f"explanations of shapes {shapes}", "the same shapes", "explain the same inputs; bring them to the same parts with group()")
    flat = {name: np.concatenate([flattened(a) for a in found], 1) for name, found in arrays.items()}
    for one in flat.values():
        _finite(one)
    return flat


def _finite(flat: np.ndarray) -> None:
    if not flat.size:
        raise InputError("scores of no examples, or of no parts", "at least one of each", "explain some inputs")
    if not np.isfinite(flat).all():
        raise NotFinite("scores that are NaN or infinite", "finite scores", "explain again, and look at the notes")


def _masks(mask: Any, values: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    held = list(mask.values()) if isinstance(mask, Mapping) else list(mask) if isinstance(mask, tuple) else [mask]
    if len(held) != len(values):
        raise InputError(f"{len(held)} masks for {len(values)} inputs", "one for each", "a tuple of masks")
    found = []
    for one, v in zip(held, values, strict=True):
        table = np.asarray(one.cpu() if hasattr(one, "cpu") else one)
        if table.dtype != bool:
            raise InputError(f"a mask of type {table.dtype}", "True and False", "mask > 0.5, say")
        try:
            found.append(np.broadcast_to(table, v.shape))
        except ValueError as error:
            raise InputError(
                f"a mask of shape {table.shape} for scores of shape {v.shape}", "a shape that broadcasts against it", "mask[:, None] adds channels"
            ) from error
    return found
