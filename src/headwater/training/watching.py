"""A model and its optimizer under watch within one stage: what each optimizer step and each forward pass did, as it happened."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import RunError
from headwater.training.journal import RANDOM, Journal, Rows
from headwater.training.optimizers import OptimizerRecord, state_tensors
from headwater.training.places import Places

NAN = float("nan")


class Watched:
    """Counts optimizer steps and notes what each group's settings were at that moment; hears the model's forward passes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: OptimizerRecord, size: int, places: Places) -> None:
        self.model, self.optimizer, self.record, self.size, self.places = model, optimizer, record, size, places
        self.pending: list[list[tuple[Any, ...]]] = []
        self.moved = False
        self.state: dict[str, Tensor] = {}
        self.ears = Ears(model)
        self._norms: list[Tensor] = []
        self._touched = False
        self._versions = self._count()
        self._hooks = [optimizer.register_step_pre_hook(self._note), optimizer.register_step_post_hook(self._settle)]

    def _count(self) -> list[tuple[int, int]]:
        """Which tensors the parameters are and how often each was written to: tells whether anything but the optimizer changed them."""
        return [(id(p), p._version) for group in self.optimizer.param_groups for p in group["params"]]

    def _note(self, *_: Any) -> None:
        if not self.moved and not self.pending:
            self.state = {k: t.clone() for k, t in state_tensors(self.optimizer, self.model).items()}
        self._touched |= self._count() != self._versions
        self._norms = gradient_norms(self.optimizer)
        self.pending.append([_noted(group) for group in self.optimizer.param_groups])

    def _settle(self, *_: Any) -> None:
        self._versions = self._count()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.ears.release()

    def rows(self, stage: int, step: int, clip: float, batch: int) -> Rows:
        """The rows of :data:`STEPS` for the step since the last call; all 0 where the optimizer took none."""
        if len(self.pending) > 1:
            raise RunError(
                f"{len(self.pending)} optimizer steps since the last recorder.step()",
                "recorder.step(indices) after every optimizer.step()",
                "call it once per optimizer step, with the examples of all micro-batches",
            )
        count = len(self.record.groups)
        groups = self.pending[0] if self.pending else [(0.0,) * 3] * count
        self.moved |= bool(self.pending)
        if len(groups) != count:
            raise RunError(f"an optimizer with {len(groups)} groups that had {count}", "the same groups during a stage", "begin a new stage: recorder.stage(...)")
        return [(step, stage, number, *group[:3], clip, batch) for number, group in enumerate(groups)]

    def log(self, journal: Journal, step: int, loss: Any) -> None:
        """Write what a replay needs to know of the step since the last call."""
        groups = self.pending.pop() if self.pending else None
        value = NAN if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        journal.log_move(step, groups is not None, self._touched, value, self._norms)
        self._norms, self._touched = [], False
        if groups is not None:
            journal.log_replay(settings=[(step, number, *group[3:]) for number, group in enumerate(groups)])
        self.ears.log(journal, step)


def gradient_norms(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The norm of each gradient, as the optimizer meets them (clipped and unscaled)."""
    found = [p.grad.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not found:
        return []
    return norms_of_each([g.coalesce().values() if g.is_sparse else g for g in found])


def norms_of_each(tensors: list[Tensor]) -> list[Tensor]:
    """Of dense tensors, in at least float32."""
    if tensors and all(t.dtype in (torch.float32, torch.float64) for t in tensors):
        return list(torch._foreach_norm(tensors))  # one call for all of them, as torch's own clipping does
    return [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _noted(group: dict[str, Any]) -> tuple[Any, ...]:
    """A group's settings now: first those of :data:`STEPS`, then those of :data:`SETTINGS`, in their order."""
    get = group.get
    beta1, beta2 = get("betas", (0.0, 0.0))
    steps = float(group["lr"]), float(get("momentum", 0.0)), float(group["weight_decay"])
    return *steps, float(beta1), float(beta2), float(get("eps", 0.0)), float(get("dampening", 0.0)), bool(get("nesterov")), bool(get("amsgrad"))


class Ears:
    """Hooks on the model's forward pass: how many examples, in which mode, under autocast or not, and the generator's state where the
    pass drew random numbers. Passes without gradients (a validation) are not heard; a compiled model is not listened to at all, since
    hooks would become part of what is compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = getattr(model, "_compiled_call_impl", None) is not None
        self.heard: list[tuple[int, bytes, tuple[str, ...], np.ndarray | None]] = []
        self.foreign = False
        self._states: tuple[Tensor, Tensor | None] | None = None
        self._modes: dict[bytes, list[str]] = {}
        self._numbers: dict[bytes | tuple[str, ...], int] = {}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._cuda = device if device.type == "cuda" else None
        self._device = device.type
        self._hooks = [] if self.compiled else [model.register_forward_pre_hook(_Ear(self.begin), with_kwargs=True), model.register_forward_hook(_Ear(self.end))]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass."""
        self._states = None
        if module is self.model and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._states = self._random()
            self._batch = _examples(args, kwargs)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it."""
        if module is not self.model or self._states is None:
            return
        before, after, self._states = self._states, self._random(), None
        drew = any(a is not None and b is not None and _content(a) != _content(b) for a, b in zip(before, after, strict=True))
        self.heard.append((self._batch, self._mode(), self._cast(), _packed(before) if drew else None))

    def _mode(self) -> bytes:
        """A name for the modes that the modules are in now; which of them train is looked up once for each."""
        found = bytes(_training(self.model, []))
        if found not in self._modes:
            self._modes[found] = [name for name, module in self.model.named_modules() if module.training]
        return found

    def _random(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None

    def _cast(self) -> tuple[str, ...]:
        """The autocast that a pass ran under: (device, dtype), or nothing."""
        on = torch.is_autocast_enabled(self._device)
        return (self._device, str(torch.get_autocast_dtype(self._device)).removeprefix("torch.")) if on else ()

    def log(self, journal: Journal, step: int) -> None:
        """Write the passes heard since the last call; where none was heard, the mode that the model is in now."""
        rows: Rows = []
        for batch, mode, cast, state in self.heard or [(0, self._mode(), (), None)]:
            for table, fact, held in (("modes", self._modes[mode], mode), ("casts", list(cast), cast)):
                if held not in self._numbers:
                    self._numbers[held] = journal.number(table, fact)
            random = -1
            if state is not None:
                random = journal.replay["random"].total
                journal.log_replay(random=state)
            rows.append((step, batch, self._numbers[mode], self._numbers[cast], random))
        journal.log_replay(forwards=rows)
        self.heard = []

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Ear:
    """A hook that stays behind when the model is copied or pickled: a copy is not the model under watch."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Ear, (_nothing,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ear:
        return _Ear(copy.copy(_nothing))


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


def _training(module: nn.Module, found: list[bool]) -> list[bool]:
    """The mode of a module and of all within it."""
    found.append(module.training)
    for child in module._modules.values():
        if child is not None:
            _training(child, found)
    return found


def _content(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _packed(states: tuple[Tensor, Tensor | None]) -> np.ndarray:
    out = np.zeros(1, RANDOM)
    out["cpu"] = states[0].numpy()
    if states[1] is not None:
        out["cuda"] = states[1].cpu().numpy()
    return out


def _examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many examples a forward pass was given: the length of its first tensor; 0 where there is none."""
    first = next((t for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.ndim), None)
    return 0 if first is None else len(first)
