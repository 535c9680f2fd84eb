"""Texts: which tokens carried what a language model said. Token ids are met where they come out of the embedding; everything else is a network.

    hw.explain(classifier, ["a good film", "a bad one"], tokenizer=tokenizer)              # the predicted class of each
    hw.explain(gpt, "The capital of France is", " Paris", tokenizer=tokenizer)             # which tokens carried this continuation
    hw.explain(reader, (question, context), "span", tokenizer=tokenizer)                   # an extracted answer
    hw.explain(tagger, "Ada lives in Paris", ("Paris", "B-LOC"), tokenizer=tokenizer)      # a label of a word

Values are (n, positions), the signed sum over the embedding axis, with zeros to the right of a text's end. Special tokens ([CLS], [SEP], <s>,
</s>, padding) are the same in the input and in the baseline: theirs are exactly 0. Positions, segments and masks stay as they are.
"""

from __future__ import annotations

import sys
from typing import Any

from headwater.features.question import Question
from headwater.result import FeatureScores

__all__ = ["explain", "recognises"]


def recognises(question: Question) -> bool:
    """A tokenizer is given, or the model is one of transformers and the inputs are texts or token ids."""
    if question.tokenizer is not None or _is_pipeline(question.model):
        return True
    models = sys.modules.get("transformers.modeling_utils")  # no model of transformers exists before this was imported
    if models is None or not isinstance(question.model, models.PreTrainedModel):
        return False
    from headwater.features.text.tokens import looks_like_text

    return looks_like_text(question.inputs)


def explain(question: Question) -> FeatureScores:
    """Attributions of the tokens of texts."""
    from dataclasses import replace

    from headwater.features.text.answer import answer

    if _is_pipeline(question.model):  # of transformers: a model together with its tokenizer
        question = replace(question, model=question.model.model, tokenizer=question.tokenizer or question.model.tokenizer)
    return answer(question)


def _is_pipeline(model: Any) -> bool:
    pipelines = sys.modules.get("transformers.pipelines")
    return pipelines is not None and isinstance(model, pipelines.Pipeline)
