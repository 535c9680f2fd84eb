"""A question about texts, read; and the plan that it comes to: which texts the model reads, and which number of its output is explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headwater.errors import InputError
from headwater.features.question import Question
from headwater.features.targets import Target
from headwater.features.text.reading import Reading, at_once
from headwater.features.text.tokens import Text


@dataclass(frozen=True, eq=False)
class Plan:
    """What is worked off: texts as the model reads them, and which number is explained.

    Args:
        texts: what the model reads, one for each row of the result. target: None where a neuron is explained.
        kept: of each, how many tokens at its end keep themselves along the path.
        names: of the rows, or None. explained: in words, what is explained of each row.
        after: tokens of each row that stand in the result and that the model does not read, with values 0.
        extra: further arguments of the model.
    """

    texts: Sequence[Text]
    target: Target | None
    reading: Reading
    kept: Sequence[int] | None = None
    names: tuple[str, ...] | None = None
    explained: tuple[str, ...] = ()
    after: Sequence[Text] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Asked:
    """A question about texts, read: see the fields of Question."""

    question: Question
    texts: list[Text]
    reading: Reading
    tokenizer: Any
    extra: dict[str, Any]

    @property
    def config(self) -> Any:
        """The model's config, or None."""
        return getattr(self.question.model, "config", None)

    def chunk(self, width: int, outputs: int = 1) -> int:
        """How many texts at once."""
        return self.question.batch_size or at_once(self.reading, width, outputs)

    def outputs(self, reading: Reading | None = None, texts: Sequence[Text] | None = None, **extra: Any) -> Tensor:
        """The model's outputs (n, ...) for the texts as they are."""
        texts = self.texts if texts is None else texts
        width = max(map(len, texts))
        return (reading or self.reading).outputs(texts, {**self.extra, **extra}, self.chunk(width, width))


@dataclass(frozen=True, eq=False)
class Named:
    """A target under another name."""

    inner: Target
    name: str

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The same number (m,)."""
        return self.inner.pick(given, rows)


def simple(asked: Asked, target: Target | None, explained: Sequence[str] = (), notes: Sequence[str] = ()) -> Plan:
    """A plan for the texts as they are."""
    return Plan(asked.texts, target, asked.reading, explained=tuple(explained), notes=tuple(notes))


def one_each(given: Sequence[Any], asked: Asked) -> None:
    """Raise InputError unless there is one target for each text."""
    if len(given) != len(asked.texts):
        raise InputError(f"{len(given)} targets for {len(asked.texts)} texts", "one for each", "a list as long as the texts, or a single one")


def shortened(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
