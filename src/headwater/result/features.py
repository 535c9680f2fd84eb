"""Which parts of the input: attributions with their error, and what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.result import files, frames, pages, pictures
from headwater.result.arrays import Arrays, leaves, named_leaves, rebuilt, restructured
from headwater.result.groups import grouped, merged_words
from headwater.result.summary import Accumulator, Summary
from headwater.result.views import part_name, views

if TYPE_CHECKING:
    import pandas

SIGN = "positive: the part raised the output above its value at the baseline; the values of an example sum to output - baseline output"
_STRUCTURED = ("values", "stderr", "inputs", "reference")
_PLAIN = ("residual", "evaluations", "output", "baseline_output", "converged", "error")
_FACTS = ("method", "target", "baseline", "kind", "feature_names", "example_names", "tokens", "notes", "provenance")


@dataclass(frozen=True, eq=False)
class FeatureScores:
    """Attributions of the output of n examples to the parts of their inputs.

    Args:
        values: like the inputs: one array (n, ...), or a tuple or dict of them. In units of the output: positive means that the part
            raised the output above its value at the baseline. All values of an example sum to ``output - baseline_output + residual``.
        residual: (n,) completeness gap ``sum of values - (output - baseline_output)``, signed, in units of the output. It is a lower
            bound on the error of the attributions, not the error itself (see docs/explain.md).
        evaluations: (n,) how many times the model was evaluated for the example (a gradient or an output counts one; exact integrators: 0).
        output, baseline_output: (n,) what was explained, at the input and at the baseline (the mean over several baselines).
        method, target, baseline: in words: how it was integrated, which output was explained, what it was compared with.
        error: (n,) estimated ``|values - exact| / |values|`` (Euclidean norms), or None where it cannot be estimated.
        converged: (n,) whether the tolerance that was asked for is met; None where none was asked for.
        stderr: like values: standard error over several baselines (or noise draws); None where there is one.
        inputs, reference: like values where possible: the inputs and the (mean) baseline, for pictures.
        kind: what the inputs are ("image", "table", "text", "series" or "array"); decides how pictures are drawn.
        feature_names: of the last axis, or None. example_names: of the first. tokens: for each example the text of each position.
        notes: what was found and handled, in sentences (a module in training mode, a baseline equal to its input, ...).
        provenance: settings and cost.

    >>> e = FeatureScores(np.array([[1.0, -0.5]]), np.zeros(1), np.array([16]), np.array([2.0]), np.array([1.5]), "by hand", "output 0", "zeros")
    >>> float(e.values.sum()) == float(e.output[0] - e.baseline_output[0])
    True
    """

    values: Arrays
    residual: np.ndarray
    evaluations: np.ndarray
    output: np.ndarray
    baseline_output: np.ndarray
    method: str
    target: str
    baseline: str
    converged: np.ndarray | None = None
    error: np.ndarray | None = None
    stderr: Arrays | None = None
    inputs: Arrays | None = None
    reference: Arrays | None = None
    kind: str = "array"
    feature_names: tuple[str, ...] | None = None
    example_names: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] | None = None
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for array in leaves(self.values):
            if len(array) != self.n:
                raise InputError(f"values for {len(array)} examples and {self.n} residuals", "one row of values for each residual", "check what you pass")
        if self.example_names is not None and len(self.example_names) != self.n:
            raise InputError(f"{len(self.example_names)} example_names for {self.n} examples", "one name each", "name every example, or none")

    @property
    def n(self) -> int:
        """How many examples were explained."""
        return len(self.residual)

    def __len__(self) -> int:
        return self.n

    @property
    def relative_residual(self) -> np.ndarray:
        """(n,) ``|residual| / |output - baseline_output|``; 0 where both are 0."""
        change = np.abs(self.output - self.baseline_output)
        return np.divide(np.abs(self.residual), change, out=np.where(self.residual == 0, 0.0, np.inf), where=change > 0)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(array.shape[1:])) for array in leaves(self.values))
        missed = "" if self.converged is None or self.converged.all() else f"; {int((~self.converged).sum())} missed the tolerance"
        gap = float(np.median(np.abs(self.residual))) if self.n else 0.0
        return f"FeatureScores({self.n:,} examples of shape {shapes}; {self.target} against {self.baseline}; {self.method}; median |residual| {gap:.1e}{missed})"

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def at(self, examples: int | Sequence[int] | np.ndarray) -> FeatureScores:
        """The scores of some of the examples, in the order given (numbers, or one True or False for each example)."""
        ids = np.atleast_1d(np.asarray(examples))
        if ids.dtype == bool and len(ids) == self.n:
            ids = np.flatnonzero(ids)
        if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < -self.n or ids.max() >= self.n)):
            raise InputError(f"examples={examples!r}", f"numbers below {self.n}, or {self.n} of True and False", "the scores hold so many examples")
        ids = ids.astype(np.int64) % max(1, self.n)
        picked: dict[str, Any] = {name: None if getattr(self, name) is None else getattr(self, name)[ids] for name in _PLAIN}
        picked |= {name: tuple(getattr(self, name)[i] for i in ids) for name in ("example_names", "tokens") if getattr(self, name) is not None}
        for name in _STRUCTURED:
            if (value := getattr(self, name)) is not None:
                picked[name] = rebuilt(value, [array[ids] if len(array) == self.n else array for array in leaves(value)])
        of_each = {key: [self.provenance[key][i] for i in ids] for key in ("word_ids", "explained") if self.provenance.get(key) is not None}
        return replace(self, **picked, provenance={**self.provenance, **of_each})

    def top(self, k: int = 10) -> Strongest:
        """For each example the ``k`` parts that pushed its output up most, the largest first (equal ones in their order)."""
        return self._strongest(k, -1)

    def bottom(self, k: int = 10) -> Strongest:
        """For each example the ``k`` parts that pushed its output down most, the smallest first."""
        return self._strongest(k, 1)

    def _strongest(self, k: int, sign: int) -> Strongest:
        if k < 1:
            raise InputError(f"k={k}", "at least 1", "e.top(10)")
        found = views(self)
        flat = np.concatenate([view.flat for view in found], 1)
        order = np.argsort(sign * flat, axis=1, kind="stable")[:, :k]
        names = [tuple(part_name(found, int(j), i) for j in ids) for i, ids in enumerate(order)]
        return Strongest(tuple(names), np.take_along_axis(flat, order, 1), order, self.example_names)

    def group(self, groups: Any, axis: int | None = None) -> FeatureScores:
        """Sums over groups of parts, one column each: a table of kind "table" whose values sum to what the parts' sum to.

        Args:
            groups: one of
                names, one for each place of an axis (columns that were one feature before one-hot encoding; time steps with ``axis=``),
                a map of labels of the input's shape or without its channels, for all examples or one for each (superpixels),
                for each example a row of labels (words of a text; None and what is beyond a row belong to no group),
                a dict from a name to numbers or feature names along the axis, or to a mask of True and False,
                "inputs": one group for each of several inputs; otherwise several inputs take groups in their own structure.
            axis: which axis names and numbers mean, examples being 0; default: the last.

        Parts in no group become the group "(others)". Standard errors of a group are the sum of its parts': an upper bound, since the
        parts' errors are not independent. Raises InputError for groups that share parts or do not fit.

        >>> e = FeatureScores(np.array([[1.0, -0.5, 2.0]]), np.zeros(1), np.zeros(1, int), np.array([2.5]), np.zeros(1), "by hand", "f", "0")
        >>> e.group(["sex", "sex", "age"]).values, e.group({"sex": [0, 1]}).feature_names
        (array([[0.5, 2. ]]), ('sex', '(others)'))
        """
        return grouped(self, groups, axis)

    def words(self, word_ids: Sequence[Sequence[int | None]] | None = None) -> FeatureScores:
        """Tokens of a text merged into words.

        Args:
            word_ids: for each example the number of the word that each token belongs to, None for tokens of no word (what a fast
                tokenizer's ``encoding.word_ids(k)`` says). Default: ``provenance["word_ids"]``.
        """
        found = self.provenance.get("word_ids") if word_ids is None else word_ids
        if found is None:
            raise InputError("words() of scores that do not know which tokens make a word", "word_ids", "pass tokenizer(texts).word_ids(k) for each text")
        return merged_words(self, found)

    def minus(self, other: FeatureScores) -> FeatureScores:
        """This explanation less another one of the same shape: two models, two targets or two inputs.

        The values sum to the difference of the two changes of output, but for the difference of the residuals, and so does everything
        here: ``output``, ``baseline_output`` and ``residual`` are differences too. Standard errors are sums, an upper bound (the two
        may share their baselines).
        """
        mine, theirs = leaves(self.values), leaves(other.values)
        if type(self.values) is not type(other.values) or [a.shape for a in mine] != [b.shape for b in theirs] or _keys(self.values) != _keys(other.values):
            given = f"scores of shapes {[a.shape for a in mine]} and {[b.shape for b in theirs]}"
            raise InputError(given, "the same shapes and names of inputs", "explain the same number of examples of the same form")
        both = self.stderr is not None and other.stderr is not None
        found: dict[str, Any] = {name: getattr(self, name) - getattr(other, name) for name in ("residual", "output", "baseline_output")}
        found |= {name: _less(getattr(self, name), getattr(other, name)) for name in ("method", "target", "baseline")}
        same = ("tokens", "feature_names", "example_names")
        found |= {name: getattr(self, name) if getattr(self, name) == getattr(other, name) else None for name in same}
        found |= {name: getattr(self, name) if _alike(getattr(self, name), getattr(other, name)) else None for name in ("inputs", "reference")}
        return replace(
            self,
            **found,
            values=_combined(self.values, other.values, np.subtract),
            stderr=_combined(self.stderr, other.stderr, np.add) if both else None,  # type: ignore[arg-type]
            evaluations=self.evaluations + other.evaluations,
            converged=None if self.converged is None or other.converged is None else self.converged & other.converged,
            notes=tuple(dict.fromkeys((*self.notes, *other.notes, *_differences(self, other)))),
            provenance={"first": self.provenance, "second": other.provenance},
        )

    def summary(self) -> Summary:
        """Per part of the input, over all examples: mean, mean size, spread, share of each sign, rank.

        For data that come in batches: ``Accumulator().add(scores)`` for each, then ``summary()``.
        """
        return Accumulator().add(self).summary()

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table, one row per example and part.

        Columns: example, input (where there are several), feature (of a table) or one column per axis (row and column of an image, ...)
        and the token of a text, value of the input, its baseline, score, stderr. Needs ``pip install headwater[frames]``.
        """
        frame = frames.frame(self)
        frame.attrs.update(method=self.method, target=self.target, baseline=self.baseline, sign=SIGN)
        return frame

    # -- pictures --------------------------------------------------------------------------------------------------------------

    def plot(self, kind: str | None = None, examples: int | Iterable[int] | None = None, k: int = 10) -> Any:
        """A ``matplotlib.figure.Figure``; ``.savefig("why.png")`` writes it (or .svg, .pdf), without a display.

        Args:
            kind: "image" (signed overlay), "text", "series", "waterfall" (from the baseline's output to the output), "beeswarm" (many
                rows at once) or "bars" (mean sizes); default: what the input is. A table of 8 examples or more is a beeswarm.
            examples: which; default: the first few.
            k: features in a waterfall or a beeswarm; others are merged, or left out and counted.

        Needs ``pip install headwater[plot]``. Raises InputError for what cannot be drawn.
        """
        return report.draw(*pictures.parts_of(self, kind, [examples] if isinstance(examples, int) else examples, k))

    def to_html(self, path: str | Path, kind: str | None = None, examples: int | Iterable[int] | None = None, k: int = 10) -> Path:
        """Write one self-contained page: pictures, how to read them, the error of every example, what was found on the way.

        Arguments as in :meth:`plot`. Raises InputError, StorageError.
        """
        return report.write(pages.page(self, kind, [examples] if isinstance(examples, int) else examples, k), path)

    def _repr_html_(self) -> str:
        """What a notebook shows: static, without a script."""
        return pages.notebook(self)

    # -- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (its metadata hold the rest); :func:`headwater.load` reads it. Raises StorageError."""
        arrays = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        for name in _STRUCTURED:
            if (value := getattr(self, name)) is not None:
                arrays |= {f"{name}{key}": array for key, array in named_leaves(value)}
        return files.write(path, self, arrays, _FACTS)

    @classmethod
    def loaded(cls, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> FeatureScores:
        """From what a file holds (see :func:`headwater.load`)."""
        names = {k: None if facts[k] is None else tuple(facts[k]) for k in ("feature_names", "example_names")}
        tokens = None if facts["tokens"] is None else tuple(map(tuple, facts["tokens"]))
        structured = {name: restructured(name, arrays) for name in _STRUCTURED}
        return cls(**structured, **{k: arrays.get(k) for k in _PLAIN}, **{**facts, **names, "tokens": tokens, "notes": tuple(facts["notes"])})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Strongest:
    """For each example its strongest parts: ``names``, ``scores`` (n, k) and ``indices`` (n, k) into all parts in a row, strongest first."""

    names: tuple[tuple[str, ...], ...]
    scores: np.ndarray
    indices: np.ndarray
    example_names: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[list[tuple[str, float]]]:
        """Example by example: [(name, score), ...]."""
        for names, scores in zip(self.names, self.scores, strict=True):
            yield list(zip(names, map(float, scores), strict=True))

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        lines = []
        for i, parts in enumerate(self):
            who = self.example_names[i] if self.example_names else f"example {i}"
            lines.append(f"{who}: " + ", ".join(f"{name} {score:+.3g}" for name, score in parts))
        return "\n".join(lines)


# ---- two explanations ------------------------------------------------------------------------------------------------------------


def _keys(arrays: Arrays) -> list[str] | None:
    return list(arrays) if isinstance(arrays, Mapping) else None


def _combined(mine: Arrays, theirs: Arrays, how: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Arrays:
    return rebuilt(mine, [how(a, b) for a, b in zip(leaves(mine), leaves(theirs), strict=True)])


def _alike(mine: Arrays | None, theirs: Arrays | None) -> bool:
    """Whether both are the same numbers in the same structure."""
    if mine is None or theirs is None or type(mine) is not type(theirs) or len(leaves(mine)) != len(leaves(theirs)):
        return False
    return all(np.array_equal(a, b) for a, b in zip(leaves(mine), leaves(theirs), strict=True))


def _less(mine: str, theirs: str) -> str:
    return mine if mine == theirs else f"({mine}) - ({theirs})"


def _differences(mine: FeatureScores, theirs: FeatureScores) -> tuple[str, ...]:
    what = [name for name in ("method", "target", "baseline") if getattr(mine, name) != getattr(theirs, name)]
    what += [name for name in ("inputs", "reference") if getattr(mine, name) is not None and not _alike(getattr(mine, name), getattr(theirs, name))]
    said = f"they differ in {', '.join(what)}" if what else "both have the same inputs, target and method"
    return (f"Values are differences of two explanations ({said}): positive means that the part pushed the first output up more than the second.",)
