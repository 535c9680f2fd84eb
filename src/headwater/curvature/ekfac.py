"""EK-FAC: a Kronecker-factored eigenbasis with exactly corrected eigenvalues (George et al. 2018, arXiv 1806.03884).

For a matrix block with activations a and output gradients d of each example: eigenvectors ``Q_A`` of ``A = E[a a^T]`` and ``Q_S`` of
``S = E[d d^T]``, then ``Lambda[o, i] = E_n[(Q_S^T G_n Q_A)[o, i]^2]`` with G_n the example's gradient. Over several sources (the
checkpoints of a SOURCE segment) the covariances are pooled, one basis is taken, and Lambda is averaged in it (Bae et al. 2024).

Only eigenvectors are taken from A and S, so their scale does not matter; Lambda is a mean over **examples**.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.capture import Block, BlockGradient, Capture, Gradients
from headwater.capture.stream import stream
from headwater.curvature.estimate import Blockwise, Curvature, Point, Setting, check_examples, check_fisher, even_sample, pseudo_gradients, resolve_fisher
from headwater.errors import NotFinite
from headwater.linalg import Dense as DenseOperator
from headwater.linalg import Diagonal as DiagonalOperator
from headwater.linalg import Kronecker, Operator, eigh
from headwater.tasks.batches import Batch, to

Statistics = dict[str, Tensor]
MAX_DENSE = 512  # a block outside the Kronecker layers is dense up to this many parameters, diagonal beyond
MAX_SIDE = 12_000  # a longer side of a matrix keeps its own axes as basis (a vocabulary): any orthonormal basis is admissible


def accumulate(
    sources: list[Point], setting: Setting, fisher: str, seed: int, examples: int | None, collect: Callable[[Gradients, bool], Statistics]
) -> tuple[Statistics, int]:
    """Sum ``collect(gradients, is the first column)`` over sources, examples and columns; and the number of examples that entered."""
    total: Statistics = {}
    count = 0
    for source in sources:
        source.load()
        first = source.examples.batch(range(min(1, len(source.examples))))
        kind = resolve_fisher(fisher, source.task, setting.capture.model, to(first, setting.device))

        def process(batch: Batch, ids: np.ndarray, source: Point = source, kind: str = kind) -> Statistics:
            found: Statistics = {}
            for column, gradients in enumerate(pseudo_gradients(setting, source, kind, seed, batch, ids)):
                add(found, collect(gradients, column == 0))
            return found

        for ids, statistics in stream(
            source.examples, even_sample(len(source.examples), examples), process, batch_size=setting.batch_size, device=setting.device
        ):
            add(total, statistics)
            count += len(ids)
            setting.advance(len(ids))
    for key, value in total.items():
        if not torch.isfinite(value).all():
            name = key.removesuffix("/left").removesuffix("/right")
            raise NotFinite(f"the curvature of {name!r} has NaN or infinite entries", "finite gradients", "look for a diverged checkpoint or a loss that overflows")
    return total, count


def add(total: Statistics, more: Statistics) -> None:
    """``total += more``, entry by entry."""
    for key, value in more.items():
        if key in total:
            total[key] += value
        else:
            total[key] = value


def rotates(block: Block) -> tuple[bool, bool]:
    """Which sides of a matrix block get an eigenbasis: not the entries of an embedding, not a side too long to decompose."""
    _, out, inner = block.shape
    return out <= MAX_SIDE and not block.indexed, inner <= MAX_SIDE


def products(gradient: BlockGradient, block: Block) -> Tensor:
    """What is summed of a block outside the matrices: products of its gradients, or their squares where it is large."""
    if block.size > MAX_DENSE:
        return gradient.squares()
    rows = gradient.dense().flatten(1)
    return rows.mT @ rows


def outside(basis: Tensor | None, spectrum: Tensor) -> Operator:
    """The operator of a block outside the matrices: dense, or diagonal where it has no basis."""
    return DiagonalOperator(spectrum) if basis is None else DenseOperator(basis, spectrum)


def named_parts(curvature: Curvature) -> dict[str, Tensor]:
    """The tensors of each block's operator under the block's name, for the store."""
    assert isinstance(curvature, Blockwise)
    return {f"{name}/{part}": t for name, op in curvature.operators.items() for part, t in vars(op).items() if t is not None}


@dataclass(frozen=True)
class EKFAC:
    """Curvature by EK-FAC for matrix blocks; parameters outside them get a dense block (up to 512) or a diagonal one, never nothing.

    Args:
        fisher: where the gradients of the Gauss-Newton estimate come from:
            "exact": one backward pass per model output, no noise (tasks that know their outputs, up to 32 of them);
            "sampled": one label drawn from the model per example, keyed by (seed, example), so that the result depends neither on
            batch size nor on order;
            "empirical": the true labels. Not the Gauss-Newton matrix: it vanishes with the residuals, and SOURCE's scale with it;
            "auto": exact where possible, else sampled.
        seed: of the sampled labels.
        examples: use only so many evenly spaced examples (default: all).

    Exact for one linear layer under squared loss. Source: George et al. 2018; Grosse et al. 2023 (arXiv 2308.03296).

    >>> EKFAC(fisher="sampled", seed=1)
    EKFAC(fisher='sampled', seed=1, examples=None)
    """

    fisher: str = "auto"
    seed: int = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        check_examples(self.examples)

    @property
    def passes(self) -> int:
        return 2

    def fit(self, sources: list[Point], setting: Setting) -> Curvature:
        bases = self._bases(sources, setting)
        spectra, count = accumulate(sources, setting, self.fisher, self.seed, self.examples, lambda g, _: self._spectra(g, bases, setting.capture))
        operators: dict[str, Operator] = {}
        for name, block in setting.capture.blocks.items():
            mean = spectra[name] / count
            if block.matrix:
                operators[name] = Kronecker(bases.get(name + "/left"), bases.get(name + "/right"), mean)
            else:
                operators[name] = DenseOperator.of(mean) if mean.shape != block.shape else DiagonalOperator(mean)
        return Blockwise(operators)

    def _bases(self, sources: list[Point], setting: Setting) -> dict[str, Tensor]:
        covariances, _ = accumulate(sources, setting, self.fisher, self.seed, self.examples, lambda g, first: self._covariances(g, first, setting.capture))
        return {key: eigh(matrix)[1] for key, matrix in covariances.items()}

    @staticmethod
    def _covariances(gradients: Gradients, first: bool, capture: Capture) -> Statistics:
        found: Statistics = {}
        for name, block in capture.blocks.items():
            if not block.matrix:
                continue
            want_left, want_right = rotates(block)
            for piece in gradients[name].pieces:
                # the layer's input is the same for every column of the function: count it once
                left, right = piece.covariances(want_left and (first or block.given != "left"), want_right and (first or block.given != "right"))
                add(found, {f"{name}/{side}": m for side, m in (("left", left), ("right", right)) if m is not None})
        return found

    @staticmethod
    def _spectra(gradients: Gradients, bases: dict[str, Tensor], capture: Capture) -> Statistics:
        found: Statistics = {}
        for name, block in capture.blocks.items():
            gradient = gradients[name]
            if block.matrix:
                found[name] = gradient.squares(bases.get(name + "/left"), bases.get(name + "/right"))
            else:
                found[name] = products(gradient, block)
        return found

    def tensors(self, curvature: Curvature) -> dict[str, Tensor]:
        """The factors as named tensors, for the store."""
        return named_parts(curvature)

    def rebuild(self, tensors: dict[str, Tensor], capture: Capture) -> Curvature:
        """The curvature from :meth:`tensors`."""
        operators: dict[str, Operator] = {}
        for name, block in capture.blocks.items():
            spectrum = tensors[f"{name}/spectrum"]
            if block.matrix:
                operators[name] = Kronecker(tensors.get(f"{name}/left"), tensors.get(f"{name}/right"), spectrum)
            else:
                operators[name] = outside(tensors.get(f"{name}/basis"), spectrum)
        return Blockwise(operators)
