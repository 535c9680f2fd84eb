"""Which parts of the input: attributions with their error, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.errors import InputError
from headwater.result import files

if TYPE_CHECKING:
    pass

Arrays = np.ndarray | tuple[np.ndarray, ...] | dict[str, np.ndarray]
"""One array, or several in the structure that the model's inputs have; all begin with the axis of examples."""

SIGN = "positive: the part raised the output above its value at the baseline; the values of an example sum to output - baseline output"
_STRUCTURED = ("values", "stderr", "inputs", "reference")
_PLAIN = ("residual", "evaluations", "output", "baseline_output", "converged")
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

    # -- files -----------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file (its metadata hold the rest); :func:`headwater.load` reads it. Raises StorageError."""
        arrays = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        for name in _STRUCTURED:
            if (value := getattr(self, name)) is not None:
                arrays |= {f"{name}{key}": array for key, array in _named_leaves(value)}
        return files.write(path, self, arrays, _FACTS)

    @classmethod
    def loaded(cls, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> FeatureScores:
        """From what a file holds (see :func:`headwater.load`)."""
        names = {k: None if facts[k] is None else tuple(facts[k]) for k in ("feature_names", "example_names")}
        tokens = None if facts["tokens"] is None else tuple(map(tuple, facts["tokens"]))
        structured = {name: _restructured(name, arrays) for name in _STRUCTURED}
        return cls(**structured, **{k: arrays.get(k) for k in _PLAIN}, **{**facts, **names, "tokens": tokens, "notes": tuple(facts["notes"])})  # type: ignore[arg-type]


# ---- one array or several ------------------------------------------------------------------------------------------------------


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


def _named_leaves(arrays: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Each array with a name that says which structure it stands in: '', '/0', '.key'."""
    if isinstance(arrays, np.ndarray):
        yield "", arrays
    elif isinstance(arrays, Mapping):
        yield from ((f".{key}", array) for key, array in arrays.items())
    else:
        yield from ((f"/{k}", array) for k, array in enumerate(arrays))


def _restructured(name: str, arrays: Mapping[str, np.ndarray]) -> Arrays | None:
    if name in arrays:
        return arrays[name]
    keyed = {key[len(name) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{name}.")}
    listed = sorted((int(key[len(name) + 1 :]), array) for key, array in arrays.items() if key.startswith(f"{name}/"))
    return keyed or tuple(array for _, array in listed) or None
