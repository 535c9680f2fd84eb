"""Products with the Gauss-Newton matrix itself: no factorisation, nothing between layers dropped, at the price of passes over the data.

With pseudo-losses r (see :mod:`headwater.tasks.task`) whose per-example gradients' outer products sum to the Gauss-Newton matrix,
``G v = J_r^T (J_r v)``: a forward-mode pass along v and a backward pass, however many outputs there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.capture.fallback import Objective
from headwater.capture.stream import is_out_of_memory, stream
from headwater.curvature.estimate import Point, Setting, even_sample
from headwater.errors import GradientError
from headwater.tasks import Draws
from headwater.tasks.batches import Batch

Values = dict[str, Tensor]
Pseudo = Callable[[Values], Tensor]
"""Parameters to pseudo-losses (examples, columns)."""


@dataclass(frozen=True)
class GaussNewton:
    """The Gauss-Newton matrix of the mean loss over ``points``, by its products with vectors (vectors, parameters) in the blocks' order.

    Args:
        fisher, seed: as in :class:`headwater.EKFAC`; "auto" is exact for every task that knows its outputs, however many: they do not
            cost a pass each here. For other tasks labels are drawn from the model, always the same ones.
        examples: of each point use only so many evenly spaced examples.
    """

    points: tuple[Point, ...]
    setting: Setting
    fisher: str = "auto"
    seed: int = 0
    examples: int | None = None

    @property
    def count(self) -> int:
        """Examples that one product passes through the model."""
        return sum(len(even_sample(len(point.examples), self.examples)) for point in self.points)

    def __call__(self, v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for point in self.points:
            point.load()
            total += self._summed(point, v)
        return total / self.count

    def _summed(self, point: Point, v: Tensor) -> Tensor:
        capture = self.setting.capture
        parameters = dict(capture.model.named_parameters(remove_duplicate=False))
        shapes = {name: parameters[name].shape for name in capture.trained}
        values = {f"model.{name}": parameters[name].detach() for name in capture.trained}
        unpacked = self._unpacked(v, shapes)
        tangents = {f"model.{name}": unpacked[name] for name in capture.trained}  # in the order of values, which jvp insists on
        total = torch.zeros_like(v)

        def process(batch: Batch, ids: np.ndarray) -> Tensor:
            found = products(self._pseudo(point, batch, ids), values, tangents)
            return self._packed({name.removeprefix("model."): t for name, t in found.items()})

        # the vectors' layers are in memory all at once
        size = max(1, self.setting.batch_size // max(1, len(v) // 8))
        for ids, part in stream(point.examples, even_sample(len(point.examples), self.examples), process, batch_size=size, device=self.setting.device):
            total += part
            self.setting.advance(len(ids) * len(v))
        return total

    def _pseudo(self, point: Point, batch: Batch, ids: np.ndarray) -> Pseudo:
        task, model = point.task, self.setting.capture.model
        kind = self.fisher
        if kind == "auto":
            kind = "sampled" if task.outputs(model, batch) is None else "exact"

        def function(model: torch.nn.Module, batch: Batch) -> Tensor:
            if kind == "exact":
                return task.exact(model, batch)
            if kind == "empirical":
                return task.loss(model, batch).unsqueeze(1)
            return task.sampled(model, batch, Draws(self.seed, ids, self.setting.device))

        objective = Objective(model, function)
        return lambda values: functional_call(objective, values, (batch,), tie_weights=True)

    def _unpacked(self, v: Tensor, shapes: dict[str, torch.Size]) -> Values:
        blocks = self.setting.capture.blocks.values()
        out: Values = {}
        for part, block in zip(v.split([block.size for block in blocks], 1), blocks, strict=True):
            out.update(block.unpack(part.reshape(len(part), *block.shape), shapes))
        return out

    def _packed(self, found: Values) -> Tensor:
        return torch.cat([block.pack({n: found[n] for n in block.parameters}, lead=1).flatten(1) for block in self.setting.capture.blocks.values()], 1)


def products(function: Pseudo, values: Values, tangents: Values) -> Values:
    """``J^T J t`` for each of the tangents {name: (vectors, *shape)}: vectorised, and one by one where the model cannot be."""
    with plain_attention():
        return _products(function, values, tangents)


def _products(function: Pseudo, values: Values, tangents: Values) -> Values:
    try:
        return vectorised(function, values, tangents)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = error
    try:
        return one_by_one(function, values, tangents)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise GradientError(
            f"a model that can be differentiated neither forwards ({type(problem).__name__}: {problem}) nor twice ({error})",
            "operations with forward-mode derivatives, or with second ones",
            "use plain attention instead of a fused kernel (attn_implementation='eager'), or leave refine= out",
        ) from error


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by plain products inside: fused kernels have neither forward-mode nor second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def vectorised(function: Pseudo, values: Values, tangents: Values) -> Values:
    """All at once: forward-mode derivatives, then the backward pass."""
    with torch.no_grad():  # parameters that were not trained may require gradients: none are recorded
        along = vmap(lambda t: jvp(function, (values,), (t,))[1])(tangents)
        pull = vjp(function, values)[1]
        return vmap(lambda c: pull(c)[0])(along)


def one_by_one(function: Pseudo, values: Values, tangents: Values) -> Values:
    """The same for any model whose gradients can be differentiated: ``J t`` is the derivative of ``<J^T c, t>`` with respect to c."""
    names, leaves = list(values), [t.detach().requires_grad_() for t in values.values()]
    with torch.enable_grad():
        out = function(dict(zip(names, leaves, strict=True)))
        c = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, leaves, c, create_graph=True, allow_unused=True)
        rows = []
        for k in range(len(tangents[names[0]])):
            seen = sum((g * tangents[n][k]).sum() for n, g in zip(names, pulled, strict=True) if g is not None)
            (along,) = torch.autograd.grad(seen, c, retain_graph=True)  # type: ignore[arg-type]
            back = torch.autograd.grad(out, leaves, along, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(t) if g is None else g for g, t in zip(back, leaves, strict=True)])
    return {name: torch.stack([row[i] for row in rows]).detach() for i, name in enumerate(names)}
