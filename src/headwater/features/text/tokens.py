"""Texts as tokens: ids, what is special, what makes a word, where each token stands in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError

UNLIMITED = 10**6  # tokenizers that know no limit give a very large number
DESCRIBED = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping")
FORMS = "a text, a pair of texts (a tuple), a list of these, a list of lists of words, token ids (n, positions), or what the tokenizer returns"


@dataclass(frozen=True, eq=False)
class Text:
    """One text, without padding; every sequence has one entry for each token.

    Args:
        ids: token ids. tokens: what they are called.
        special: whether a token is special ([CLS], </s>, ...).
        words: the number of the word it belongs to, None for special tokens.
        part: 0 for the first text of a pair, 1 for the second, None for special tokens and where it is not known.
        places: (start, end) in the text, or None where it is not known.
        aligned: what else the model takes for each token (token_type_ids, ...).
        source: the text, or pair of texts.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    words: tuple[int | None, ...]
    part: tuple[int | None, ...] = ()
    places: tuple[tuple[int, int], ...] | None = None
    aligned: dict[str, tuple[int, ...]] = field(default_factory=dict)
    source: str | tuple[str, str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, keep: slice) -> Text:
        """Some of the tokens."""
        aligned = {name: row[keep] for name, row in self.aligned.items()}
        places = None if self.places is None else self.places[keep]
        return replace(
            self, ids=self.ids[keep], tokens=self.tokens[keep], special=self.special[keep], words=self.words[keep], part=self.part[keep], places=places, aligned=aligned
        )

    def followed_by(self, ids: Sequence[int], tokens: Sequence[str], words: Sequence[int | None]) -> Text:
        """With more tokens at its end, none of them special. What is aligned goes on as at its last token; position_ids count on."""
        first = max((w for w in self.words if w is not None), default=-1) + 1
        aligned = {name: row + _going_on(name, row, len(ids)) for name, row in self.aligned.items()}
        more = tuple(None if w is None else w + first for w in words)
        part, special = (None,) * len(ids), (False,) * len(ids)
        return Text(self.ids + tuple(ids), self.tokens + tuple(tokens), self.special + special, self.words + more, self.part + part, None, aligned, None)


def _going_on(name: str, row: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(row[-1] + 1 + k for k in range(count)) if name == "position_ids" else (row[-1],) * count


# ---- reading the inputs ----------------------------------------------------------------------------------------------------------


def looks_like_text(inputs: Any) -> bool:
    """Whether inputs are texts, token ids or what a tokenizer returns."""
    if isinstance(inputs, Mapping):
        return "input_ids" in inputs
    if isinstance(inputs, Tensor):
        return not inputs.is_floating_point()
    if isinstance(inputs, np.ndarray):
        return inputs.dtype.kind in "iuUO"
    first = inputs
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, str | int | np.integer) and not isinstance(first, bool)


def check(tokenizer: Any) -> None:
    """Raise InputError unless this is a tokenizer of transformers, or None."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens")):
        raise InputError(
            f"a tokenizer of type {type(tokenizer).__module__}.{type(tokenizer).__name__}",
            "a tokenizer of transformers",
            "transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer) wraps one of the library tokenizers",
        )


def read(inputs: Any, tokenizer: Any, specials: frozenset[int], pad: int | None) -> tuple[list[Text], list[str]]:
    """Any inputs as texts, and what is to be noted. ``specials``: ids that are special; ``pad``: the id that fills up rows of ids. Raises InputError."""
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "UO":
        inputs = inputs.tolist()
    if isinstance(inputs, Mapping):
        found, notes = _encoded(inputs, tokenizer, specials, pad)
    elif _all_strings(inputs):
        if tokenizer is None:
            raise InputError("texts without a tokenizer", "the tokenizer that the model was trained with", "hw.explain(model, texts, tokenizer=tokenizer)")
        found, notes = [encoded(tokenizer, one) for one in _listed(inputs)], []
    else:
        found, notes = _encoded({"input_ids": inputs}, tokenizer, specials, pad)
    if not found:
        raise InputError("no text", "at least one", FORMS)
    for k, text in enumerate(found):
        if all(text.special):
            raise InputError(f"text {k}, which has no token besides special ones", "at least one token of its own", "leave empty texts out")
    return found, notes


def _all_strings(inputs: Any) -> bool:
    if isinstance(inputs, str):
        return True
    return isinstance(inputs, list | tuple) and bool(inputs) and all(_all_strings(part) for part in inputs)


def _listed(inputs: Any) -> list[Any]:
    """One entry for each example: a text, a pair (a tuple), or a list of words."""
    if isinstance(inputs, str) or (isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs)):
        return [inputs]
    for k, one in enumerate(inputs):
        pair = isinstance(one, tuple) and len(one) == 2 and all(isinstance(part, str) for part in one)
        words = isinstance(one, list) and all(isinstance(part, str) for part in one)
        if not isinstance(one, str) and not pair and not words:
            raise InputError(f"text {k} of type {type(one).__name__}", FORMS, "pairs are tuples of two texts")
    return list(inputs)


def encoded(tokenizer: Any, one: Any, limit: int | None = None, cut: str = "longest_first") -> Text:
    """One text, pair or list of words by a tokenizer; cut to ``limit`` tokens where it is given ("only_second": the context alone)."""
    given = one if isinstance(one, tuple) else (one,)
    options: dict[str, Any] = {"return_special_tokens_mask": True, "add_special_tokens": True, "verbose": False}
    options |= {"truncation": cut, "max_length": limit} if limit is not None else {}
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(*given, is_split_into_words=isinstance(one, list), return_offsets_mapping=fast, **options)
    ids = tuple(map(int, found["input_ids"]))
    names = [str(t) for t in tokenizer.convert_ids_to_tokens(list(ids))]
    typed = special_ids(tokenizer)
    special = tuple(bool(m) or i in typed for m, i in zip(found["special_tokens_mask"], ids, strict=True))
    part: Sequence[int | None] = found.sequence_ids(0) if fast else found.get("token_type_ids", [None] * len(ids))
    part = tuple(None if s else p for p, s in zip(part, special, strict=True))
    places = tuple((int(a), int(b)) for a, b in found["offset_mapping"]) if fast else None
    words = _words(found.word_ids(0) if fast else None, names, part, special, places, given if not isinstance(one, list) else None)
    aligned = {name: tuple(map(int, row)) for name, row in found.items() if name not in DESCRIBED and len(row) == len(ids)}
    source = one if isinstance(one, str | tuple) else None
    return Text(ids, written(tokenizer, names), special, words, part, places, aligned, source)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a tokenizer's special tokens; mask and unknown stand for words of the text, unless they also have another part."""
    frame = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "pad")}
    words = {getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "unk")} - frame
    return frozenset(int(i) for i in {*tokenizer.all_special_ids, *frame} - words if i is not None)


def written(tokenizer: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Tokens as people write them: bytes decoded, the space before a word as a space; ``##`` stays. Of tokens that are parts of one
    character the first is written as that character, the others as nothing."""
    decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    if "ByteLevel" in decoder or hasattr(tokenizer, "byte_decoder"):
        return tuple(_decoded(tokenizer, names))
    return tuple(name.replace("\u2581", " ") for name in names)


def _decoded(tokenizer: Any, names: Sequence[str]) -> list[str]:
    kept, found, pending = set(tokenizer.all_special_tokens), [], 0
    for k, name in enumerate(names):
        whole = name if name in kept else str(tokenizer.convert_tokens_to_string(list(names[k - pending : k + 1])))
        if whole.endswith("\ufffd") and pending < 3:  # a character has at most four bytes
            pending += 1
            found.append("\ufffd")
            continue
        found[k - pending :] = [whole, *[""] * pending]
        pending = 0
    return found


def _encoded(given: Mapping[str, Any], tokenizer: Any, specials: frozenset[int], pad: int | None) -> tuple[list[Text], list[str]]:
    """From ids, or what a tokenizer returned; padding on either side is taken off."""
    if "input_ids" not in given:
        raise InputError(f"inputs with {', '.join(map(str, given)) or 'nothing'}", "input_ids among them", FORMS)
    rows = _rows(given["input_ids"], "input_ids")
    if any(isinstance(i, list) for row in rows for i in row):
        raise InputError("input_ids with more than two axes", "(n, positions)", "models of multiple choice are not supported: explain each choice's logit as a function")
    masks = _rows(given["attention_mask"], "attention_mask") if "attention_mask" in given else None
    others = {str(name): _rows(value, str(name)) for name, value in given.items() if name not in (*DESCRIBED, "labels")}
    for name, table in (*others.items(), *([("attention_mask", masks)] if masks is not None else [])):
        if [len(row) for row in table] != [len(row) for row in rows]:
            raise InputError(f"{name} of lengths {[len(r) for r in table][:5]}", f"those of input_ids, {[len(r) for r in rows][:5]}", "pass other things with extra=")
    found, left = [], []
    for k, row in enumerate(rows):
        bounds = _unpadded(row, None if masks is None else masks[k], pad)
        if bounds.start:
            left.append(k)
        aligned = {name: tuple(map(int, table[k][bounds])) for name, table in others.items()}
        inner = [] if masks is None else [m for m in masks[k][bounds] if not m]
        if inner:
            raise InputError(f"an attention_mask with {len(inner)} zeros inside text {k}", "zeros only before its beginning or after its end", "take these tokens out")
        found.append(_of_ids([int(i) for i in row[bounds]], tokenizer, specials, aligned))
    notes = ["Padding on the left was taken off: positions count from the first token, as in generation."] if left else []
    notes += ["The labels among the inputs were not used."] if "labels" in given else []
    notes += [] if tokenizer is not None else ["No tokenizer was given: tokens are named by their ids, and special ones are those that the model's config names."]
    return found, notes


def _of_ids(ids: list[int], tokenizer: Any, specials: frozenset[int], aligned: dict[str, tuple[int, ...]]) -> Text:
    special = tuple(i in specials for i in ids)
    if tokenizer is None:
        return Text(tuple(ids), tuple(map(str, ids)), special, tuple(None if s else k for k, s in enumerate(special)), (None,) * len(ids), None, aligned)
    names = [str(t) for t in tokenizer.convert_ids_to_tokens(ids)]
    part = tuple(None if s else p for s, p in zip(special, aligned.get("token_type_ids", (0,) * len(ids)), strict=True))
    return Text(tuple(ids), written(tokenizer, names), special, _words(None, names, part, special, None, None), part, None, aligned)


def _rows(value: Any, name: str) -> list[list[Any]]:
    """Numbers as a list of rows; one row alone is one text. Raises InputError."""
    if isinstance(value, Tensor | np.ndarray):
        value = np.asarray(value.cpu()) if isinstance(value, Tensor) else value
        value = value.astype(np.int64) if value.dtype.kind == "b" else value
        if value.dtype.kind not in "iuO":
            raise InputError(f"{name} of type {value.dtype}", "whole numbers", FORMS)
    rows = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(rows, list | tuple):
        raise InputError(f"{name} of type {type(value).__name__}", FORMS, "pass texts with tokenizer=")
    rows = [r.tolist() if isinstance(r, Tensor | np.ndarray) else r for r in rows]
    rows = [rows] if rows and all(isinstance(r, int | np.integer) for r in rows) else rows
    if not all(isinstance(r, list | tuple) and r and all(isinstance(i, int | np.integer | list) and not isinstance(i, bool) for i in r) for r in rows):
        raise InputError(f"{name} that are not rows of whole numbers", FORMS, "texts need tokenizer=")
    return [list(r) for r in rows]


def _unpadded(row: list[int], mask: list[int] | None, pad: int | None) -> slice:
    """Where a text stands among its padding: where the mask is not 0, else between padding tokens."""
    if mask is not None:
        seen = [k for k, m in enumerate(mask) if m]
        return slice(seen[0], seen[-1] + 1) if seen else slice(0, 0)
    own = [k for k, i in enumerate(row) if i != pad]
    return slice(own[0], own[-1] + 1) if own else slice(0, 0)


# ---- words -----------------------------------------------------------------------------------------------------------------------


def _words(
    given: Sequence[int | None] | None,
    names: Sequence[str],
    part: Sequence[int | None],
    special: Sequence[bool],
    places: Sequence[tuple[int, int]] | None,
    texts: Sequence[str] | None,
) -> tuple[int | None, ...]:
    """Which word each token belongs to, numbered through both texts of a pair. The tokenizer's words (``given``), unless it takes several
    words for one, as those of sentence pieces can; then, and where it knows none, white space or the marks of the tokens decide."""
    keys: list[Any] = list(given) if given is not None else []
    if places is not None and texts is not None and (not keys or _lumped(keys, part, places, texts)):
        keys = [None if p is None else len(texts[p][: _begin(texts[p], a, b)].split()) for p, (a, b) in zip(part, places, strict=True)]
    elif not keys or (places is None and all(k is None for k in keys)):
        keys = by_marks(names, special)
    numbers: dict[Any, int] = {}
    return tuple(None if s or key is None else numbers.setdefault((p, key), len(numbers)) for key, p, s in zip(keys, part, special, strict=True))


def _begin(text: str, start: int, end: int) -> int:
    """Where the first letter of a token's first word ends: white space before a token belongs to its word."""
    letters = [k for k in range(start, end) if not text[k].isspace()]
    return letters[0] + 1 if letters else end


def _lumped(keys: Sequence[int | None], part: Sequence[int | None], places: Sequence[tuple[int, int]], texts: Sequence[str]) -> bool:
    """Whether one of the tokenizer's words holds white space of the text between its letters."""
    spans: dict[Any, tuple[int, int]] = {}
    for key, p, (a, b) in zip(keys, part, places, strict=True):
        if key is not None and p is not None:
            low, high = spans.get((p, key), (a, b))
            spans[p, key] = (min(low, a), max(high, b))
    return any(len(texts[p][a:b].split()) > 1 for (p, _), (a, b) in spans.items())


def by_marks(names: Sequence[str], special: Sequence[bool]) -> list[int]:
    """Words by the marks of the tokens: ``##`` goes on with a word; where any token begins with a mark of a space, only those begin one."""
    marked = any(name[:1] in ("\u2581", "\u0120") for name in names)
    found, word = [], -1
    for k, name in enumerate(names):
        goes_on = not name.startswith(("\u2581", "\u0120")) if marked else name.startswith("##")
        word += 1 if not goes_on or word < 0 or (k and special[k - 1]) else 0
        found.append(word)
    return found


def words_of(text: Text) -> list[tuple[int, str]]:
    """The words of a text, each with the position of its first token."""
    rows: dict[int, list[int]] = {}
    for k, word in enumerate(text.words):
        if word is not None:
            rows.setdefault(word, []).append(k)
    return [(row[0], _spoken(text, row)) for row in rows.values()]


def _spoken(text: Text, row: list[int]) -> str:
    p = text.part[row[0]]
    if text.places is not None and text.source is not None and p is not None:
        source = text.source if isinstance(text.source, str) else text.source[p]
        return source[text.places[row[0]][0] : text.places[row[-1]][1]].strip()
    return "".join(text.tokens[k].removeprefix("##") if n else text.tokens[k] for n, k in enumerate(row)).strip()


# ---- as tensors ------------------------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device, step: int = 1) -> Tensor:
    """Rows of numbers (n, longest), filled up to the right; the width is a multiple of ``step``."""
    width = -(-max(map(len, rows)) // step) * step
    return torch.tensor([[*row, *(fill,) * (width - len(row))] for row in rows], dtype=torch.int64, device=device)
