"""Output functions: the one number per example whose gradients TRAK works with, and how hard training pushes on it.

Where the loss of an example is a function of one output, ``L = l(f)``, its gradient is ``l'(f) grad f``: training on the example moves
the weights along ``-l'(f) grad f``. An :class:`Output` is f together with its *push* ``-dL/df``.

- Classification: f is the log-odds of the given class, ``z_y - logsumexp of the other logits``, for which cross-entropy is
  ``log(1 + exp(-f))``. The push is ``-dL/dz_y`` with the other logits held: ``1 - p_y`` (times the class's weight), the Q of Park et al.
  2023 (arXiv 2303.14186, section 3.3). With label smoothing, too, it is ``-dL/dz_y``, and negative where p_y is above its target.
- Regression with one output: f is the prediction, the push ``2 scale (y - f)``.
- Language: f is the sum of its tokens' log-odds. The loss is a function of all of them; the push is that of moving each by the
  same amount, ``factor * mean over tokens of (1 - p)``.
- Any other task needs ``output=``: a function f of which its loss is a function (what that function's slope is, is found from the
  model's outputs), or a pair (f, push).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import InputError, TaskError
from headwater.tasks import Classification, Diffusion, Language, Measure, Regression, Task, log_odds
from headwater.tasks.batches import Batch, leaves, size, tree_map
from headwater.tasks.code import code_digest
from headwater.tasks.diffusion import Drawn
from headwater.tasks.task import per_example

Given = Measure | tuple[Measure, Measure]
_OFF_COURSE = 1e-2  # how far a loss's gradient may point away from the output's


@dataclass(frozen=True, eq=False)
class Output:
    """``value(model, batch) -> (n,)``: the output f; ``push(model, batch) -> (n,)``: ``-dL/df``, by forward passes alone."""

    value: Measure
    push: Measure

    @property
    def identity(self) -> list[str]:
        """What the two functions do, for the names of saved work."""
        return [code_digest(self.value, held=True), code_digest(self.push, held=True)]


def output_of(task: Task, given: Given | None) -> Output:
    """The output function of a task's training examples; ``given``: the user's own. Raises TaskError where none is known."""
    if isinstance(given, tuple):
        return Output(_checked(given[0], "output"), _checked(given[1], "push"))
    if given is not None:
        return Output(_checked(given, "output"), _Slope(task, given))
    if type(task).loss in (Classification.loss, Regression.loss, Language.loss):
        known = {Classification.loss: Output(_ClassOdds(task), _OfClasses(task)), Regression.loss: Output(_Prediction(task), _OfResidual(task))}
        return known.get(type(task).loss) or Output(_TokenOdds(task), _OfTokens(task))
    if isinstance(task, Diffusion):
        mend = "hw.DTrak(), whose output functions need no weight; or hw.Trak(output=task.output('loss'))"
        raise TaskError("a Diffusion without a known output function", "an output of which the loss is a function: for a whole image only the loss is", mend)
    raise TaskError(
        f"a {type(task).__name__} without a known output function",
        "the output f (one number per example) of which its loss is a function",
        "hw.Trak(output=lambda model, batch: ...); lambda model, batch: -task.loss(model, batch) is always one (and makes H the empirical Fisher matrix)",
    )


def describe(given: Given | None) -> str:
    """A given output in a method's name: what it does and not where it lies in memory."""
    if given is None:
        return "None"
    functions = given if isinstance(given, tuple) else (given,)
    return "+".join(f"{getattr(f, '__name__', type(f).__name__)}#{code_digest(f, held=True)}" for f in functions)


def check(given: Any) -> None:
    """Raise InputError unless this is a function, or a pair of functions, or None."""
    functions: Sequence[Any] = given if isinstance(given, tuple) else (given,)
    if given is not None and (not all(callable(f) for f in functions) or len(functions) > 2):
        raise InputError(f"output={given!r}", "a function (model, batch) -> (n,), or a pair of them: (output, push)", "leave it out for the task's own")


def _checked(function: Measure, what: str) -> Measure:
    return _Checked(function, what)


@dataclass(frozen=True, eq=False)
class _Checked:
    """The user's function, held to one number per example."""

    function: Measure
    what: str

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return per_example(self.function(model, batch), batch, self.what)


@dataclass(frozen=True, eq=False)
class _ClassOdds:
    """The log-odds of the given class, also where a task's measure is another."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return log_odds(*self.task._logits(model, batch))


@dataclass(frozen=True, eq=False)
class _OfClasses:
    """``-dL/dz_y`` of cross-entropy: ``(1 - s) w_y (1 - p_y) + s/K (w_y - p_y sum_c w_c)``, s the smoothing."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, labels = self.task._logits(model, batch)
        weight = torch.ones_like(logits[0]) if self.task.weight is None else self.task.weight.to(logits)
        odds, share = log_odds(logits, labels), self.task.label_smoothing / logits.shape[1]
        missing = torch.sigmoid(-odds)  # 1 - p, without the rounding of a difference
        smooth = share * (weight[labels] - weight.sum() * torch.sigmoid(odds))
        return self.task.scale * ((1 - self.task.label_smoothing) * weight[labels] * missing + smooth)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """The single output of a regression."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return _single(self.task, model, batch)[0]


@dataclass(frozen=True, eq=False)
class _OfResidual:
    """``2 scale (y - f)``."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        f, y = _single(self.task, model, batch)
        return 2 * self.task.scale * (y - f)


def _single(task: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    f, y = task._pair(model, batch)
    if f.shape[1] != 1:
        raise TaskError(
            f"a regression with {f.shape[1]} outputs",
            "one number per example whose gradient TRAK can take",
            "hw.Trak(output=lambda model, batch: -task.loss(model, batch)) takes the loss itself; hw.Influence() handles any number of outputs",
        )
    return f.squeeze(1), y.squeeze(1)


@dataclass(frozen=True, eq=False)
class _TokenOdds:
    """The sum of the counted tokens' log-odds."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        odds, counted, _ = _tokens(self.task, model, batch)
        return torch.where(counted, odds, 0.0).sum(1)


@dataclass(frozen=True, eq=False)
class _OfTokens:
    """``factor * mean over counted tokens of (1 - p)``."""

    task: Any

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        odds, counted, targets = _tokens(self.task, model, batch)
        missing = torch.where(counted, torch.sigmoid(-odds), 0.0).sum(1) / counted.sum(1).clamp_min(1)
        return self.task._factor(targets).to(missing) * missing


def _tokens(task: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds (n, positions) of the targets, which of them count, and the targets."""
    logits, targets = task._logits(model, batch)
    counted = targets != task.ignore
    return log_odds(logits, targets.masked_fill(~counted, 0)), counted, targets


@dataclass(frozen=True, eq=False)
class _Slope:
    """``-dL/df`` of a loss that is a function of the output f: from the derivatives of both by the model's outputs, which then point the
    same way. Raises TaskError where they do not: the loss is no function of this output."""

    task: Task
    output: Measure

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        taped = _Taped(model)
        with torch.enable_grad():
            losses = self.task.loss(taped, batch)
            taped.rewind()
            values = per_example(self.output(taped, batch), batch, "output")
            each = batch.each if isinstance(batch, Drawn) else 1
            loss_slope, output_slope = (taped.slopes(v, size(batch), each) for v in (losses, values))
        dot, square = (loss_slope * output_slope).sum(1), output_slope.square().sum(1)
        push = torch.where(square > 0, -dot / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        left = (loss_slope + push.unsqueeze(1) * output_slope).norm(dim=1)
        allowed = _OFF_COURSE * loss_slope.norm(dim=1) + 1e-6 * output_slope.norm(dim=1)
        if bool((left > allowed).any()):
            worst = int((left - allowed).argmax())
            raise TaskError(
                f"an output= of which the loss is no function: {float(left[worst] / loss_slope[worst].norm()):.0%} of the loss's slope points elsewhere",
                "an output f with loss = l(f), as log-odds are for cross-entropy",
                "give the push -dL/df yourself: hw.Trak(output=(f, push)); or output=lambda model, batch: -task.loss(model, batch)",
            )
        return push


class _Taped(nn.Module):
    """A model that is run once: its outputs are kept, as leaves to be differentiated by, and given again when it is called again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.of = (model,)  # not a submodule
        self.tape: list[tuple[list[Tensor], Any]] = []
        self.place = 0

    def rewind(self) -> None:
        self.place = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = list(leaves([list(args), dict(kwargs)]))
        if self.place == len(self.tape):
            with torch.no_grad():
                found = self.of[0](*args, **kwargs)
            self.tape.append((given, tree_map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, found)))
        inputs, outputs = self.tape[self.place]
        if len(inputs) != len(given) or not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(inputs, given, strict=True)):
            raise TaskError(
                "an output= that calls the model with other inputs than the loss does",
                "both computed from the same outputs of the model",
                "give the push -dL/df yourself: hw.Trak(output=(f, push))",
            )
        self.place += 1
        return outputs

    def slopes(self, values: Tensor, n: int, each: int) -> Tensor:
        """Derivatives of each example's value by the model's outputs for its ``each`` rows (noise events), (n, outputs)."""
        outputs = [t for _, held in self.tape for t in leaves(held) if t.requires_grad]
        if not values.requires_grad:
            raise TaskError("a loss or an output= that does not go through the model's outputs", "functions of what the model returns", "hw.Trak(output=(f, push))")
        found = torch.autograd.grad(values.sum(), outputs, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(t) if g is None else g for t, g in zip(outputs, found, strict=True)]
        return torch.cat([part.reshape(n, -1) for part in parts if part.ndim and part.shape[0] == n * each], 1)
