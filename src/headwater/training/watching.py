"""A model and its optimizer under watch within one stage: what each optimizer step and each forward pass did, as it happened."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import RunError
from headwater.training.journal import FORWARDS, MOVES, RANDOM, SETTINGS, STEPS, Journal
from headwater.training.optimizers import OptimizerRecord, state_tensors
from headwater.training.places import Places

NAN = float("nan")


class Watched:
    """Counts optimizer steps and notes what each group's settings were at that moment; hears the model's forward passes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, record: OptimizerRecord, size: int, places: Places) -> None:
        self.model, self.optimizer, self.record, self.size, self.places = model, optimizer, record, size, places
        self.pending: list[list[dict[str, Any]]] = []
        self.moved = False
        self.state: dict[str, Tensor] = {}
        self.ears = Ears(model)
        self._norm: Tensor | None = None
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
        self._norm = gradient_norm(self.optimizer)
        self.pending.append([dict(group, params=None) for group in self.optimizer.param_groups])

    def _settle(self, *_: Any) -> None:
        self._versions = self._count()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.ears.release()

    def rows(self, stage: int, step: int, clip: float, batch: int) -> np.ndarray:
        """The rows of :data:`STEPS` for the step since the last call."""
        if len(self.pending) > 1:
            raise RunError(
                f"{len(self.pending)} optimizer steps since the last recorder.step()",
                "recorder.step(indices) after every optimizer.step()",
                "call it once per optimizer step, with the examples of all micro-batches",
            )
        groups = self.pending[0] if self.pending else None
        self.moved |= groups is not None
        out = np.zeros(len(self.record.groups), STEPS)
        out["stage"], out["step"], out["clip"], out["batch"], out["group"] = stage, step, clip, batch, np.arange(len(out))
        if groups is not None:
            if len(groups) != len(out):
                raise RunError(f"an optimizer with {len(groups)} groups that had {len(out)}", "the same groups during a stage", "begin a new stage: recorder.stage(...)")
            out["rate"] = [float(g["lr"]) for g in groups]
            out["momentum"] = [float(g.get("momentum", 0.0)) for g in groups]
            out["decay"] = [float(g["weight_decay"]) for g in groups]
        return out

    def log(self, journal: Journal, step: int, loss: Any) -> None:
        """Write what a replay needs to know of the step since the last call."""
        groups = self.pending.pop() if self.pending else None
        move = np.zeros(1, MOVES)
        move["step"], move["moved"], move["touched"] = step, groups is not None, self._touched
        move["loss"] = NAN if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        move["norm"] = NAN if self._norm is None else float(self._norm)
        self._norm, self._touched = None, False
        journal.log_replay(moves=move, settings=_settings(groups or [], step))
        self.ears.log(journal, step)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The norm of all gradients together, as the optimizer meets them (clipped and unscaled); None where there are none."""
    found = [p.grad.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = [g.coalesce().values() if g.is_sparse else g for g in found]
    if not flat:
        return None
    if all(g.dtype in (torch.float32, torch.float64) for g in flat):
        norms = list(torch._foreach_norm(flat))  # one call for all of them, as torch's own clipping does
    else:
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in flat]
    return torch.linalg.vector_norm(torch.stack([norm.to(flat[0].device, torch.float64) for norm in norms]))


def _settings(groups: list[dict[str, Any]], step: int) -> np.ndarray:
    out = np.zeros(len(groups), SETTINGS)
    out["step"], out["group"] = step, np.arange(len(groups))
    for row, group in zip(out, groups, strict=True):
        row["beta1"], row["beta2"] = (float(beta) for beta in group.get("betas", (0.0, 0.0)))
        row["eps"], row["dampening"] = float(group.get("eps", 0.0)), float(group.get("dampening", 0.0))
        row["nesterov"], row["amsgrad"] = bool(group.get("nesterov")), bool(group.get("amsgrad"))
    return out


class Ears:
    """Hooks on the model's forward pass: how many examples, in which mode, under autocast or not, and the generator's state where the
    pass drew random numbers. Passes without gradients (a validation) are not heard; a compiled model is not listened to at all, since
    hooks would become part of what is compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = getattr(model, "_compiled_call_impl", None) is not None
        self.heard: list[tuple[int, bytes, list[str], np.ndarray | None]] = []
        self.foreign = False
        self._states: tuple[Tensor, Tensor | None] | None = None
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
        drew = not torch.equal(before[0], after[0]) or (before[1] is not None and not torch.equal(before[1], after[1]))  # type: ignore[arg-type]
        self.heard.append((self._batch, bytes(m.training for m in self.model.modules()), self._cast(), _packed(before) if drew else None))

    def _random(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None

    def _cast(self) -> list[str]:
        """The autocast that a pass ran under: [device, dtype], or nothing."""
        on = torch.is_autocast_enabled(self._device)
        return [self._device, str(torch.get_autocast_dtype(self._device)).removeprefix("torch.")] if on else []

    def log(self, journal: Journal, step: int) -> None:
        """Write the passes heard since the last call; where none was heard, the mode that the model is in now."""
        heard = self.heard or [(0, bytes(m.training for m in self.model.modules()), [], None)]
        names = [name for name, _ in self.model.named_modules()]
        rows = np.zeros(len(heard), FORWARDS)
        states: list[np.ndarray] = []
        for row, (batch, mode, cast, state) in zip(rows, heard, strict=True):
            row["step"], row["batch"], row["random"] = step, batch, -1
            row["mode"] = journal.number("modes", [name for name, training in zip(names, mode, strict=True) if training])
            row["cast"] = journal.number("casts", cast)
            if state is not None:
                row["random"] = journal.replay["random"].total + len(states)
                states.append(state)
        journal.log_replay(forwards=rows, **({"random": np.concatenate(states)} if states else {}))
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
