"""A tree ensemble of any library as plain arrays, and the one place that says how values that are not numbers travel.

**How a node decides.** Every split is ``value <= threshold``, which goes left. XGBoost's ``value < threshold`` is the same with the next
smaller threshold in float64. A categorical split asks whether the category is in a set; members go left. A missing value goes where the node
sends missing values: left where ``DEFAULT_FIRST`` is set.

**Missing values and categories on the path.** They cannot be interpolated. Where the input or the baseline is missing, or the split is
categorical and the two answers differ, the feature switches from the baseline's value to the input's halfway, at a = 1/2. Binary features with
their cut in the middle of the gap cross there too, so all of them share one corner game (see :mod:`headwater.features.trees.walk`): on
data that is all categories, the attributions are the baseline (interventional) Shapley values.
LightGBM models trained with ``zero_as_missing`` read zero as missing, and so do these arrays; LightGBM columns that had no missing value in
training read NaN as zero, and so do these arrays.

**Float32.** scikit-learn's trees, XGBoost and CatBoost round values to float32 before they compare. Here a float32 number is then written as
the shortest decimal that rounds to it, up to six digits (0.1 and not 0.100000001490116), and so are float32 thresholds. That map is strictly increasing,
so no comparison changes; but crossings that coincide in decimals coincide in float64 too, instead of differing by the round-off of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np

from headwater.errors import MissingExtra

DEFAULT_FIRST, ZERO_IS_MISSING, NAN_IS_MISSING, CATEGORY = 1, 2, 4, 8
"""Bits of ``Forest.kinds``. A node with neither ..._IS_MISSING bit reads NaN as zero."""

LINKS = {"identity": 0, "sigmoid": 1, "softmax": 2, "exp": 3, "isolation": 4}


class Link(NamedTuple):
    """From margins to what the library predicts. ``slope`` multiplies the margins first; "isolation" is ``-2^(-margin)``."""

    kind: str = "identity"
    slope: float = 1.0

    def __call__(self, margins: np.ndarray) -> np.ndarray:
        """(n, outputs) -> (n, outputs).

        >>> Link("sigmoid")(np.zeros((1, 1)))
        array([[0.5]])
        """
        m = self.slope * margins
        if self.kind == "sigmoid":
            return cast(np.ndarray, 1 / (1 + np.exp(-m)))
        if self.kind == "softmax":
            e = np.exp(m - m.max(1, keepdims=True))
            return cast(np.ndarray, e / e.sum(1, keepdims=True))
        return cast(np.ndarray, np.exp(m) if self.kind == "exp" else -np.exp2(-m) if self.kind == "isolation" else m)


class Packed(NamedTuple):
    """What the compiled loops read. ``nodes``: 16 bytes each; ``kinds`` how each decides; ``deepest``: the longest way from a root to a leaf."""

    nodes: np.ndarray
    kinds: np.ndarray
    starts: np.ndarray
    words: np.ndarray
    roots: np.ndarray
    deepest: int


class Layout(NamedTuple):
    """Where each node goes in packed memory: siblings side by side in 32 bytes, tree after tree, level by level."""

    places: np.ndarray
    size: int
    deepest: int


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees one after another in flat arrays.

    left, right (nodes,): children, -1 at a leaf. feature (nodes,): -1 at a leaf. threshold (nodes,): of numeric splits; of categorical
    ones the index of their set. kinds (nodes,): see above. value (nodes, width): at leaves; width 1 where each tree adds to one output
    (``output`` (trees,) says which), else one column per output. roots (trees,). starts (sets + 1,), words: the category sets as bits of uint32.
    base (outputs,): what the trees are added to.

    single: values are rounded to float32 first. missing: NaN is a value. classes: labels, None for a regression (two classes and one
    output: the margin is that of the second class). encode: from the user's frame or array to (n, p) numbers. categorical (p,).
    precision: relative, of one addition as the library sums its trees.
    """

    left: np.ndarray
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    output: np.ndarray | None
    roots: np.ndarray
    base: np.ndarray
    features: int
    library: str
    kinds: np.ndarray | None = None
    sets: tuple[np.ndarray, ...] = ()
    single: bool = False
    missing: bool = False
    link: Link = field(default_factory=Link)
    classes: tuple[Any, ...] | None = None
    margin: str = "margin"
    names: tuple[str, ...] | None = None
    encode: Callable[[Any], Any] | None = None
    categorical: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    precision: float = 1e-13

    @property
    def outputs(self) -> int:
        """How many margins."""
        return len(self.base)

    @property
    def how(self) -> np.ndarray:
        """``kinds``, zeros where there are none."""
        return np.zeros(len(self.left), np.uint8) if self.kinds is None else self.kinds

    @cached_property
    def cuts(self) -> np.ndarray:
        """Thresholds that compare with values as :meth:`read` makes them; see "Float32" above."""
        if not self.single:
            return self.threshold
        # A library may write "missing or not" as a threshold beyond all numbers, which stays.
        finite = np.abs(self.threshold) < 3e38
        threshold = np.where(finite, self.threshold, 0.0)
        below = threshold.astype(np.float32)
        below = np.where(below.astype(float) > threshold, np.nextafter(below, np.float32(-np.inf)), below)
        low, high = decimal(below), decimal(np.nextafter(below, np.float32(np.inf)))
        near = decimal(threshold.astype(np.float32))
        near = np.where(np.abs(near - threshold) <= np.spacing(np.abs(below)), near, threshold)
        cuts = np.minimum(np.maximum(near, low), np.nextafter(high, -np.inf))
        return np.where(finite & (self.feature >= 0) & (self.how & CATEGORY == 0), cuts, self.threshold)

    def read(self, values: np.ndarray) -> np.ndarray:
        """Values as the library's predicate sees them."""
        return decimal(values.astype(np.float32)) if self.single else values

    @cached_property
    def layout(self) -> Layout:
        """The packing, found once for a forest."""
        tree = np.searchsorted(self.roots, np.arange(len(self.left)), side="right") - 1
        level, levels = self.roots, [self.roots]
        while len(inner := level[self.left[level] >= 0]):
            level = np.stack([self.left[inner], self.right[inner]], 1).ravel()
            levels.append(level)
        order = np.concatenate(levels)
        order = order[np.argsort(tree[order], kind="stable")]
        places = np.zeros(len(self.left), np.int64)
        places[order] = np.arange(len(order)) + 1 + tree[order]  # one empty place before each root, so that pairs begin at even places
        return Layout(places, len(order) + len(self.roots) + 1, len(levels))

    def packed(self, weights: np.ndarray | None = None, cuts: np.ndarray | None = None) -> Packed:
        """For the compiled loops: leaves hold ``weights`` (outputs,) times their values; None: the index of the leaf's node.

        Trees that add to an output of weight 0 are left out.
        """
        dtype = np.dtype([("c", np.float64), ("f", np.int32), ("k", np.int32)])
        places, size, deepest = self.layout
        memory = np.zeros(size + 4, dtype)
        nodes = memory[(-memory.ctypes.data // 16) % 4 :][:size]  # the array may begin anywhere in a cache line; the nodes may not
        inner = self.feature >= 0
        roots = self.roots
        if weights is None:
            leaf = np.arange(len(self.left), dtype=float)
        elif self.output is None:
            leaf = self.value @ weights
        else:
            per_tree = weights[self.output]
            roots = roots[per_tree != 0]
            tree = np.searchsorted(self.roots, np.arange(len(self.left)), side="right") - 1
            leaf = self.value[:, 0] * per_tree[tree]
        nodes["c"][places] = np.where(inner, self.cuts if cuts is None else cuts, leaf)
        nodes["f"][places] = np.where(inner, self.feature, -1)
        nodes["k"][places] = np.where(inner, places[np.maximum(self.left, 0)], 0)
        kinds = np.zeros(size, np.uint8)
        kinds[places] = self.how
        starts = np.concatenate([[0], np.cumsum([len(s) for s in self.sets], dtype=np.int64)]).astype(np.int64)
        words = np.concatenate([*self.sets, np.zeros(1, np.uint32)]).astype(np.uint32)
        return Packed(nodes, kinds, starts, words, places[roots], deepest)

    def general(self, *values: np.ndarray) -> bool:
        """Whether nodes must be asked how they decide: categories, zeros that may be missing, or NaN among these values."""
        return bool((self.how & (CATEGORY | ZERO_IS_MISSING)).any() or any(np.isnan(v).any() for v in values))

    def raw(self, x: np.ndarray) -> np.ndarray:
        """Margins (n, outputs) of values (n, p) as :meth:`read` made them, summed in float64."""
        kernels = compiled()
        packed = self.packed()
        general = self.general(x)
        total = np.tile(self.base, (len(x), 1))
        for start in range(0, len(x), 2048):
            block = np.ascontiguousarray(x[start : start + 2048])
            found = np.empty((len(block), len(self.roots)), np.int64)
            kernels.leaves(packed.nodes, packed.kinds, packed.starts, packed.words, packed.roots, block, general, found)
            leaf = packed.nodes["c"][found].astype(np.int64)
            if self.output is None:
                for k in range(self.outputs):
                    total[start : start + 2048, k] += self.value[:, k][leaf].sum(1)
            else:
                for k in np.unique(self.output):
                    total[start : start + 2048, k] += self.value[:, 0][leaf[:, self.output == k]].sum(1)
        return total

    def roundoff(self) -> np.ndarray:
        """(outputs,): how far the library's sums may be from exact ones.

        T additions of relative precision u err by less than ``λ √T u Σ|v|`` with probability above ``1 - 2 exp(-λ²/2)`` (Higham and Mary 2019);
        here λ = 8, and Σ|v| is the largest leaf of every tree and the base.
        """
        largest = np.maximum.reduceat(np.where(self.left[:, None] < 0, np.abs(self.value), 0.0), self.roots, axis=0)
        if self.output is None:
            count, size = np.full(self.outputs, len(self.roots)), largest.sum(0)
        else:
            count, size = np.bincount(self.output, minlength=self.outputs), np.bincount(self.output, largest[:, 0], self.outputs)
        return np.asarray(8 * np.sqrt(count + 1) * self.precision * (size + np.abs(self.base)))


def compiled() -> Any:
    """The compiled loops. Raises MissingExtra without numba."""
    try:
        from headwater.features.trees import kernels
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in {"numba", "llvmlite"}:
            raise
        raise MissingExtra("exact attributions of tree ensembles without numba", "numba", "pip install 'headwater[trees]'") from error
    return kernels


def decimal(values: np.ndarray) -> np.ndarray:
    """float32 numbers as float64: the decimal of six digits that rounds to them where there is one, else their exact value.

    >>> decimal(np.array([0.1, 1 / 3], np.float32)).tolist()
    [0.1, 0.3333333432674408]
    """
    exact = values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        power = 5 - np.floor(np.log10(np.abs(exact)))
        up = np.power(10.0, np.clip(power, 0, 300))
        down = np.power(10.0, np.clip(-power, 0, 300))
        short = np.where(power >= 0, np.rint(exact * up) / up, np.rint(exact / down) * down)
        same = short.astype(np.float32) == values
    return np.where(same & np.isfinite(short), short, exact)


def joined(parts: list[dict[str, np.ndarray]], **facts: Any) -> Forest:
    """A forest from trees, each a dict with left, right, feature, threshold, value (nodes, width) and perhaps kinds; children count from 0."""
    sizes = np.array([len(part["left"]) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    children = {
        side: np.concatenate([np.where(part["left"] < 0, -1, part[side].astype(np.int64) + offset) for part, offset in zip(parts, offsets, strict=True)])
        for side in ("left", "right")
    }
    feature = np.concatenate([np.where(part["left"] < 0, -1, part["feature"]) for part in parts]).astype(np.int64)
    threshold = np.concatenate([part["threshold"] for part in parts]).astype(float)
    value = np.concatenate([part["value"] for part in parts]).astype(float)
    kinds = np.concatenate([part["kinds"] for part in parts]).astype(np.uint8) if "kinds" in parts[0] else None
    return Forest(children["left"], children["right"], feature, threshold, value, roots=offsets, kinds=kinds, **facts)


def bitset(members: Any) -> np.ndarray:
    """Whole numbers as bits of uint32.

    >>> bitset([0, 33])
    array([1, 2], dtype=uint32)
    """
    members = np.asarray(members, np.int64)
    words = np.zeros(int(members.max()) // 32 + 1 if len(members) else 1, np.uint32)
    np.bitwise_or.at(words, members >> 5, (np.uint32(1) << (members & 31).astype(np.uint32)).astype(np.uint32))
    return words
