"""What comes next: the log-probability of a continuation, given to a causal model after its prompt, or to a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.text.asked import Asked, Plan, one_each, shortened
from headwater.features.text.reading import decoder_start, longest
from headwater.features.text.targets import continuation
from headwater.features.text.tokens import Text, by_marks, encoded, padded, special_ids, written
from headwater.tasks.task import at_least_float32


@dataclass(frozen=True, eq=False)
class LogProbability:
    """The sum of log-probabilities of tokens, of logits (m, positions, vocabulary). ``places``, ``tokens`` (n, A): at which position which
    token, ``counted`` (n, A): which of these count."""

    places: Tensor
    tokens: Tensor
    counted: Tensor
    name: str

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The sum (m,)."""
        logits = at_least_float32(given)
        places, tokens, counted = (t[rows.to(t.device)].to(logits.device) for t in (self.places, self.tokens, self.counted))
        at = logits[torch.arange(len(logits), device=logits.device)[:, None], places]
        log_p = at.gather(-1, tokens[..., None]).squeeze(-1) - at.logsumexp(-1)
        return torch.where(counted, log_p, 0.0).sum(1)


def given_target(target: Any) -> Any:
    """``target=`` of a model that writes: one token's id, or a list of one for each text, or what continuation() takes."""
    if isinstance(target, Tensor | np.ndarray):
        target = target.tolist()
    if isinstance(target, int):
        return [target] if isinstance(target, bool) is False else target
    if isinstance(target, list | tuple) and target and all(isinstance(t, int) for t in target):
        return [[t] for t in target]
    return list(target) if isinstance(target, tuple) else target


def continued(asked: Asked, target: continuation) -> tuple[Plan, Plan | None]:
    if target.foil is not None and (target.each or target.prefix):
        raise InputError("a foil together with each= or prefix=True", "one of them", "a foil is compared as a whole, over the tokens of the prompt")
    if target.count < 1:
        raise InputError(f"count={target.count}", "at least 1", "hw.targets.continuation(count=5)")
    speech = Prompted.of(asked) if asked.reading.kind == "causal" else Translated.of(asked)
    first = speech.plan(target, *_answers(speech, target.of, target.count))
    return first, None if target.foil is None else speech.plan(replace(target, of=target.foil), *_answers(speech, target.foil, 1))


def _answers(speech: Prompted | Translated, of: Any, count: int) -> tuple[list[list[int]], list[str]]:
    """The continuation of each text as ids, and notes. Raises InputError."""
    asked = speech.asked
    if of is None:
        found = speech.greedy(count)
        said = [repr(_text(asked, ids)) for ids in found]
        return found, [f"The model's own continuation, greedily: {shortened(said)}."]
    alone = isinstance(of, str) or (isinstance(of, list | tuple) and bool(of) and all(isinstance(i, int | np.integer) for i in of))
    each = [of] * len(asked.texts) if alone else list(of) if isinstance(of, list | tuple) else [of]
    one_each(each, asked)
    found, notes = [], []
    for k, one in enumerate(each):
        if isinstance(one, str):
            if asked.tokenizer is None:
                raise InputError(f"the continuation {one!r} without a tokenizer", "its token ids, or the tokenizer", "hw.explain(..., tokenizer=tokenizer)")
            ids, merged = speech.tokenised(k, one)
            notes += (
                [f"The continuation of text {k} was cut into tokens by itself: joined to the prompt, its beginning would merge with the prompt's end."] if merged else []
            )
        elif isinstance(one, list | tuple) and all(isinstance(i, int | np.integer) for i in one):
            ids = [int(i) for i in one]
        else:
            raise InputError(f"the continuation {one!r}", "a text or a list of token ids", "hw.targets.continuation(' Paris')")
        if not ids or min(ids) < 0 or max(ids) >= asked.reading.vocabulary:
            raise InputError(f"the continuation {one!r} of text {k}", f"at least one token, with ids below {asked.reading.vocabulary}", "check it")
        found.append(ids)
    return found, notes


def _text(asked: Asked, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) if asked.tokenizer is None else str(asked.tokenizer.decode(list(ids)))


def _names(asked: Asked, ids: Sequence[int]) -> tuple[str, ...]:
    if asked.tokenizer is None:
        return tuple(map(str, ids))
    return written(asked.tokenizer, [str(t) for t in asked.tokenizer.convert_ids_to_tokens(list(ids))])


def _row_names(asked: Asked, answers: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]]) -> tuple[str, ...]:
    """What the rows of ``each`` are called: by their tokens, and their texts where there are several."""
    given = asked.question.example_names
    found = []
    for k, ids in enumerate(answers):
        before = f"{given[k]}: " if given is not None else f"{k}: " if len(answers) > 1 else ""
        found += [before + name for name, counts in zip(_names(asked, ids), counted[k], strict=True) if counts]
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Prompted:
    """A causal model and its prompts."""

    asked: Asked
    prompts: list[Text]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, asked: Asked) -> Prompted:
        """An end-of-text token that the tokenizer puts after a prompt is taken off: a continuation follows."""
        prompts = [_open(text, asked.tokenizer) for text in asked.texts]
        ended = any(len(a) != len(b) for a, b in zip(prompts, asked.texts, strict=True))
        return cls(asked, prompts, ("The end-of-text token that the tokenizer puts after a prompt was taken off.",) if ended else ())

    def tokenised(self, k: int, text: str) -> tuple[list[int], bool]:
        """A continuation as ids: what follows the prompt when both are cut into tokens together, and whether that was not possible."""
        prompt, tokenizer = self.prompts[k], self.asked.tokenizer
        if isinstance(prompt.source, str):
            joint = _open(encoded(tokenizer, prompt.source + text), tokenizer)
            if joint.ids[: len(prompt)] == prompt.ids:
                return list(joint.ids[len(prompt) :]), False
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]], isinstance(prompt.source, str)

    def greedy(self, count: int) -> list[list[int]]:
        """The most probable token, again and again; an end-of-text token is the last."""
        said: list[list[int]] = [[] for _ in self.prompts]
        for _ in range(count):
            going = [k for k, ids in enumerate(said) if not ids or ids[-1] not in _stops(self.asked)]
            texts = [self._with(k, said[k]) for k in going]
            if not texts:
                break
            self._fits(texts)
            ends = sorted({len(t) - 1 for t in texts})
            found = self.asked.outputs(replace(self.asked.reading, keep=tuple(ends)), texts, **_repeated(self.asked, going))
            for row, (k, text) in enumerate(zip(going, texts, strict=True)):
                said[k].append(int(found[row, ends.index(len(text) - 1)].argmax()))
        return said

    def plan(self, target: continuation, answers: list[list[int]], notes: list[str]) -> Plan:
        asked, prefix = self.asked, target.each if target.prefix is None else target.prefix
        owner = [(k, (t,)) for k, ids in enumerate(answers) for t in range(len(ids))] if target.each else [(k, range(len(ids))) for k, ids in enumerate(answers)]
        before = [max(t) for _, t in owner]  # tokens of the continuation that the model reads
        texts = [self._with(k, answers[k][:b]) for (k, _), b in zip(owner, before, strict=True)]
        self._fits(texts)
        places = [[len(self.prompts[k]) - 1 + t for t in counted] for k, counted in owner]
        tokens = [[answers[k][t] for t in counted] for k, counted in owner]
        keep = sorted({p for row in places for p in row})
        name = _called(target, asked, answers)
        aim = _log_probability([[keep.index(p) for p in row] for row in places], tokens, name)
        return Plan(
            texts,
            aim,
            replace(asked.reading, keep=tuple(keep)),
            kept=None if prefix else before,
            names=_row_names(asked, answers, [[True] * len(ids) for ids in answers]) if target.each else None,
            explained=[_text(asked, row) for row in tokens],  # type: ignore[arg-type]
            after=[self._with(k, answers[k]) for k, _ in owner] if prefix else None,
            extra=_repeated(asked, [k for k, _ in owner]),
            notes=(*self.notes, *notes),
        )

    def _with(self, k: int, ids: Sequence[int]) -> Text:
        if not ids:
            return self.prompts[k]
        names = [str(t) for t in self.asked.tokenizer.convert_ids_to_tokens(list(ids))] if self.asked.tokenizer is not None else []
        return self.prompts[k].followed_by(ids, _names(self.asked, ids), _new_words(names, len(ids)))

    def _fits(self, texts: Sequence[Text]) -> None:
        limit, most = longest(self.asked.question.model, self.asked.tokenizer), max(map(len, texts))
        if limit is not None and most > limit:
            raise InputError(f"a prompt and continuation of {most} tokens for a model that reads {limit}", f"at most {limit}", "shorten the prompt or the continuation")


@dataclass(frozen=True, eq=False)
class Translated:
    """An encoder-decoder model and its sources. The tokens of the target text before each one are given to the decoder, and keep themselves."""

    asked: Asked

    @classmethod
    def of(cls, asked: Asked) -> Translated:
        """The sources are the texts as they are."""
        return cls(asked)

    def tokenised(self, k: int, text: str) -> tuple[list[int], bool]:
        """A target text as ids, with the special tokens that the tokenizer gives it (which do not count)."""
        return [int(i) for i in self.asked.tokenizer(text_target=text)["input_ids"]], False

    def greedy(self, count: int) -> list[list[int]]:
        """The most probable token, again and again."""
        asked, said = self.asked, [[] for _ in self.asked.texts]  # type: ignore[var-annotated]
        for step in range(count):
            found = asked.outputs(texts=asked.texts, decoder_ids=self._read([[*ids, 0] for ids in said]))
            for ids, logits in zip(said, found[:, step], strict=True):
                ids.append(int(logits.argmax()))
        return [self._ended(ids) for ids in said]

    def plan(self, target: continuation, answers: list[list[int]], notes: list[str]) -> Plan:
        if target.prefix:
            raise InputError("prefix=True for an encoder-decoder model", "prefix=False: its decoder's tokens keep themselves", "leave prefix= out")
        asked = self.asked
        counted = [self._counted(ids, target.of is None) for ids in answers]
        for k, row in enumerate(counted):
            if not any(row):
                raise InputError(f"a target text {k} of special tokens alone", "at least one token of its own", "check it")
        owner = (
            [(k, [t]) for k, row in enumerate(counted) for t, c in enumerate(row) if c]
            if target.each
            else [(k, [t for t, c in enumerate(row) if c]) for k, row in enumerate(counted)]
        )
        tokens = [[answers[k][t] for t in places] for k, places in owner]
        reading = self._checked()
        return Plan(
            [asked.texts[k] for k, _ in owner],
            _log_probability([list(places) for _, places in owner], tokens, _called(target, asked, tokens)),
            reading,
            names=_row_names(asked, answers, counted) if target.each else None,
            explained=[_text(asked, row) for row in tokens],  # type: ignore[arg-type]
            extra={**_repeated(asked, [k for k, _ in owner]), "decoder_ids": self._read([answers[k] for k, _ in owner])},
            notes=(*notes, "The decoder was given the tokens of the target text before each one; they keep themselves."),
        )

    def _checked(self) -> Any:
        """The reading, after a look at whether the decoder's embeddings can be given to it. Raises InputError."""
        asked = self.asked
        if asked.reading.shared:
            ids, others = asked.reading.tensors(asked.texts[:1])
            start = torch.full((1, 2), decoder_start(asked.question.model), device=ids.device)
            extra = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in asked.extra.items()}
            with torch.no_grad():
                found, plain = (r.call(ids, **others, **extra, decoder_ids=start) for r in (asked.reading, replace(asked.reading, shared=False)))
            if not torch.allclose(found, plain, rtol=1e-3, atol=1e-5):
                raise InputError(
                    f"a {type(asked.question.model).__name__}, which does more with its shared embedding than look tokens up",
                    "encoder and decoder with embeddings of their own",
                    "model.decoder.embed_tokens = copy.copy(model.decoder.embed_tokens)",
                )
        return asked.reading

    def _read(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """What the decoder reads, (n, longest): its start, and all tokens but the last."""
        start = decoder_start(self.asked.question.model)
        return padded([[start, *ids[:-1]] for ids in answers], self.asked.reading.pad, self.asked.reading.device)

    def _counted(self, ids: Sequence[int], own: bool) -> list[bool]:
        special = special_ids(self.asked.tokenizer) if self.asked.tokenizer is not None and not own else frozenset()
        return [i not in special for i in ids]

    def _ended(self, ids: list[int]) -> list[int]:
        stops = [k for k, i in enumerate(ids) if i in _stops(self.asked)]
        return ids[: stops[0] + 1] if stops else ids


def _called(target: continuation, asked: Asked, answers: Sequence[Sequence[int]]) -> str:
    """What is explained, in words."""
    if target.each:
        return "the log-probability of each token"
    return f"log p({_text(asked, answers[0])!r})" if len(answers) == 1 else "the log-probability of the continuations"


def _log_probability(places: list[list[int]], tokens: list[list[int]], name: str) -> LogProbability:
    cpu = torch.device("cpu")
    counted = padded([[1] * len(row) for row in places], 0, cpu).bool()
    return LogProbability(padded(places, 0, cpu), padded(tokens, 0, cpu), counted, name)


def _repeated(asked: Asked, owner: list[int]) -> dict[str, Any]:
    """Extra arguments with one row for each text, repeated for the rows that are explained."""
    n = len(asked.texts)
    return {k: v[torch.tensor(owner, device=v.device)] for k, v in asked.extra.items() if isinstance(v, Tensor) and v.ndim and len(v) == n}


def _open(text: Text, tokenizer: Any) -> Text:
    """Without the end-of-text token that a tokenizer put there itself."""
    end = getattr(tokenizer, "eos_token_id", None)
    own = text.source is not None and len(text) > 1 and text.ids[-1] == end and text.special[-1] and text.places is not None and text.places[-1] == (0, 0)
    return text.cut(slice(0, len(text) - 1)) if own else text


def _stops(asked: Asked) -> set[int]:
    found = getattr(asked.config, "eos_token_id", None)
    return {int(i) for i in (found if isinstance(found, list | tuple) else [found]) if i is not None}


def _new_words(names: Sequence[str], count: int) -> list[int | None]:
    return list(by_marks(names, [False] * count)) if names else list(range(count))
