"""A question about texts becomes a question about a network: token ids in, the path in the output of their embedding, one number out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from headwater.errors import InputError
from headwater.features import network
from headwater.features.calls import quiet
from headwater.features.paths import Blur
from headwater.features.question import Question
from headwater.features.targets import Target, target_of
from headwater.features.text.asked import Asked, Plan, simple
from headwater.features.text.classes import classified, labelled
from headwater.features.text.continuations import continued, given_target
from headwater.features.text.frame import Framed
from headwater.features.text.reading import Reading, decoder_reads_text, longest, reading_of
from headwater.features.text.spans import answered
from headwater.features.text.targets import continuation, span
from headwater.features.text.tokens import Text, check, encoded, read, special_ids
from headwater.result import FeatureScores

GENERATING = ("causal", "seq2seq")
MISSED = 0.05  # of the change of the output, from which a residual is worth a sentence
MEND = (
    "ask for a tolerance=, or compare with the embedding of a real token (hw.baselines.token): models that normalise their embeddings first"
    " change abruptly near the zero embedding, and close to it every rule is blind"
)
FRAME = "Special tokens are the same in the input and the baseline: their values are exactly 0."


def answer(question: Question) -> FeatureScores:
    """Attributions of texts. Raises InputError, BatchCoupling, NotFinite."""
    question.refuse("a text model", "output", "discrete", "smooth")
    question.refuse("a text model", "feature_names", instead="its parts are named by their tokens")
    if isinstance(question.path, Blur):
        raise InputError("a blur path for a text", "another path", "leave path= out for the straight line")
    check(question.tokenizer)
    if not callable(question.model):
        raise InputError(f"a model of type {type(question.model).__name__} with a tokenizer", "a torch module or a transformers model", "pass the model itself")
    if question.extra is not None and not isinstance(question.extra, Mapping):
        raise InputError(f"extra of type {type(question.extra).__name__} for a text model", "a dict from argument names to values", "extra={'name': value}")
    taken = sorted({"input_ids", "attention_mask", "decoder_input_ids", "inputs_embeds"} & set(question.extra or ()))
    if taken:
        raise InputError(
            f"extra with {', '.join(taken)}", "what stands beside the texts", "masks belong to the inputs: what the tokenizer returns; a continuation to target="
        )
    with quiet(question.model) as said:
        asked, notes = _asked(question)
        scores = _explained(asked)
        return replace(scores, notes=(*said, *notes, *scores.notes))


def _asked(question: Question) -> tuple[Asked, list[str]]:
    model, tokenizer, extra = question.model, question.tokenizer, dict(question.extra or {})
    config = getattr(model, "config", None)
    pad = next((int(i) for i in (getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)) if i is not None), None)
    texts, notes = read(question.inputs, tokenizer, special_ids(tokenizer) if tokenizer is not None else _special(config), _filler(pad, config, tokenizer))
    limit = longest(model, tokenizer)
    probe = texts[0] if limit is None or len(texts[0]) <= limit else _ends(texts[0], limit)
    reading = reading_of(model, probe, pad, extra, isinstance(question.target, continuation))
    texts, cut = _fitted(texts, reading, tokenizer, limit)
    if pad is None and reading.kind == "sequence" and _needs_padding(reading, texts):
        raise InputError("a model that takes no two texts at once, since its config has no pad_token_id", "one", "model.config.pad_token_id = tokenizer.pad_token_id")
    asked = Asked(question, texts, reading, tokenizer, extra)
    first = decoder_reads_text(reading, texts, extra)
    if first is not None:
        asked.extra["decoder_first"] = first
    return asked, [*notes, *cut, *([FRAME] if any(any(t.special) for t in texts) else [])]


def _special(config: Any) -> frozenset[int]:
    """Special ids as far as a model's config names them."""
    found: set[int] = set()
    for name in ("bos", "eos", "pad", "cls", "sep", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        found |= {int(v) for v in (value if isinstance(value, list | tuple) else [value]) if v is not None}
    return frozenset(found)


def _filler(pad: int | None, config: Any, tokenizer: Any) -> int | None:
    """The id that is nothing but padding in rows of ids: one that also ends a text may stand for its end."""
    ends = {getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)}
    return None if pad in ends else pad


def _ends(text: Text, limit: int) -> Text:
    """A text cut to a length, its last token kept."""
    head, tail = text.cut(slice(0, limit - 1)), text.cut(slice(len(text) - 1, len(text)))
    return replace(head, ids=head.ids + tail.ids, aligned={k: row + tail.aligned[k] for k, row in head.aligned.items()})


def _needs_padding(reading: Reading, texts: list[Text]) -> bool:
    """Whether the model refuses two texts at once, as decoders with a classifier do that have no padding token."""
    ids, others = reading.tensors([texts[0], texts[0]])
    try:
        with torch.no_grad():
            reading.call(ids, **others)
    except ValueError as error:
        if "padding" in str(error):
            return True
        raise
    return False


def _fitted(texts: list[Text], reading: Reading, tokenizer: Any, limit: int | None) -> tuple[list[Text], list[str]]:
    """Texts cut to what the model reads, as its tokenizer cuts them; what cannot be cut in a sensible way is refused."""
    long = [] if limit is None else [k for k, text in enumerate(texts) if len(text) > limit]
    if not long:
        return texts, []
    what = f"text {_numbers(long)} of up to {max(len(texts[k]) for k in long)} tokens for a model that reads {limit}"
    if reading.kind in GENERATING or any(texts[k].source is None for k in long):
        raise InputError(what, f"at most {limit} tokens", "shorten it: which part may go is for you to say")
    cut = "only_second" if reading.kind == "span" and isinstance(texts[long[0]].source, tuple) else "longest_first"
    fitted = [encoded(tokenizer, text.source, limit, cut) if k in long else text for k, text in enumerate(texts)]
    return fitted, [f"Cut at the end, as the tokenizer does: {what}."]


def plan_of(asked: Asked) -> tuple[Plan, Plan | None]:
    """What is worked off; and the foil's, where there is one."""
    target, kind = asked.question.target, asked.reading.kind
    if target is None and asked.question.neuron is not None:
        return _free(asked), None
    if kind in ("causal", "seq2seq") and not isinstance(target, Target) and not (callable(target) and not isinstance(target, continuation)):
        return continued(asked, target if isinstance(target, continuation) else continuation(given_target(target)))
    if isinstance(target, continuation):
        raise InputError(f"a continuation of a {type(asked.question.model).__name__}", "a model that writes text", "leave target= out, or choose one of its outputs")
    if isinstance(target, span) and kind != "span":
        raise InputError(f"an answer's span of a {type(asked.question.model).__name__}", "a model for question answering", "choose one of its outputs")
    return {"sequence": classified, "tokens": labelled, "span": answered}.get(kind, _free)(asked), None


def _free(asked: Asked) -> Plan:
    """Any function of the output; with no target, a neuron is explained."""
    if asked.question.target is None and asked.question.neuron is None:
        raise InputError(
            f"no target for a {type(asked.question.model).__name__}, which has no head", "a function of its output", "target=lambda hidden: hidden[:, 0, 7], say"
        )
    return simple(asked, None if asked.question.target is None else target_of(asked.question.target))


# ---- from plans to scores --------------------------------------------------------------------------------------------------------


def _explained(asked: Asked) -> FeatureScores:
    plan, foil = plan_of(asked)
    scores = _scores(asked, plan)
    if foil is None:
        return scores
    other = _scores(asked, foil)
    words = f"{scores.target} less {other.target}"
    notes = tuple(dict.fromkeys((*scores.notes, *other.notes)))
    provenance = {**scores.provenance, "foil": other.provenance}
    return replace(scores.minus(other), target=words, method=scores.method, baseline=scores.baseline, notes=notes, provenance=provenance)


def _scores(asked: Asked, plan: Plan) -> FeatureScores:
    question, reading = asked.question, plan.reading
    ids, others = reading.tensors(plan.texts)
    kept = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    for k, text in enumerate(plan.texts):
        own = len(text) - (plan.kept[k] if plan.kept is not None else 0)
        kept[k, :own] = torch.tensor(text.special[:own], dtype=torch.bool)
    pad = next((p for p in (getattr(asked.tokenizer, "pad_token_id", None), getattr(asked.config, "pad_token_id", None)) if p is not None), None)
    width = ids.shape[1]
    inner = replace(
        question,
        model=reading.call,
        inputs=ids,
        target=plan.target,
        baseline=Framed(question.baseline, kept, reading.embedding, asked.tokenizer, pad),
        extra={**others, **asked.extra, **plan.extra},
        tokenizer=None,
        example_names=plan.names or question.example_names,
        batch_size=asked.chunk(width, len(reading.keep) if reading.keep is not None else width),
    )
    return _dressed(network.explain(inner), plan)


def _dressed(scores: FeatureScores, plan: Plan) -> FeatureScores:
    """With the tokens' texts, as wide as what is shown, and what merges tokens into words."""
    at_tokens = isinstance(scores.values, np.ndarray) and scores.values.ndim == 2
    shown = list(plan.texts)  # in a layer, what keeps itself in the input moves too
    if at_tokens and plan.kept is not None:
        shown = [text.cut(slice(0, len(text) - kept)) for text, kept in zip(plan.texts, plan.kept, strict=True)]
    elif at_tokens and plan.after is not None:
        shown = list(plan.after)
    words: dict[str, Any] = {"word_ids": [list(text.words) for text in shown]}
    words |= {"explained": list(plan.explained)} if plan.explained else {}
    width = max(map(len, shown))
    missed = np.flatnonzero(scores.relative_residual > MISSED).tolist()
    said = [f"Values miss more than {MISSED:.0%} of the change of the output in row {_numbers(missed)}: {MEND}."] if missed else []
    return replace(
        scores,
        values=_wide(scores.values, width) if at_tokens else scores.values,
        stderr=_wide(scores.stderr, width) if at_tokens and scores.stderr is not None else scores.stderr,
        inputs=np.array([[*text.ids, *(plan.reading.pad,) * (width - len(text))] for text in shown]) if at_tokens else None,
        kind="text",
        tokens=tuple(text.tokens for text in shown),
        notes=(*plan.notes, *scores.notes, *said),
        provenance={**scores.provenance, **words},
    )


def _numbers(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")


def _wide(values: Any, width: int) -> np.ndarray:
    """(n, positions) as (n, width): what is cut off is 0, or not shown, and what is added is 0."""
    found = np.zeros((len(values), width), dtype=values.dtype)
    found[:, : min(width, values.shape[1])] = values[:, :width]
    return found
