"""An answer in the text: where it begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.targets import Target, target_of
from headwater.features.text.asked import Asked, Plan, one_each, shortened, simple
from headwater.features.text.classes import place_of
from headwater.features.text.targets import span
from headwater.features.text.tokens import Text

LONGEST_ANSWER = 30


@dataclass(frozen=True, eq=False)
class Span:
    """Start and end logits, (m, positions, 2), of answers from ``first`` to ``last`` (n,)."""

    first: Tensor
    last: Tensor
    part: str
    name: str

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """Their sum, or one of them, (m,)."""
        every = torch.arange(len(given), device=given.device)
        start, end = given[every, self.first.to(given.device)[rows], 0], given[every, self.last.to(given.device)[rows], 1]
        return start if self.part == "start" else end if self.part == "end" else start + end


def answered(asked: Asked) -> Plan:
    target = asked.question.target
    if isinstance(target, Target) or (callable(target) and not isinstance(target, span)):
        return simple(asked, target_of(target))
    if target is None or (isinstance(target, str) and target in ("span", "start", "end")):
        target = span(part=target or "span")
    elif isinstance(target, str | list | tuple):
        target = span(target)
    if not isinstance(target, span) or target.part not in ("span", "start", "end"):
        raise InputError(f"target={target!r} for question answering", "'span', 'start', 'end', or hw.targets.span(answer)", "target=hw.targets.span('in Paris')")
    given = target.of if isinstance(target.of, list) else [target.of] * len(asked.texts)
    one_each(given, asked)
    found = asked.outputs() if any(one is None for one in given) else None
    bounds = [_best(text, found[k]) if one is None else _found(text, one, k) for k, (text, one) in enumerate(zip(asked.texts, given, strict=True))]  # type: ignore[index]
    said = [_between(text, first, last) for text, (first, last) in zip(asked.texts, bounds, strict=True)]
    logits = {"span": "start and end logits", "start": "the start logit", "end": "the end logit"}[target.part]
    name = f"{logits} of {said[0]!r}" if len(said) == 1 else f"{logits} of {'the predicted answers' if target.of is None else 'the answers'}"
    first, last = torch.tensor(bounds).unbind(1)
    return simple(asked, Span(first, last, target.part, name), said, [f"{'Predicted' if target.of is None else 'Explained'}: {shortened(list(map(repr, said)))}."])


def _best(text: Text, logits: Tensor) -> tuple[int, int]:
    """The pair of positions within the context whose logits sum to most, at most LONGEST_ANSWER tokens apart."""
    context = max((p for p in text.part if p is not None), default=None)
    inside = torch.tensor([not s and p == context for s, p in zip(text.special, text.part, strict=True)])
    start, end = logits[: len(text)].double().cpu().unbind(-1)
    places = torch.arange(len(text))
    allowed = inside[:, None] & inside[None, :] & (places[None, :] >= places[:, None]) & (places[None, :] < places[:, None] + LONGEST_ANSWER)
    best = int(torch.where(allowed, start[:, None] + end[None, :], -torch.inf).argmax())
    return best // len(text), best % len(text)


def _found(text: Text, answer: Any, k: int) -> tuple[int, int]:
    """Where a given answer stands."""
    if isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(p, int) for p in answer):
        first, last = (place_of(text, p, k) for p in answer)
        if first > last:
            raise InputError(f"an answer from position {first} to {last}", "its first position before its last", "(first, last)")
        return first, last
    context = text.source[1] if isinstance(text.source, tuple) else text.source
    if not isinstance(answer, str) or context is None or text.places is None:
        raise InputError(
            f"the answer {answer!r} of text {k}", "a text that stands in the context of a fast tokenizer, or (first, last) positions", "hw.targets.span((12, 14))"
        )
    begin = context.find(answer)
    if begin < 0 or not answer:
        raise InputError(f"the answer {answer!r}", f"words of the context of text {k}", "copy them from it")
    part = 1 if isinstance(text.source, tuple) else 0
    inside = [n for n, (p, (a, b)) in enumerate(zip(text.part, text.places, strict=True)) if p == part and a < begin + len(answer) and b > begin]
    if not inside:
        raise InputError(f"the answer {answer!r}, which was cut off", "an answer that the model reads", "shorten the context")
    return inside[0], inside[-1]


def _between(text: Text, first: int, last: int) -> str:
    """The text from one position to another."""
    if text.places is not None and text.source is not None and text.part[first] is not None and text.part[first] == text.part[last]:
        source = text.source if isinstance(text.source, str) else text.source[text.part[first] or 0]
        return source[text.places[first][0] : text.places[last][1]].strip()
    return " ".join(text.tokens[first : last + 1])
