"""What a user provides: the loss of each example as it was trained, and the quantity that a question is about.

A task answers two questions about a model and a batch, each with one number per example:

- ``loss(model, batch) -> (n,)``: the loss that training minimised the mean of;
- ``measure(model, batch) -> (n,)``: larger is better for the prediction asked about.

The curvature needs a third, and a task that can answer it says so:

- ``sampled(model, batch, draws) -> (n, 1)`` and ``exact(model, batch) -> (n, outputs)``: *pseudo-losses* whose per-example
  gradients ``g`` satisfy ``E[g g^T] = Gauss-Newton matrix of the loss`` (in expectation over labels drawn from the model, or
  exactly as a sum over outputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwater.errors import TaskError
from headwater.tasks.batches import Batch, Examples, size, take
from headwater.tasks.draws import Draws

Measure = Callable[[nn.Module, Batch], Tensor]
MAX_EXACT_OUTPUTS = 32  # one backward pass per output: beyond this, sampled labels are the better bargain


def per_example(values: Tensor, batch: Batch, what: str) -> Tensor:
    """``values`` when it is one number per example, else a TaskError that says what was returned."""
    if not isinstance(values, Tensor):
        raise TaskError(f"the task's {what} returned a {type(values).__name__}", "a tensor of shape (examples,)", f"return one {what} per example")
    n = size(batch)
    if values.ndim != 1 or len(values) != n:
        raise TaskError(
            f"the task's {what} returned shape {tuple(values.shape)} for a batch of {n} examples",
            f"one number per example, shape ({n},)",
            'compute it with reduction="none" and reduce every axis but the first',
        )
    return values


class Task:
    """A task from two plain functions.

    Args:
        loss: ``(model, batch) -> (n,)``, each example's loss; training minimised the mean of these.
        measure: ``(model, batch) -> (n,)``, larger is better.
        sample: optional ``(model, batch, draws) -> batch`` that returns the batch with its labels drawn from the model's own
            predictive distribution (``draws`` is a :class:`~headwater.tasks.draws.Draws`: random numbers keyed by example).
            With it the curvature can be the Monte-Carlo Fisher. The loss must then be a negative log-likelihood.
        collate: how examples become a batch, as in a DataLoader.

    >>> import torch
    >>> task = Task(loss=lambda m, b: (m(b[0]).squeeze(-1) - b[1]) ** 2, measure=lambda m, b: m(b[0]).squeeze(-1))
    >>> task.loss(torch.nn.Linear(3, 1), (torch.ones(5, 3), torch.zeros(5))).shape
    torch.Size([5])
    """

    def __init__(
        self,
        loss: Measure,
        measure: Measure,
        sample: Callable[[nn.Module, Batch, Draws], Batch] | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self._loss, self._measure, self._sample, self.collate = loss, measure, sample, collate

    def examples(self, data: Any) -> Examples:
        """A dataset as this task sees it: its batches are what :meth:`loss` takes."""
        return Examples(data, self.collate)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each example's training loss, shape (n,)."""
        return per_example(self._loss(model, batch), batch, "loss")

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """The quantity asked about, shape (n,); larger is better."""
        return per_example(self._measure(model, batch), batch, "measure")

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Pseudo-losses (n, 1) of the Monte-Carlo Fisher: the loss under labels drawn from the model."""
        if self._sample is None:
            raise TaskError(
                "a task without sample=, and a curvature that needs labels drawn from the model",
                "a task that can draw labels",
                "give Task(sample=...), or ask for the empirical Fisher: curvature=hw.EKFAC(fisher='empirical')",
            )
        return self.loss(model, self._sample(model, batch, draws)).unsqueeze(1)

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        """Pseudo-losses (n, outputs) of the exact Gauss-Newton matrix."""
        raise TaskError(
            f"{type(self).__name__} does not know its outputs",
            "a built-in task with few outputs",
            "use curvature=hw.EKFAC(fisher='sampled') with Task(sample=...), or fisher='empirical'",
        )

    def outputs(self, model: nn.Module, batch: Batch) -> int | None:
        """How many backward passes :meth:`exact` costs; None where it is not offered."""
        return None

    def describe(self) -> dict[str, Any]:
        """The settings that fix the loss, for the run's manifest (plain JSON values)."""
        return {"kind": type(self).__name__}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.describe().items() if k != "kind")
        return f"{type(self).__name__}({settings})"


def fields_of(batch: Batch) -> Batch:
    """A dataclass as a dict of its fields; any other batch as it is."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return batch


def split(batch: Batch, labels: str) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """A batch as (positional inputs, keyword inputs, labels): the last item of a tuple, or the field called ``labels``."""
    batch = fields_of(batch)
    if isinstance(batch, Mapping):
        if labels not in batch:
            raise TaskError(f"a batch with the fields {[*map(str, batch)]}", f"a field {labels!r} that holds the labels", "name it: labels='...'")
        return (), {k: v for k, v in batch.items() if k != labels}, batch[labels]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise TaskError(
        f"a batch of type {type(batch).__name__}", "(inputs, labels), or a mapping with labels", "or write the task yourself: hw.tasks.Task(loss=, measure=)"
    )


def logits_of(output: Any) -> Tensor:
    """The tensor of predictions in a model's output (a tensor, a transformers output with .logits, or a tuple that begins with it)."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TaskError(
        f"a model that returned a {type(output).__name__}", "a tensor, or an object with .logits", "or write the task yourself: hw.tasks.Task(loss=, measure=)"
    )


def at_least_float32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def check_classes(labels: Tensor, classes: int, what: str) -> None:
    """Raise TaskError unless labels are whole numbers in 0..classes-1. Not inside vmap, where no value can be looked at: the same
    batch has been looked at outside."""
    try:
        low, high = (float(v) for v in torch.stack(torch.aminmax(labels)).tolist()) if labels.numel() else (0.0, 0.0)
        whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
    except RuntimeError:
        return
    if not whole:
        raise TaskError(
            f"{what} that are not whole numbers, between {low:g} and {high:g}",
            "the number of a class for each",
            "for soft labels (probabilities) write the task yourself: hw.tasks.Task(loss=, measure=, sample=)",
        )
    if low < 0 or high >= classes:
        raise TaskError(f"{what} from {low:g} to {high:g} and {classes} classes", f"{what} in 0..{classes - 1}", f"renumber the {what}, or widen the model's last layer")


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``log p_y / (1 - p_y)`` of the softmax, computed as ``z_y - logsumexp of the other logits``: finite and with a useful
    gradient however sure the model is (``log p - log(1 - p)`` is infinite there). logits (..., classes), labels (...)."""
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, labels.unsqueeze(-1), float("-inf"))
    return chosen - others.logsumexp(-1)


class Classification(Task):
    """Cross-entropy classification; the measure is the log-odds of the given class.

    Args:
        weight: class weights as in ``F.cross_entropy``; an example's loss is ``weight[y] * cross entropy`` (times ``scale``).
        label_smoothing: as in ``F.cross_entropy``.
        scale: a constant factor of the loss. With class weights torch's mean divides by the mean weight of a batch: give
            ``scale = 1 / (mean weight of the training set)`` to match it.
        labels: the labels' field when batches are mappings or dataclasses; in a tuple they come last.

    A model with one output per example is a binary classifier (labels 0 or 1, binary cross-entropy with logits).

    >>> import torch
    >>> task = Classification()
    >>> batch = (torch.eye(3), torch.tensor([0, 1, 2]))
    >>> task.measure(torch.nn.Identity(), batch).round(decimals=3)
    tensor([0.3070, 0.3070, 0.3070])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        scale: float = 1.0,
        labels: str = "labels",
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self.weight, self.label_smoothing, self.scale, self.labels, self.collate = weight, label_smoothing, scale, labels, collate

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) in at least float32 (a single output z becomes the pair (0, z)) and labels (n,)."""
        args, kwargs, labels = split(batch, self.labels)
        logits = at_least_float32(logits_of(model(*args, **kwargs)))
        if logits.ndim == 1:
            logits = logits.unsqueeze(1)
        if logits.ndim != 2:
            raise TaskError(
                f"a model that returned shape {tuple(logits.shape)}", "logits of shape (examples, classes)", "write the task yourself: hw.tasks.Task(loss=, measure=)"
            )
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        if labels.shape not in (logits.shape[:1], (len(logits), 1)):
            raise TaskError(
                f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}",
                f"one class number per example, shape ({len(logits)},)",
                "for soft or several labels per example write the task yourself: hw.tasks.Task(loss=, measure=, sample=)",
            )
        labels = labels.reshape(-1)
        check_classes(labels, logits.shape[1], "labels")
        return logits, labels.long()

    def _weights(self, labels: Tensor, logits: Tensor) -> Tensor:
        """What the Hessian ``diag p - p p^T`` of an example's cross-entropy is multiplied with: the weights of its classes, averaged
        over its smoothed label."""
        if self.weight is None:
            return torch.full_like(logits[:, 0], self.scale)
        weight = self.weight.to(logits)
        return self.scale * torch.lerp(weight[labels], weight.mean(), self.label_smoothing)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of each example, shape (n,)."""
        logits, labels = self._logits(model, batch)
        weight = None if self.weight is None else self.weight.to(logits)
        return self.scale * F.cross_entropy(logits, labels, weight, label_smoothing=self.label_smoothing, reduction="none")

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-odds of the given class, shape (n,)."""
        return log_odds(*self._logits(model, batch))

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Cross-entropy under classes drawn from the model, shape (n, 1)."""
        logits, labels = self._logits(model, batch)
        drawn = F.cross_entropy(logits, draws.categorical(logits), reduction="none")
        return (self._weights(labels, logits).sqrt() * drawn).unsqueeze(1)

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        """``sqrt(p_c) * (-log p_c)`` with p_c held fixed in the factor, shape (n, classes): summing the outer products of their
        gradients over c gives ``J^T (diag p - p p^T) J``, the Gauss-Newton matrix of cross-entropy."""
        logits, labels = self._logits(model, batch)
        log_p = logits.log_softmax(-1)
        return -(self._weights(labels, logits).sqrt().unsqueeze(1) * log_p.detach().exp().sqrt()) * log_p

    def outputs(self, model: nn.Module, batch: Batch) -> int:
        with torch.no_grad():
            return self._logits(model, take(batch, slice(0, 1)))[0].shape[1]

    def describe(self) -> dict[str, Any]:
        weight = None if self.weight is None else [float(w) for w in self.weight]
        return {"kind": "Classification", "weight": weight, "label_smoothing": self.label_smoothing, "scale": self.scale}


class Regression(Task):
    """Squared error; the measure is minus the error, ``-loss``.

    Args:
        scale: the loss is ``scale * (f - y)^2``: 1 for ``F.mse_loss``, 0.5 for half squared error.
        outputs: several outputs are averaged ("mean", as ``F.mse_loss`` does) or summed ("sum").
        labels: the targets' field when batches are mappings or dataclasses; in a tuple they come last.

    >>> import torch
    >>> Regression().loss(torch.nn.Identity(), (torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])))
    tensor([1., 9.])
    """

    def __init__(self, scale: float = 1.0, outputs: str = "mean", labels: str = "labels", collate: Callable[[list[Any]], Batch] | None = None) -> None:
        if outputs not in ("mean", "sum"):
            raise TaskError(f"outputs={outputs!r}", "'mean' or 'sum'", "say how your training loss reduces several outputs")
        self.scale, self.reduction, self.labels, self.collate = scale, outputs, labels, collate

    def _pair(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and targets, both (n, outputs), predictions in at least float32."""
        args, kwargs, target = split(batch, self.labels)
        f = at_least_float32(logits_of(model(*args, **kwargs)))
        if f.ndim and target.ndim:
            f, target = f.reshape(len(f), -1), target.reshape(len(target), -1).to(f.dtype)
        if f.shape != target.shape or not f.ndim:
            raise TaskError(
                f"predictions of shape {tuple(f.shape)} and targets of shape {tuple(target.shape)}",
                "equal shapes, examples first",
                "mend the model's last layer or the targets",
            )
        return f, target

    def _factor(self, outputs: int) -> float:
        return self.scale / (outputs if self.reduction == "mean" else 1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """``scale * (f - y)^2`` of each example, shape (n,)."""
        f, y = self._pair(model, batch)
        return self._factor(f.shape[1]) * (f - y).square().sum(1)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the loss, shape (n,)."""
        return -self.loss(model, batch)

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """The loss under targets drawn from the normal whose negative log-likelihood the loss is: variance 1 / (2 scale)."""
        f, _ = self._pair(model, batch)
        factor = self._factor(f.shape[1])
        drawn = f.detach() + draws.normal(f.shape[1]).to(f) * (0.5 / factor) ** 0.5
        return (factor * (f - drawn).square().sum(1)).unsqueeze(1)

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        """``sqrt(2 scale) * f_k``, shape (n, outputs): the outer products of their gradients sum to the Gauss-Newton matrix."""
        f, _ = self._pair(model, batch)
        return (2 * self._factor(f.shape[1])) ** 0.5 * f

    def outputs(self, model: nn.Module, batch: Batch) -> int:
        with torch.no_grad():
            return self._pair(model, take(batch, slice(0, 1)))[0].shape[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": "Regression", "scale": self.scale, "outputs": self.reduction}


class Language(Task):
    """Next-token likelihood; the measure is the log-likelihood of the given tokens (summed over them).

    Batches: a tensor of token ids (n, length), perhaps alone in a tuple; a mapping or dataclass with ``input_ids`` and perhaps ``attention_mask`` and ``labels`` (as in
    transformers: labels are aligned with the inputs and shifted here); or a tuple (inputs, targets) whose targets are already
    shifted. Positions whose label is ``ignore`` and, where no labels are given, positions outside the attention mask, do not count.

    Args:
        reduction: exactly how the training loop made one loss of the tokens of an example:
            "sum" (mean over examples of the sum over tokens), "mean" (mean over examples of the mean over their tokens), or
            "tokens" (mean over all tokens of a batch, as transformers does: then example n counts by its number of tokens, and
            ``mean_tokens``, the average number of counted tokens per example, fixes the unit).
        mean_tokens: see above; :func:`mean_tokens` counts it.
        ignore: the label that does not count.

    >>> import torch
    >>> class Uniform(torch.nn.Module):
    ...     def forward(self, input_ids):
    ...         return torch.zeros(*input_ids.shape, 4)
    >>> Language(reduction="mean").loss(Uniform(), torch.tensor([[0, 1, 2]])).round(decimals=4)
    tensor([1.3863])
    """

    def __init__(
        self,
        reduction: str = "mean",
        mean_tokens: float | None = None,
        ignore: int = -100,
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        if reduction not in ("sum", "mean", "tokens"):
            raise TaskError(f"reduction={reduction!r}", "'sum', 'mean' or 'tokens'", "say how your training loop reduces the tokens of an example")
        if (reduction == "tokens") != (mean_tokens is not None):
            raise TaskError(
                f"reduction={reduction!r} with mean_tokens={mean_tokens!r}",
                "mean_tokens exactly when the training loss is a mean over all tokens of a batch",
                "Language(reduction='tokens', mean_tokens=hw.tasks.mean_tokens(train)); with tokens all counted it is length - 1",
            )
        self.reduction, self.mean_tokens, self.ignore, self.collate = reduction, mean_tokens, ignore, collate

    def targets(self, batch: Batch) -> Tensor:
        """The labels (n, positions) that the logits' positions are judged by, with ``ignore`` where a position does not count."""
        batch = self._unpacked(batch)
        if isinstance(batch, Tensor):
            return batch[:, 1:]
        if isinstance(batch, tuple | list):
            return batch[-1]
        if batch.get("labels") is not None:
            return batch["labels"][:, 1:]
        labels = batch["input_ids"][:, 1:]
        mask = batch.get("attention_mask")
        return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, self.ignore)

    @staticmethod
    def _unpacked(batch: Batch) -> Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]:
        """Token ids, (inputs ..., targets), or a mapping with token ids; anything else is a TaskError."""
        batch = fields_of(batch)
        if isinstance(batch, tuple | list) and len(batch) == 1:  # as a TensorDataset of token ids gives
            batch = batch[0]
        known = isinstance(batch, Tensor) or (isinstance(batch, tuple | list) and len(batch) > 1)
        if not known and not (isinstance(batch, Mapping) and ("input_ids" in batch or batch.get("labels") is not None)):
            held = f" with the fields {[*map(str, batch)]}" if isinstance(batch, Mapping) else ""
            raise TaskError(
                f"a batch of type {type(batch).__name__}{held}",
                "token ids, a mapping with input_ids, or (inputs, shifted targets)",
                "give the task a collate= that makes such a batch, or write it yourself: hw.tasks.Task(loss=, measure=)",
            )
        return batch

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, positions, vocabulary) in at least float32, and the targets they are judged by."""
        batch = self._unpacked(batch)
        if isinstance(batch, Tensor):
            logits = logits_of(model(batch))[:, :-1]
        elif isinstance(batch, tuple | list):
            logits = logits_of(model(*batch[:-1]))
        else:
            logits = logits_of(model(**{k: v for k, v in batch.items() if k != "labels"}))[:, :-1]
        targets = self.targets(batch)
        if logits.ndim != 3 or logits.shape[:2] != targets.shape:
            raise TaskError(
                f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}", "(examples, positions, vocabulary)", "check the batch's layout"
            )
        check_classes(targets.masked_fill(targets == self.ignore, 0), logits.shape[-1], "tokens")
        return at_least_float32(logits), targets

    def _summed(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=self.ignore, reduction="none")
        return losses.sum(1)

    def _factor(self, targets: Tensor) -> Tensor:
        """What an example's summed loss is multiplied with, shape (n,)."""
        counted = (targets != self.ignore).sum(1)
        if self.reduction == "mean":
            return 1.0 / counted.clamp_min(1)
        return torch.full_like(counted, 1.0 / (self.mean_tokens or 1.0), dtype=torch.get_default_dtype())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each example's loss as the training loop counts it, shape (n,)."""
        logits, targets = self._logits(model, batch)
        return self._factor(targets).to(logits) * self._summed(logits, targets)

    def token_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """What each position contributes to its example's loss, shape (n, positions): their sum is :meth:`loss`."""
        logits, targets = self._logits(model, batch)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=self.ignore, reduction="none")
        return self._factor(targets).to(logits).unsqueeze(1) * losses

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-likelihood of the given tokens, shape (n,)."""
        return -self._summed(*self._logits(model, batch))

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Loss under tokens drawn from the model. The Gauss-Newton matrix of ``c * summed loss`` is c times the Fisher of the summed
        loss, hence the square root: taking the Fisher of the mean loss itself would be too small by the number of tokens."""
        logits, targets = self._logits(model, batch)
        drawn = draws.categorical(logits).masked_fill(targets == self.ignore, self.ignore)
        return (self._factor(targets).to(logits).sqrt() * self._summed(logits, drawn)).unsqueeze(1)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Language", "reduction": self.reduction, "mean_tokens": self.mean_tokens, "ignore": self.ignore}


def mean_tokens(data: Any, task: Language | None = None) -> float:
    """The average number of counted tokens per example of a dataset, for ``Language(reduction="tokens", mean_tokens=...)``.

    >>> import torch
    >>> mean_tokens(torch.zeros(3, 5, dtype=torch.long))
    4.0
    """
    task = task or Language()
    examples = task.examples(data)
    counts = [(task.targets(examples.batch(range(i, i + 1))) != task.ignore).sum().item() for i in range(len(examples))]
    return float(sum(counts) / len(counts))
