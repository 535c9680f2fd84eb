"""What can be asked of a text model besides an output's number: a continuation, an answer in the text. Records; ``answer`` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["continuation", "span"]


@dataclass(frozen=True, eq=False)
class continuation:  # reads as a function at the door, and is a value
    """Which tokens carried this continuation? What is explained is the sum of the log-probabilities of its tokens, each given all before it.

    Args:
        of: the continuation as text, exactly as it follows (``" Paris"``, with its space), or as token ids; a list of texts or of lists of
            ids holds one for each prompt. None: what the model itself says next, greedily.
        count: how many tokens the model says, where ``of`` is None.
        each: explain every token of the continuation by itself: one row of values for each, named after it; values are lower
            triangular, since a token does not depend on later ones.
        foil: another continuation: why this one and not that? What is explained is ``log p(of) - log p(foil)``.
        prefix: whether the continuation's own earlier tokens are parts of the input too, with values of their own (they move along the path
            with the prompt), or are kept as they are. Default: they are where ``each`` is asked for. The rows of ``each`` sum to the
            values of the whole continuation when both are asked with the same ``prefix``.
    """

    of: Any = None
    count: int = 1
    each: bool = False
    foil: Any = None
    prefix: bool | None = None


@dataclass(frozen=True, eq=False)
class span:
    """An answer in the text, for question answering: the sum of its start and end logits, or one of them.

    Args:
        of: the answer as it stands in the context, a pair (first, last) of positions, or a list with one of these for each text. None:
            the predicted answer, the best pair of at most 30 tokens within the context.
        part: "span" (both logits), "start" or "end".
    """

    of: Any = None
    part: str = "span"
