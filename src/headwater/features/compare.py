"""Two models, one question: which parts of the input make their outputs differ?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features import network
from headwater.features.asked import FIXED
from headwater.features.calls import Call, parameters
from headwater.features.explain import explain
from headwater.features.question import Question
from headwater.features.targets import Target, target_of
from headwater.result import FeatureScores
from headwater.tasks.task import logits_of

SIGN = "Positive: the part raised the first model's output above the second's."


def compare_models(first: Any, second: Any, inputs: Any, target: Any = None, **settings: Any) -> FeatureScores:
    """Attributions of the difference between two models' outputs for the same inputs, ``first - second``.

    Two networks are explained as one function. At the same nodes that equals ``explain(first, ...).minus(explain(second, ...))``, since
    attributions are linear; but a tolerance is then kept for the difference, which may be a thousandth of what either model puts out, and
    with several baselines the standard error is that of the difference, not a bound. Other models, and networks of token ids (each has an
    embedding of its own), are explained one after the other and subtracted.

    Args:
        first, second: models of one kind, with outputs of one shape.
        inputs, target, settings: as in :func:`headwater.explain`; not ``layer`` and ``neuron``, which belong to one model.

    To compare two inputs under one model: ``hw.explain(model, one, baseline=other)``, whose values sum to the difference of the outputs.

    >>> a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> e = compare_models(a, b, torch.ones(1, 2), progress=False)
    >>> bool(abs(e.values - (a.weight - b.weight).detach().numpy()).max() < 1e-6)
    True
    """
    for name in ("layer", "neuron", "space"):
        if settings.get(name) is not None:
            raise InputError(f"{name}= for two models", "something that both have: inputs and outputs", f"explain each with {name}=, then first.minus(second)")
    if not _one_function(first, second, inputs, settings):
        found = explain(first, inputs, target, **settings).minus(explain(second, inputs, target, **settings))
        return replace(found, notes=(*found.notes, SIGN))
    kinds = [next(((p.dtype, p.device) for p in parameters(model)), None) for model in (first, second)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise InputError(f"two models of {kinds[0]} and {kinds[1]}", "models of one precision on one device", "second.to(first's dtype and device)")
    found = explain(partial(_beside, first, second), inputs, Difference(target_of(target)), **settings)
    return replace(found, notes=(*found.notes, SIGN))


def _one_function(first: Any, second: Any, inputs: Any, settings: Mapping[str, Any]) -> bool:
    """Whether both are networks whose floating inputs alone move."""
    if settings.get("tokenizer") is not None or not all(network.recognises(Question(model, inputs)) for model in (first, second)):
        return False
    call = Call.of(first, inputs, settings.get("extra"))
    names = call.names or ("",) * len(call.tensors)
    return all(t.is_floating_point() or name in FIXED for t, name in zip(call.tensors, names, strict=True))


def _beside(first: Callable[..., Any], second: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Both outputs, (n, 2, ...)."""
    outputs = [logits_of(model(*args, **kwargs)) for model in (first, second)]
    if outputs[0].shape != outputs[1].shape:
        raise InputError(f"outputs of shapes {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}", "outputs of one shape", "wrap a model so that its outputs match")
    if outputs[0].ndim == 0:
        raise InputError("models that return one number for all examples", "one row for each", "return one value for each example")
    return torch.stack(outputs, 1)


@dataclass(frozen=True, eq=False)
class Difference:
    """A target of two outputs side by side (n, 2, ...): of the first less that of the second."""

    of: Target

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.of.name}, first model minus second"

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """The difference (m,)."""
        return self.of.pick(output[:, 0], rows) - self.of.pick(output[:, 1], rows)
