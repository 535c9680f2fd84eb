"""Curvature for small models, and the cheapest for any: one dense matrix over all parameters, or a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev

from headwater.capture import Capture, Gradients
from headwater.capture.fallback import Objective
from headwater.capture.stream import is_out_of_memory, stream
from headwater.curvature.ekfac import Statistics, accumulate
from headwater.curvature.estimate import Blockwise, Curvature, Joint, Point, Setting, check_examples, check_fisher, even_sample
from headwater.errors import InputError
from headwater.linalg import Dense as DenseOperator
from headwater.linalg import Diagonal as DiagonalOperator
from headwater.tasks.batches import Batch

MAX_PARAMETERS = 12_000  # a dense matrix of this many parameters takes 0.6 GB in float32


def refuse_large(capture: Capture) -> int:
    size = sum(block.size for block in capture.blocks.values())
    if size > MAX_PARAMETERS:
        raise InputError(
            f"dense curvature of a model with {size:,} trained parameters",
            f"at most {MAX_PARAMETERS:,} (the matrix has size^2 entries)",
            "use hw.EKFAC(), which is exact where a layer's curvature factorises",
        )
    return size


@dataclass(frozen=True)
class Dense:
    """One dense matrix over all parameters, for small models (up to 12,000): nothing between layers is dropped.

    Args:
        matrix: "gauss_newton" (positive semi-definite, the matrix that EK-FAC approximates) or "hessian" (the exact Hessian of the
            mean loss; its negative eigenvalues count as zero, since an exponential of them would grow).
        fisher, seed, examples: as in :class:`EKFAC`.

    >>> Dense("hessian").matrix
    'hessian'
    """

    matrix: str = "gauss_newton"
    fisher: str = "auto"
    seed: int = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        check_examples(self.examples)
        if self.matrix not in ("gauss_newton", "hessian"):
            raise InputError(f"matrix={self.matrix!r}", "'gauss_newton' or 'hessian'", "see hw.Dense")

    @property
    def passes(self) -> int:
        return 1

    def fit(self, sources: list[Point], setting: Setting) -> Curvature:
        refuse_large(setting.capture)
        shapes = {name: block.shape for name, block in setting.capture.blocks.items()}
        if self.matrix == "hessian":
            ids = [even_sample(len(source.examples), self.examples) for source in sources]
            sums = [hessian_sum(source, setting, which) for source, which in zip(sources, ids, strict=True)]
            mean = torch.stack(sums).sum(0) / sum(map(len, ids))
        else:
            found, count = accumulate(sources, setting, self.fisher, self.seed, self.examples, lambda g, _: self._outer(g))
            mean = found["matrix"] / count
        return Joint(DenseOperator.of(mean), shapes)

    @staticmethod
    def _outer(gradients: Gradients) -> Statistics:
        rows = torch.cat([gradient.dense().flatten(1) for gradient in gradients.values()], 1)
        return {"matrix": rows.mT @ rows}

    def tensors(self, curvature: Curvature) -> dict[str, Tensor]:
        assert isinstance(curvature, Joint)
        return {"basis": curvature.operator.basis, "spectrum": curvature.operator.spectrum}

    def rebuild(self, tensors: dict[str, Tensor], capture: Capture) -> Curvature:
        return Joint(DenseOperator(tensors["basis"], tensors["spectrum"]), {n: b.shape for n, b in capture.blocks.items()})


def hessian_sum(source: Point, setting: Setting, ids: np.ndarray) -> Tensor:
    """The Hessian of the summed loss over a source's examples ``ids``, (parameters, parameters) in the blocks' order."""
    source.load()
    capture = setting.capture
    objective = Objective(capture.model, lambda model, batch: source.task.loss(model, batch).sum())
    parameters = dict(capture.model.named_parameters(remove_duplicate=False))
    shapes = {name: parameters[name].shape for name in capture.trained}

    def values(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([block.size for block in capture.blocks.values()])
        out: dict[str, Tensor] = {}
        for part, block in zip(parts, capture.blocks.values(), strict=True):
            out.update({n: v[0] for n, v in block.unpack(part.reshape(1, *block.shape), shapes).items()})
        return {f"model.{n}": v for n, v in out.items()}

    at = torch.cat([block.pack({n: parameters[n].detach() for n in block.parameters}).flatten() for block in capture.blocks.values()])
    total = torch.zeros(len(at), len(at), dtype=at.dtype, device=at.device)

    def process(batch: Batch, _: np.ndarray) -> Tensor:
        def value(flat: Tensor) -> Tensor:
            return functional_call(objective, values(flat), (batch,), tie_weights=True)

        return _jacobian(grad(value), at)

    for part, matrix in stream(source.examples, ids, process, batch_size=setting.batch_size, device=setting.device):
        total += matrix
        setting.advance(len(part))
    return total


def _jacobian(gradient, at: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Row by row where vectorising fails (in-place operations, data-dependent control flow)."""
    try:
        return jacrev(gradient, chunk_size=256)(at).detach()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        pull = torch.func.vjp(gradient, at)[1]
        return torch.stack([pull(row)[0] for row in torch.eye(len(at), dtype=at.dtype, device=at.device)]).detach()


@dataclass(frozen=True)
class Diagonal:
    """A diagonal curvature, ``E[g^2]`` per parameter: one pass, any model, the coarsest.

    Args:
        fisher, seed, examples: as in :class:`EKFAC`.

    >>> Diagonal().fisher
    'auto'
    """

    fisher: str = "auto"
    seed: int = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        check_examples(self.examples)

    @property
    def passes(self) -> int:
        return 1

    def fit(self, sources: list[Point], setting: Setting) -> Curvature:
        sums, count = accumulate(
            sources, setting, self.fisher, self.seed, self.examples, lambda gradients, _: {name: g.squares() for name, g in gradients.items()}
        )
        return Blockwise({name: DiagonalOperator(total / count) for name, total in sums.items()})

    def tensors(self, curvature: Curvature) -> dict[str, Tensor]:
        assert isinstance(curvature, Blockwise)
        return {f"{name}/spectrum": op.spectrum for name, op in curvature.operators.items()}

    def rebuild(self, tensors: dict[str, Tensor], capture: Capture) -> Curvature:
        return Blockwise({name: DiagonalOperator(tensors[f"{name}/spectrum"]) for name in capture.blocks})
