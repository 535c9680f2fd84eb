"""A class of a text, or a label of one of its words."""

from __future__ import annotations

from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.targets import Target, output, target_of
from headwater.features.text.asked import Asked, Named, Plan, one_each, shortened, simple
from headwater.features.text.tokens import Text, words_of


def classified(asked: Asked) -> Plan:
    target, config = asked.question.target, asked.config
    if target is None:
        found = asked.outputs()
        if found.ndim == 1 or found.shape[1] == 1:
            return simple(asked, output(None))
        best = found.argmax(1).tolist()
        names = [_label(config, k) or str(k) for k in best]
        return simple(asked, Named(output(best), "the predicted class"), names, [f"Predicted: {shortened(names)}."])
    if isinstance(target, str) or (isinstance(target, list | tuple) and target and all(isinstance(t, str) for t in target)):
        numbers = [_number(config, label, asked) for label in ([target] if isinstance(target, str) else target)]
        if isinstance(target, str):
            return simple(asked, Named(output(numbers[0]), f"output {numbers[0]} ({target})"), [target] * len(asked.texts))
        one_each(numbers, asked)
        return simple(asked, Named(output(numbers), "the output chosen for each text"), target)
    aim = target_of(target)
    label = _label(config, aim.index) if isinstance(aim, output) and isinstance(aim.index, int) else None
    return simple(asked, Named(aim, f"{aim.name} ({label})") if label else aim)


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


def labelled(asked: Asked) -> Plan:
    target = asked.question.target
    if isinstance(target, Target) or callable(target):
        return simple(asked, target_of(target))
    masks = [] if target is not None else [_only_mask(asked, k) for k in range(len(asked.texts))]
    pairs = [(m, None) for m in masks] if masks else [target] * len(asked.texts) if isinstance(target, tuple) else target
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise InputError(f"target={target!r} of labels of tokens", "(position or word, label), or a list of these, one for each text", "target=('Paris', 'B-LOC')")
    one_each(pairs, asked)
    places = [place_of(text, where, k) for k, (text, (where, _)) in enumerate(zip(asked.texts, pairs, strict=True))]
    found = asked.outputs() if any(label is None for _, label in pairs) else None
    labels = [_label_number(asked, label) if label is not None else int(found[k, places[k]].argmax()) for k, (_, label) in enumerate(pairs)]  # type: ignore[index]
    said = [f"{_label_name(asked, label)} at {text.tokens[place].strip()!r} ({place})" for text, place, label in zip(asked.texts, places, labels, strict=True)]
    name = said[0] if len(said) == 1 else "a label of a token of each text"
    return simple(asked, Named(output(list(zip(places, labels, strict=True))), name), said, [f"Explained: {shortened(said)}."])


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


def place_of(text: Text, where: Any, k: int) -> int:
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
