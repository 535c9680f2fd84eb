"""Symmetric matrices known by what they do: their spectrum, and any function of it applied to vectors. Knows torch only.

An operator acts on vectors of one block's shape, batched along the first axis: ``(queries, *shape) -> (queries, *shape)``.
``operator.map(f)`` is ``f(H)``: the same eigenvectors, ``f`` applied to each eigenvalue. What an optimizer does with curvature
is :meth:`Operator.flow`: the curvature seen through a diagonal preconditioner and a weight decay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.errors import NotFinite

Response = Callable[[Tensor], Tensor]
Apply = Callable[[Tensor], Tensor]


class Operator(ABC):
    """A symmetric positive semi-definite matrix on one block. Law: ``op.map(f)(v) == V f(S) V^T v`` for ``op = V S V^T``.

    ``spectrum`` may have any shape; eigenvalues that came out negative count as zero (an exponential of them would grow).
    """

    spectrum: Tensor

    @abstractmethod
    def rotate(self, v: Tensor) -> Tensor:
        """Coordinates of ``v (queries, *shape)`` in the eigenbasis, ``(queries, *spectrum.shape)``."""

    @abstractmethod
    def restore(self, v: Tensor) -> Tensor:
        """Back from the eigenbasis: the transpose of :meth:`rotate`."""

    @abstractmethod
    def precision_in_basis(self, precision: Tensor) -> Tensor:
        """The diagonal of ``V^T diag(precision) V``, shaped as the spectrum."""

    def with_spectrum(self, spectrum: Tensor) -> Operator:
        return replace(self, spectrum=spectrum)  # type: ignore[type-var]

    def map(self, f: Response) -> Operator:
        """``f(H)``: the same eigenvectors with ``f`` applied to the eigenvalues."""
        return self.with_spectrum(f(self.spectrum.clamp_min(0)))

    def __call__(self, v: Tensor) -> Tensor:
        return self.restore(self.rotate(v) * self.spectrum.to(v.dtype))

    __matmul__ = __call__

    def flow(self, gain: Tensor | float = 1.0, decay: float = 0.0, decoupled: float = 0.0) -> Flow:
        """The matrix that training contracts by: ``P^1/2 (H + decay) P^1/2 + decoupled`` with ``P = diag(gain)``.

        A gain that is not constant over the block is brought into the eigenbasis as the harmonic projection
        ``1 / diag(V^T P^-1 V)`` (exact when it commutes with H; the approximation for Adam, see :class:`headwater.Source`).
        """
        if isinstance(gain, Tensor):
            p, floor = self._harmonic(gain), None
        else:
            p, floor = torch.full_like(self.spectrum, gain), gain * decay + decoupled
        return Flow(self.with_spectrum(p * (self.spectrum.clamp_min(0) + decay) + decoupled), p, floor)

    def _harmonic(self, gain: Tensor) -> Tensor:
        """``1 / diag(V^T diag(gain)^-1 V)``; a parameter that does not move (gain 0) holds every direction it has a part in."""
        limits = torch.finfo(self.spectrum.dtype)
        found = 1.0 / self.precision_in_basis((1.0 / gain.to(self.spectrum)).clamp_max(limits.max))
        return torch.where(found < limits.tiny, 0.0, found)

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """The matrix itself, (size, size); for tests and small blocks."""
        eye = torch.eye(torch.Size(shape).numel(), dtype=self.spectrum.dtype).reshape(-1, *shape)
        return self(eye).reshape(len(eye), -1)


@dataclass(frozen=True)
class Flow:
    """Curvature as one optimizer experiences it in one segment: spectral functions of ``matrix``, with the preconditioner's
    ``gain`` in the same basis. ``respond(phi) = gain * phi(matrix)``; ``carry(psi) = psi(matrix)``, acting on the query."""

    matrix: Operator
    gain: Tensor
    floor: float | None = None
    """The matrix's eigenvalue where H's is zero, when it is the same everywhere."""

    def respond(self, phi: Response) -> Apply:
        return self.matrix.with_spectrum(self.gain * phi(self.matrix.spectrum.clamp_min(0)))

    def on_factors(self, phi: Response, tolerance: float) -> Split | Grid | None:
        """:meth:`respond` for outer products known by their factors: a :class:`Split` where few eigenpairs matter, else a
        :class:`Grid`; None where the eigenvectors are no outer products."""
        found = self.split(phi, tolerance)
        if found is None and isinstance(self.matrix, Kronecker) and len(self.matrix.spectrum) == 1:
            return Grid.of(self.matrix, self.gain * phi(self.matrix.spectrum.clamp_min(0)))
        return found

    def split(self, phi: Response, tolerance: float) -> Split | None:
        """The response as a constant plus few eigenpairs (see :class:`Split`); None where that would save nothing."""
        if self.floor is None:
            return None
        floor = self.matrix.spectrum.new_tensor([self.floor])
        constant = float(self.gain.flatten()[0] * phi(floor))
        if isinstance(self.matrix, Diagonal) and self.matrix.spectrum.ndim == 0:  # no curvature at all
            return Split(constant, None, torch.zeros(2, 0, dtype=torch.long), floor[:0])
        if not isinstance(self.matrix, Kronecker):
            return None
        return Split.of(self.matrix, self.gain * phi(self.matrix.spectrum), constant, self.floor, tolerance)

    def carry(self, psi: Response) -> Apply:
        return self.matrix.map(psi)


@dataclass(frozen=True)
class ScaledFlow:
    """As :class:`Flow`, exactly, for a matrix ``M = P^1/2 (H + decay) P^1/2 + decoupled`` in its own basis; ``root = P^1/2``.

    A query is carried by ``psi(H P + decoupled) = P^-1/2 psi(M) P^1/2``. Parameters that do not move (root 0) have no such row:
    theirs is ``psi(d)`` for themselves, d their decoupled decay, and for the others, on which they act through ``coupling = H P^1/2``,
    the divided difference ``(psi(M) - psi(d)) / (M - d)``.
    """

    matrix: Dense
    root: Tensor
    coupling: Tensor | None = None
    """Rows of the held parameters, (held, size); None where all move."""
    idle: Tensor | None = None
    """The decoupled decay of the held parameters, (held,)."""

    def respond(self, phi: Response) -> Apply:
        inner = self.matrix.map(phi)
        return lambda v: (inner(v.flatten(1) * self.root) * self.root).reshape(v.shape)

    def carry(self, psi: Response) -> Apply:
        inner = self.matrix.map(psi)
        held = self.root == 0
        divisor = torch.where(held, 1.0, self.root)
        across, own = self._held(psi)

        def apply(v: Tensor) -> Tensor:
            moved = v.flatten(1) * self.root
            out = inner(moved) / divisor
            if across is not None and own is not None:
                out[:, held] = own.to(v.dtype) * v.flatten(1)[:, held] + self.matrix.rotate(moved) @ across.to(v.dtype).mT
            return out.reshape(v.shape)

        return apply

    def _held(self, psi: Response) -> tuple[Tensor | None, Tensor | None]:
        """What the held parameters' queries get: from the others, in the basis, (held, size), and from themselves, (held,)."""
        if self.coupling is None or self.idle is None:
            return None, None
        spectrum, idle = self.matrix.spectrum.double().clamp_min(0), self.idle.double().unsqueeze(1)
        step = 1e-6 * (spectrum.max() + idle.max()).clamp_min(1e-30)  # where the two meet, the slope
        far = (spectrum - idle).abs() > step
        ratio = torch.where(far, psi(spectrum) - psi(idle), psi(idle + step) - psi(idle)) / torch.where(far, spectrum - idle, step)
        return (self.coupling.double() @ self.matrix.basis.double()) * ratio, psi(idle).squeeze(1)


def _turn(v: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left^T v right`` over the last two axes; None stands for the identity."""
    v = v if left is None else left.to(v.dtype).mT @ v
    return v if right is None else v @ right.to(v.dtype)


@dataclass(frozen=True)
class Kronecker(Operator):
    """Eigenvectors ``left ⊗ right`` on matrices (groups, out, in), eigenvalues ``spectrum`` (groups, out, in) of any size.

    ``left`` (groups, out, out) and ``right`` (groups, in, in) hold eigenvectors in columns; None is the identity.
    With row-major flattening the matrix is ``(left ⊗ right) diag(spectrum) (left ⊗ right)^T``.
    """

    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor

    def rotate(self, v: Tensor) -> Tensor:
        return _turn(v, self.left, self.right)

    def restore(self, v: Tensor) -> Tensor:
        return _turn(v, None if self.left is None else self.left.mT, None if self.right is None else self.right.mT)

    def precision_in_basis(self, precision: Tensor) -> Tensor:
        squares = [None if side is None else side.square() for side in (self.left, self.right)]
        return _turn(precision.to(self.spectrum), *squares)


Turned = tuple[Tensor, Tensor]
"""Outer products ``out_n inner_n^T`` by their factors in an eigenbasis, one column each: (out, n) and (in, n)."""


def room(t: Tensor) -> int:
    """How many numbers to work on at once: on a CPU so few that they stay in its cache, and that the allocator keeps their memory."""
    return 2**21 if t.device.type == "cpu" else 2**26


@dataclass(frozen=True)
class Grid:
    """A response on outer products: ``<phi(H) u v^T, g a^T> = sum_oi values_oi (u_o g_o) (v_i a_i)`` in the eigenbasis.

    As many multiplications as between vectors formed whole, but neither side is ever held whole: a few rows of ``values`` at a time.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, matrix: Kronecker, values: Tensor) -> Grid:
        """From the response ``values`` (1, out, in) on the eigenvalues of a matrix of one group."""
        left, right = (None if side is None else side[0] for side in (matrix.left, matrix.right))
        return cls(left, right, values[0])

    def turn(self, out: Tensor, inner: Tensor) -> Turned:
        """Factors (n, out) and (n, in) in the eigenbasis, one column for each of the n."""
        found = (t.mT.contiguous() if side is None else side.to(t.dtype).mT @ t.mT for t, side in ((out, self.left), (inner, self.right)))
        return next(found), next(found)

    def dots(self, u: Turned, g: Turned) -> Tensor:
        """Inner products (queries, n) of every ``u`` seen through the response with every ``g``."""
        total, values = u[0].new_zeros(u[0].shape[1], g[0].shape[1]), self.values.to(u[0].dtype)
        step = max(1, room(total) // (values.shape[1] * max(1, *total.shape)))
        for i in range(0, len(values), step):
            rows = slice(i, i + step)
            seen = (values[rows].unsqueeze(2) * u[1]).mul_(u[0][rows].unsqueeze(1))
            total.addmm_(seen.flatten(0, 1).mT, (g[0][rows].unsqueeze(1) * g[1]).flatten(0, 1))
        return total

    def paired(self, u: Turned, g: Turned) -> Tensor:
        """Inner products (n,) of ``u_n`` seen through the response with ``g_n``."""
        return ((self.values.to(u[0].dtype).mT @ (u[0] * g[0])) * (u[1] * g[1])).sum(0)

    def whole(self, u: Turned) -> Tensor:
        """The outer products seen through the response, (n, 1, out, in)."""
        seen = torch.einsum("oi,on,in->noi", self.values.to(u[0].dtype), *u)
        return _turn(seen, *(None if side is None else side.mT for side in (self.left, self.right))).unsqueeze(1)

    def square_norms(self, u: Turned) -> Tensor:
        """Squared lengths (n,) of :meth:`whole`, which is not formed."""
        return ((self.values.to(u[0].dtype).square().mT @ u[0].square()) * u[1].square()).sum(0)


@dataclass(frozen=True)
class Split:
    """A response as a constant plus what exceeds it on the few eigenpairs that matter: ``phi(H) ~ constant + V_k diag(excess) V_k^T``.

    Most eigenvalues of a trained network's curvature are so small that a response takes its value at zero there, and a constant
    times the identity costs an inner product of factors instead of a rotation. ``pairs`` (2, k): the rows of ``left`` and ``right``
    columns (out, in) kept; ``excess`` (k,). Pairs are kept until what is left out is below ``tolerance`` of the whole, in root
    mean square, for vectors whose second moments are the eigenvalues (gradients under their own curvature). ``grid``: the response
    without the approximation, for what costs no pair of a query and an example; None where it is constant.
    """

    constant: float
    grid: Grid | None
    pairs: Tensor
    excess: Tensor

    @classmethod
    def of(cls, matrix: Kronecker, values: Tensor, constant: float, floor: float, tolerance: float) -> Split | None:
        if len(values) != 1 or tolerance <= 0:
            return None
        grid = Grid.of(matrix, values)
        weight = (matrix.spectrum[0].double() - floor).clamp_min(0)
        exact = values[0].double()
        lost = ((exact - constant) * weight).square().flatten()
        order = lost.argsort()
        # where the constant is far above the response, constant and excess cancel: their rounding has to fit in the tolerance too
        rounding = (torch.finfo(values.dtype).eps * constant) ** 2 * weight.square().sum()
        allowed = tolerance**2 * (exact * weight).square().sum() - rounding
        kept = order[int((lost[order].cumsum(0) <= allowed).sum()) :].sort().values  # neighbours share rows of the factors
        if allowed < 0 or len(kept) > lost.numel() // 2:
            return None
        pairs = torch.stack([kept // weight.shape[1], kept % weight.shape[1]])
        return cls(constant, grid, pairs, (exact - constant).flatten()[kept].to(matrix.spectrum.dtype))

    def turn(self, out: Tensor, inner: Tensor) -> Turned:
        """As :meth:`Grid.turn`."""
        return self.grid.turn(out, inner) if self.grid is not None else (out.mT.contiguous(), inner.mT.contiguous())

    def coordinates(self, turned: Turned, part: slice = slice(None)) -> Tensor:
        """Coordinates (k, n) of outer products at the kept pairs, or a part of them."""
        return turned[0].index_select(0, self.pairs[0, part]).mul_(turned[1].index_select(0, self.pairs[1, part]))

    def dots(self, u: Turned, g: Turned) -> Tensor:
        """As :meth:`Grid.dots`."""
        total = (u[0].mT @ g[0]).mul_(u[1].mT @ g[1]).mul_(self.constant)
        excess = self.excess.to(total.dtype).unsqueeze(1)
        step = max(1, room(total) // max(1, *total.shape))
        for i in range(0, len(excess), step):
            part = slice(i, i + step)
            total.addmm_(self.coordinates(u, part).mul_(excess[part]).mT, self.coordinates(g, part))
        return total

    def paired(self, u: Turned, g: Turned) -> Tensor:
        """As :meth:`Grid.paired`, exactly."""
        return self.grid.paired(u, g) if self.grid is not None else self.constant * (u[0] * g[0]).sum(0) * (u[1] * g[1]).sum(0)

    def whole(self, u: Turned) -> Tensor:
        """As :meth:`Grid.whole`, exactly."""
        return self.grid.whole(u) if self.grid is not None else self.constant * torch.einsum("on,in->noi", *u).unsqueeze(1)

    def square_norms(self, u: Turned) -> Tensor:
        """As :meth:`Grid.square_norms`, exactly."""
        return self.grid.square_norms(u) if self.grid is not None else self.constant**2 * u[0].square().sum(0) * u[1].square().sum(0)


@dataclass(frozen=True)
class Dense(Operator):
    """Eigenvectors in the columns of ``basis`` (size, size), acting on vectors flattened to ``size``."""

    basis: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Dense:
        """The operator of a symmetric matrix, decomposed in float64."""
        spectrum, basis = eigh(matrix)
        return cls(basis, spectrum)

    def rotate(self, v: Tensor) -> Tensor:
        return v.reshape(len(v), -1) @ self.basis.to(v.dtype)

    def restore(self, v: Tensor) -> Tensor:
        return v @ self.basis.to(v.dtype).mT

    def precision_in_basis(self, precision: Tensor) -> Tensor:
        return self.basis.square().mT @ precision.reshape(-1).to(self.basis)

    def __call__(self, v: Tensor) -> Tensor:
        return super().__call__(v).reshape(v.shape)

    def flow(self, gain: Tensor | float = 1.0, decay: Tensor | float = 0.0, decoupled: Tensor | float = 0.0) -> Flow | ScaledFlow:  # type: ignore[override]
        """As :meth:`Operator.flow`, exactly: a gain or a decay that varies over the block is folded in before a new decomposition."""
        if not any(isinstance(x, Tensor) for x in (gain, decay, decoupled)):
            return super().flow(gain, decay, decoupled)  # type: ignore[arg-type]
        diagonal = [torch.as_tensor(x, dtype=self.basis.dtype, device=self.basis.device).reshape(-1).expand(len(self.basis)) for x in (gain, decay, decoupled)]
        root = diagonal[0].sqrt()
        curvature = (self.basis * self.spectrum.clamp_min(0)) @ self.basis.mT + torch.diag(diagonal[1])
        matrix, held = Dense.of(root[:, None] * curvature * root + torch.diag(diagonal[2])), root == 0
        return ScaledFlow(matrix, root, curvature[held] * root, diagonal[2][held]) if held.any() else ScaledFlow(matrix, root)


@dataclass(frozen=True)
class Diagonal(Operator):
    """A diagonal matrix: ``spectrum`` has the block's own shape."""

    spectrum: Tensor

    def rotate(self, v: Tensor) -> Tensor:
        return v

    def restore(self, v: Tensor) -> Tensor:
        return v

    def precision_in_basis(self, precision: Tensor) -> Tensor:
        return precision.to(self.spectrum)

    def _harmonic(self, gain: Tensor) -> Tensor:
        return gain.to(self.spectrum)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors in columns of symmetric matrices (..., n, n), computed in float64 and returned in
    the matrix's dtype. Raises NotFinite for NaN or infinity."""
    if not torch.isfinite(matrix).all():
        raise NotFinite("a curvature matrix with NaN or infinite entries", "finite gradients", "look for a diverged checkpoint or a loss that overflows")
    symmetric = ((matrix + matrix.mT) / 2).double()
    spectrum, basis = torch.linalg.eigh(symmetric)
    # row by row in memory, as what comes back from a file: products with it then round alike
    return spectrum.to(matrix.dtype), basis.to(matrix.dtype).contiguous()
