"""Optimizers as facts: which parameters each group moves, and how. Read from torch's own optimizers; others are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import InputError, UnknownOptimizer

ADAM, SGD = "adam", "sgd"
KINDS = {torch.optim.SGD: SGD, torch.optim.Adam: ADAM, torch.optim.AdamW: ADAM}
MOMENT = "moment/"
"""Prefix of second moments in a checkpoint's file."""


@dataclass(frozen=True)
class Group:
    """One parameter group. ``names``: of its parameters in the model. ``decoupled``: the decay is AdamW's, not part of the gradient.

    ``beta1`` and ``amsgrad`` are None in runs recorded before they were noted (and for SGD): enough for scores, not for a replay.
    """

    names: tuple[str, ...]
    weight_decay: float = 0.0
    decoupled: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta2: float = 0.0
    eps: float = 0.0
    beta1: float | None = None
    amsgrad: bool | None = None


@dataclass(frozen=True)
class OptimizerRecord:
    """``kind``: "sgd" (with momentum, Nesterov, weight decay) or "adam" (Adam and AdamW: a diagonal preconditioner)."""

    kind: str
    groups: tuple[Group, ...]

    @property
    def names(self) -> frozenset[str]:
        """The parameters that this optimizer moves."""
        return frozenset(name for group in self.groups for name in group.names)

    def group_of(self, name: str) -> Group:
        """The group that moves the parameter ``name``."""
        return next(group for group in self.groups if name in group.names)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> OptimizerRecord:
        return cls(facts["kind"], tuple(Group(**{**group, "names": tuple(group["names"])}) for group in facts["groups"]))


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside a wrapper (accelerate's, say), which keeps it in ``.optimizer``."""
    while type(optimizer) not in KINDS and hasattr(optimizer, "optimizer"):  # accelerate's is an Optimizer itself
        optimizer = optimizer.optimizer
    if type(optimizer) not in KINDS:
        raise UnknownOptimizer(
            f"the optimizer {type(optimizer).__module__}.{type(optimizer).__qualname__}",
            f"one whose dynamics are known: {', '.join(sorted(k.__name__ for k in KINDS))} of torch.optim",
            "train with one of those; or score with methods that need no record of the optimizer (hw.GradDot, hw.Influence(damping=...)) on a "
            "run made by hw.Run.from_checkpoints with the nearest of them",
        )
    return optimizer


def describe(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerRecord:
    """The facts of an optimizer of ``model``. Raises UnknownOptimizer, InputError."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        names[id(parameter)] = name
    groups = []
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise UnknownOptimizer("an optimizer with maximize=True", "one that minimises the loss", "negate the loss instead")
        groups.append(_group(group, tuple(_names(group["params"], names)), type(optimizer)))
    if not any(group.names for group in groups):
        raise InputError("an optimizer without trained parameters", "at least one parameter with requires_grad", "unfreeze what is trained")
    return OptimizerRecord(KINDS[type(optimizer)], tuple(groups))


def _names(parameters: Iterable[Tensor], names: dict[int, str]) -> Iterator[str]:
    for parameter in parameters:
        if id(parameter) not in names:
            raise InputError(
                f"an optimizer that holds a parameter of shape {tuple(parameter.shape)} which the model does not have",
                "an optimizer made from this model's parameters",
                "pass the model that is trained (not a copy, and after it was moved to its device), or the optimizer made from it",
            )
        if parameter.requires_grad:
            yield names[id(parameter)]


def _group(group: dict[str, Any], names: tuple[str, ...], kind: type) -> Group:
    decay = float(group["weight_decay"])
    if KINDS[kind] == SGD:
        return Group(names, decay, False, float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))
    decoupled = kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return Group(names, decay, decoupled, beta2=beta2, eps=float(group["eps"]), beta1=beta1, amsgrad=bool(group.get("amsgrad")))


def second_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Adam's bias-corrected second moments by parameter name; of AMSGrad the maxima, which is what divides the step. None for SGD."""
    found: dict[str, Tensor] = {}
    if KINDS[type(optimizer)] != ADAM:
        return found
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                raw = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
                found[names[id(parameter)]] = raw.detach() / (1 - float(group["betas"][1]) ** float(state["step"]))
    return found


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer remembers, as ``KEY/PARAMETER``: ``momentum_buffer/...`` of SGD; ``exp_avg/...``, ``exp_avg_sq/...``,
    ``max_exp_avg_sq/...`` and ``step/...`` of Adam. Empty for one that took no step yet."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is not None and parameter.requires_grad:
                    found[f"{key}/{names[id(parameter)]}"] = torch.as_tensor(value).detach()
    return found
