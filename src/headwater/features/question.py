"""What is asked of ``explain``: the model, the inputs, and every setting, in one frozen record that each family of integrators reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from headwater.errors import InputError


@dataclass(frozen=True, eq=False)
class Question:
    """The arguments of :func:`headwater.explain`; see there. ``None`` everywhere means "the family's default"."""

    model: Any
    inputs: Any
    target: Any = None
    baseline: Any = None
    path: Any = None
    rule: Any = None
    tolerance: float | None = None
    max_evaluations: int | None = None
    layer: Any = None
    neuron: Any = None
    space: str | None = None
    extra: Any = None
    output: str | None = None
    discrete: Any = None
    smooth: Any = None
    tokenizer: Any = None
    feature_names: Sequence[str] | None = None
    example_names: Sequence[str] | None = None
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True

    def refuse(self, family: str, *names: str, instead: str = "leave it out") -> None:
        """Raise InputError where one of these arguments was given to a family that cannot use it: none is ignored in silence."""
        for name in names:
            if getattr(self, name) is not None:
                raise InputError(f"{name}={_short(getattr(self, name))} for {family}", f"no {name}, which has no meaning there", instead)

    def only(self, family: str, *names: str) -> None:
        """Like :meth:`refuse`, for every optional argument but these (and those that concern names, progress and the seed)."""
        always = {"model", "inputs", "target", "baseline", "feature_names", "example_names", "seed", "progress", *names}
        self.refuse(family, *(f.name for f in fields(self) if f.name not in always))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
