"""Which number of a text model is explained, for each kind of head: a class, a label of a word, an answer in the text, a continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.targets import Target, output, target_of
from headwater.features.text.reading import decoder_start, longest
from headwater.features.text.targets import continuation, span
from headwater.features.text.tokens import Text, encoded, padded, words_of, written
from headwater.tasks.task import at_least_float32

if TYPE_CHECKING:
    from headwater.features.text.answer import Asked, Plan

LONGEST_ANSWER = 30


@dataclass(frozen=True, eq=False)
class Named:
    """A target under another name."""

    inner: Target
    name: str

    def pick(self, given: Tensor, rows: Tensor) -> Tensor:
        """The same number (m,)."""
        return self.inner.pick(given, rows)


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


def plan_of(asked: Asked) -> tuple[Plan, Plan | None]:
    """What is worked off; and the foil's, where there is one."""
    target, kind = asked.question.target, asked.reading.kind
    if target is None and asked.question.neuron is not None:
        return _free(asked), None
    if kind in ("causal", "seq2seq") and not isinstance(target, Target) and not (callable(target) and not isinstance(target, continuation)):
        return _continued(asked, target if isinstance(target, continuation) else continuation(_given(target)))
    if isinstance(target, continuation):
        raise InputError(f"a continuation of a {type(asked.question.model).__name__}", "a model that writes text", "leave target= out, or choose one of its outputs")
    if isinstance(target, span) and kind != "span":
        raise InputError(f"an answer's span of a {type(asked.question.model).__name__}", "a model for question answering", "choose one of its outputs")
    return {"sequence": _classified, "tokens": _labelled, "span": _answered}.get(kind, _free)(asked), None


def _plan(asked: Asked, target: Target | None, explained: Sequence[str] = (), notes: Sequence[str] = ()) -> Plan:
    from headwater.features.text.answer import Plan

    return Plan(asked.texts, target, asked.reading, explained=tuple(explained), notes=tuple(notes))


def _free(asked: Asked) -> Plan:
    """Any function of the output; with no target, a neuron is explained."""
    if asked.question.target is None and asked.question.neuron is None:
        raise InputError(
            f"no target for a {type(asked.question.model).__name__}, which has no head", "a function of its output", "target=lambda hidden: hidden[:, 0, 7], say"
        )
    return _plan(asked, None if asked.question.target is None else target_of(asked.question.target))


# ---- a class of each text --------------------------------------------------------------------------------------------------------


def _classified(asked: Asked) -> Plan:
    target, config = asked.question.target, asked.config
    if target is None:
        found = asked.outputs()
        if found.ndim == 1 or found.shape[1] == 1:
            return _plan(asked, output(None))
        best = found.argmax(1).tolist()
        names = [_label(config, k) or str(k) for k in best]
        return _plan(asked, Named(output(best), "the predicted class"), names, [f"Predicted: {_short(names)}."])
    if isinstance(target, str) or (isinstance(target, list | tuple) and target and all(isinstance(t, str) for t in target)):
        numbers = [_number(config, label, asked) for label in ([target] if isinstance(target, str) else target)]
        if isinstance(target, str):
            return _plan(asked, Named(output(numbers[0]), f"output {numbers[0]} ({target})"), [target] * len(asked.texts))
        _one_each(numbers, asked)
        return _plan(asked, Named(output(numbers), "the output chosen for each text"), target)
    aim = target_of(target)
    label = _label(config, aim.index) if isinstance(aim, output) and isinstance(aim.index, int) else None
    return _plan(asked, Named(aim, f"{aim.name} ({label})") if label else aim)


def _label(config: Any, index: int) -> str | None:
    """What a class is called, None where the config has no names of its own."""
    found = (getattr(config, "id2label", None) or {}).get(index)
    return None if found is None or str(found) == f"LABEL_{index}" else str(found)


def _number(config: Any, label: str, asked: Asked) -> int:
    known = {str(name): int(k) for k, name in (getattr(config, "id2label", None) or {}).items()}
    if label not in known:
        raise InputError(
            f"target={label!r}", f"one of {', '.join(map(repr, list(known)[:12])) or 'the numbers of its outputs: the model names none'}", "check model.config.id2label"
        )
    return known[label]


# ---- a label of a word -----------------------------------------------------------------------------------------------------------


def _labelled(asked: Asked) -> Plan:
    target = asked.question.target
    if isinstance(target, Target) or callable(target):
        return _plan(asked, target_of(target))
    masks = [] if target is not None else [_only_mask(asked, k) for k in range(len(asked.texts))]
    pairs = [(m, None) for m in masks] if masks else [target] * len(asked.texts) if isinstance(target, tuple) else target
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise InputError(f"target={target!r} of labels of tokens", "(position or word, label), or a list of these, one for each text", "target=('Paris', 'B-LOC')")
    _one_each(pairs, asked)
    places = [_place(text, where, k) for k, (text, (where, _)) in enumerate(zip(asked.texts, pairs, strict=True))]
    found = asked.outputs() if any(label is None for _, label in pairs) else None
    labels = [_label_number(asked, label) if label is not None else int(found[k, places[k]].argmax()) for k, (_, label) in enumerate(pairs)]  # type: ignore[index]
    said = [f"{_label_name(asked, label)} at {text.tokens[place].strip()!r} ({place})" for text, place, label in zip(asked.texts, places, labels, strict=True)]
    name = said[0] if len(said) == 1 else "a label of a token of each text"
    return _plan(asked, Named(output(list(zip(places, labels, strict=True))), name), said, [f"Explained: {_short(said)}."])


def _only_mask(asked: Asked, k: int) -> int:
    """Where the one mask of a text stands, for a model that fills it."""
    text, mask = asked.texts[k], getattr(asked.tokenizer, "mask_token_id", None)
    places = [place for place, i in enumerate(text.ids) if i == mask]
    if _fills(asked) and len(places) == 1:
        return places[0]
    raise InputError(
        "no target for a model that labels every token" + (f", and {len(places)} masks in text {k}" if _fills(asked) else ""),
        "(position or word, label); a label of None is the predicted one",
        "target=('Paris', None), say; the tokens are " + " ".join(f"{n}:{token.strip()}" for n, token in enumerate(text.tokens[:20])),
    )


def _fills(asked: Asked) -> bool:
    """Whether labels are tokens: a masked language model."""
    return getattr(asked.question.model, "get_output_embeddings", lambda: None)() is not None


def _label_number(asked: Asked, label: Any) -> int:
    if not isinstance(label, str):
        return int(label)
    if not _fills(asked):
        return _number(asked.config, label, asked)
    vocabulary = asked.tokenizer.get_vocab() if asked.tokenizer is not None else {}
    if label not in vocabulary:
        raise InputError(f"the token {label!r}", "a token of the vocabulary, as the tokenizer writes it", "tokenizer.tokenize(text) shows how")
    return int(vocabulary[label])


def _label_name(asked: Asked, label: int) -> str:
    if _fills(asked) and asked.tokenizer is not None:
        return repr(asked.tokenizer.convert_ids_to_tokens(label))
    return _label(asked.config, label) or f"label {label}"


def _place(text: Text, where: Any, k: int) -> int:
    """The position of a word's first token. Raises InputError."""
    if isinstance(where, int | np.integer) and not isinstance(where, bool):
        if not -len(text) <= where < len(text):
            raise InputError(f"position {where} of text {k}", f"0 to {len(text) - 1}", "positions count tokens, special ones too")
        return int(where) % len(text)
    spoken = words_of(text)
    found = [first for first, word in spoken if word == where]
    if len(found) != 1:
        known = ", ".join(f"{first}: {word}" for first, word in spoken[:20])
        raise InputError(f"the word {where!r}, which stands in text {k} {len(found)} times", "a word that stands there once, or a position", f"its words are {known}")
    return found[0]


# ---- an answer in the text -------------------------------------------------------------------------------------------------------


def _answered(asked: Asked) -> Plan:
    target = asked.question.target
    if isinstance(target, Target) or (callable(target) and not isinstance(target, span)):
        return _plan(asked, target_of(target))
    if target is None or (isinstance(target, str) and target in ("span", "start", "end")):
        target = span(part=target or "span")
    elif isinstance(target, str | list | tuple):
        target = span(target)
    if not isinstance(target, span) or target.part not in ("span", "start", "end"):
        raise InputError(f"target={target!r} for question answering", "'span', 'start', 'end', or hw.targets.span(answer)", "target=hw.targets.span('in Paris')")
    given = target.of if isinstance(target.of, list) else [target.of] * len(asked.texts)
    _one_each(given, asked)
    found = asked.outputs() if any(one is None for one in given) else None
    bounds = [_best(text, found[k]) if one is None else _found(text, one, k) for k, (text, one) in enumerate(zip(asked.texts, given, strict=True))]  # type: ignore[index]
    said = [_between(text, first, last) for text, (first, last) in zip(asked.texts, bounds, strict=True)]
    logits = {"span": "start and end logits", "start": "the start logit", "end": "the end logit"}[target.part]
    name = f"{logits} of {said[0]!r}" if len(said) == 1 else f"{logits} of {'the predicted answers' if target.of is None else 'the answers'}"
    first, last = torch.tensor(bounds).unbind(1)
    return _plan(asked, Span(first, last, target.part, name), said, [f"{'Predicted' if target.of is None else 'Explained'}: {_short(list(map(repr, said)))}."])


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
        first, last = (_place(text, p, k) for p in answer)
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


# ---- what comes next -------------------------------------------------------------------------------------------------------------


def _given(target: Any) -> Any:
    """``target=`` of a model that writes: one token's id, or a list of one for each text, or what continuation() takes."""
    if isinstance(target, Tensor | np.ndarray):
        target = target.tolist()
    if isinstance(target, int):
        return [target] if isinstance(target, bool) is False else target
    if isinstance(target, list | tuple) and target and all(isinstance(t, int) for t in target):
        return [[t] for t in target]
    return list(target) if isinstance(target, tuple) else target


def _continued(asked: Asked, target: continuation) -> tuple[Plan, Plan | None]:
    if target.foil is not None and (target.each or target.prefix):
        raise InputError("a foil together with each= or prefix=True", "one of them", "a foil is compared as a whole, over the tokens of the prompt")
    if target.count < 1:
        raise InputError(f"count={target.count}", "at least 1", "hw.targets.continuation(count=5)")
    speech = _Prompted.of(asked) if asked.reading.kind == "causal" else _Translated.of(asked)
    first = speech.plan(target, *_answers(speech, target.of, target.count))
    return first, None if target.foil is None else speech.plan(replace(target, of=target.foil), *_answers(speech, target.foil, 1))


def _answers(speech: _Prompted | _Translated, of: Any, count: int) -> tuple[list[list[int]], list[str]]:
    """The continuation of each text as ids, and notes. Raises InputError."""
    asked = speech.asked
    if of is None:
        found = speech.greedy(count)
        said = [repr(_text(asked, ids)) for ids in found]
        return found, [f"The model's own continuation, greedily: {_short(said)}."]
    alone = isinstance(of, str) or (isinstance(of, list | tuple) and bool(of) and all(isinstance(i, int | np.integer) for i in of))
    each = [of] * len(asked.texts) if alone else list(of) if isinstance(of, list | tuple) else [of]
    _one_each(each, asked)
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
class _Prompted:
    """A causal model and its prompts."""

    asked: Asked
    prompts: list[Text]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, asked: Asked) -> _Prompted:
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
        from headwater.features.text.answer import Plan

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
class _Translated:
    """An encoder-decoder model and its sources. The tokens of the target text before each one are given to the decoder, and keep themselves."""

    asked: Asked

    @classmethod
    def of(cls, asked: Asked) -> _Translated:
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
        from headwater.features.text.answer import Plan

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
        from headwater.features.text.tokens import special_ids

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
    from headwater.features.text.tokens import by_marks

    return list(by_marks(names, [False] * count)) if names else list(range(count))


# ---- small matters ---------------------------------------------------------------------------------------------------------------


def _one_each(given: Sequence[Any], asked: Asked) -> None:
    if len(given) != len(asked.texts):
        raise InputError(f"{len(given)} targets for {len(asked.texts)} texts", "one for each", "a list as long as the texts, or a single one")


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
