"""Moving averages of a model's weights (EMA: Polyak & Juditsky 1992; what diffusion models are sampled from), read from whatever keeps them.

They lie beside the raw weights in a checkpoint's file, as ``ema/NAME``, where they differ from these: the average of a frozen weight is that
weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.training.journal import state_of

_INSIDE = ("module", "ema_model", "ema", "model")  # where torch, timm and ema-pytorch keep the averaged copy of the model


class Average:
    """The moving average that ``given`` keeps of ``model``'s weights.

    ``given``: a copy of the model with averaged weights, or what holds one (torch's AveragedModel); what holds ``shadow_params`` in the
    order of ``model.parameters()``, all of them or the trained ones (diffusers' EMAModel); or tensors by name.

    Raises:
        InputError: nothing of these, or of another model.
    """

    def __init__(self, given: Any, model: nn.Module) -> None:
        self.given, self.model = given, model
        self._first = self._versions()
        self.tensors()

    @property
    def decay(self) -> float | None:
        """What the average keeps of itself at each step, if ``given`` tells: of a schedule that warms up, its last value."""
        for name in ("decay", "beta"):
            found = getattr(self.given, name, None)
            if isinstance(found, float | int) and not isinstance(found, bool):
                return float(found)
        for name in ("multi_avg_fn", "avg_fn"):  # torch's are closures
            function = inspect.unwrap(getattr(self.given, name, None) or int)
            found = inspect.getclosurevars(function).nonlocals.get("decay") if inspect.isfunction(function) else None
            if isinstance(found, float | int):
                return float(found)
        return None

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"kind": type(self.given).__name__, "decay": self.decay}

    @property
    def moved(self) -> bool:
        """Whether any of it was written to since recording began."""
        return self._versions() != self._first

    def _versions(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t._version) for t in self._held().values()]

    def tensors(self) -> dict[str, Tensor]:
        """Averaged weights, and buffers where the average has them, by the names of the model's. Raises InputError."""
        state, held = state_of(self.model), self._held()
        wrong = next((n for n, t in held.items() if n not in state or t.shape != state[n].shape), None)
        if wrong is not None:
            given = f"averaged weights whose {wrong!r} has shape {tuple(held[wrong].shape)}, {tuple(state[wrong].shape) if wrong in state else 'unknown'} in the model"
            raise InputError(given, "the average of this model's weights", "make it from the model that is trained: EMAModel(model.parameters())")
        missing = [n for n, p in self.model.named_parameters() if p.requires_grad and n not in held]
        if missing:
            raise InputError(f"an average without {missing[0]!r}", "one of every trained weight", "make it from the model that is trained")
        return held

    def differing(self) -> dict[str, Tensor]:
        """Those that are not the raw weights themselves: what a checkpoint keeps."""
        raw = state_of(self.model)
        found = {n: t.detach().to(raw[n].device) for n, t in self.tensors().items()}
        return {n: t for n, t in found.items() if not torch.equal(t.to(raw[n].dtype), raw[n])}

    def _held(self) -> dict[str, Tensor]:
        """What is averaged, by name."""
        if isinstance(self.given, Mapping):
            return {str(n): t for n, t in self.given.items() if isinstance(t, Tensor)}
        shadows = getattr(self.given, "shadow_params", None)
        if isinstance(shadows, Sequence):
            return self._in_order(list(shadows))
        wanted = {n for n, p in self.model.named_parameters() if p.requires_grad}
        inner: Any = self.given
        for _ in range(3):  # DistributedDataParallel in AveragedModel, say
            if isinstance(inner, nn.Module) and wanted <= {n for n, _ in inner.named_parameters()}:
                return {n: t for n, t in state_of(inner).items() if n in state_of(self.model)}
            inner = next((getattr(inner, name) for name in _INSIDE if isinstance(getattr(inner, name, None), nn.Module)), None)
        raise InputError(
            f"ema= a {type(self.given).__name__} that holds no copy of the model",
            "a copy of the model with averaged weights, torch's AveragedModel, diffusers' EMAModel, or tensors by name",
            "pass what keeps the average itself",
        )

    def _in_order(self, shadows: list[Tensor]) -> dict[str, Tensor]:
        """A list of tensors in the order of the model's parameters, all or the trained ones."""
        every = dict(self.model.named_parameters())
        trained = {n: p for n, p in every.items() if p.requires_grad}
        for named in (every, trained):
            if [p.shape for p in named.values()] == [t.shape for t in shadows]:
                return dict(zip(named, shadows, strict=True))
        raise InputError(
            f"{len(shadows)} averaged tensors for {len(every)} parameters, {len(trained)} of them trained",
            "one for each, in their order and shapes",
            "make it from the model that is trained: EMAModel(model.parameters())",
        )
