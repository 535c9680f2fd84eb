"""Functions of a symmetric positive semi-definite matrix M that is known by its products only: v -> M v for several vectors at once.

Two ways. :func:`lanczos` spans a subspace by the vector's own powers and knows every function of M in it, exponentials among them, with
bounds on what it leaves out; it holds a vector a step. :func:`conjugate_gradients` holds four vectors, begins anywhere and is steered by
an approximate inverse; it knows inverses only. In exact arithmetic both give the same inverse where nothing steers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
NODES = 128  # of the quadrature over time in a bound


@dataclass(frozen=True)
class Trust:
    """How far solutions can be trusted, one number for each vector: ``products`` that it took; ``residual``, relative to the right-hand
    side; ``error``: what was held against the tolerance; ``bound``: what the error cannot exceed, both relative to the solution."""

    products: Tensor
    residual: Tensor
    error: Tensor
    bound: Tensor


def lengths(v: Tensor) -> Tensor:
    return v.double().norm(dim=1)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where a vanishes."""
    return torch.where(a == 0, torch.zeros_like(a), a / b)


@dataclass(frozen=True)
class Inside:
    """What Krylov subspaces know: eigenvalues ``spectrum`` (vectors, m) of the tridiagonal ``T = V^T M V``, and of its eigenvectors the
    first and last components; ``off`` (vectors,): how M leads out of the subspace; ``sizes`` (vectors,): |w|."""

    spectrum: Tensor
    first: Tensor
    last: Tensor
    vectors: Tensor
    off: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, diagonal: Tensor, off: Tensor, sizes: Tensor) -> Inside:
        """From the recurrence's coefficients, both (vectors, m)."""
        inner = off[:, :-1]
        matrix = torch.diag_embed(diagonal) + torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
        spectrum, vectors = torch.linalg.eigh(matrix)
        return cls(spectrum.clamp_min(0), vectors[:, 0], vectors[:, -1], vectors, off[:, -1], sizes)

    def coordinates(self, f: Map) -> Tensor:
        """Of ``f(M) w`` in the subspaces, (vectors, m)."""
        return torch.einsum("qms,qs->qm", self.vectors, f(self.spectrum) * self.first) * self.sizes[:, None]

    def norms(self, f: Map) -> Tensor:
        """``|f(M) w|`` as far as the subspaces hold it, (vectors,)."""
        return (f(self.spectrum) * self.first).norm(dim=1) * self.sizes

    def leak(self, f: Map) -> Tensor:
        """The length of what ``M f(M) w`` has outside of the subspaces, (vectors,): the residual."""
        return self.off * (f(self.spectrum) * self.first * self.last).sum(1).abs() * self.sizes

    def leaks(self, time: float) -> tuple[Tensor, Tensor]:
        """Times s (nodes,) from 0 to ``time``, and the residual of ``exp(-s M) w`` at each, (vectors, nodes)."""
        s = torch.cat([torch.zeros(1), torch.logspace(-6, 0, NODES)]).to(self.spectrum) * time
        decays = torch.exp(-s[:, None] * self.spectrum[:, None, :])
        return s, self.off[:, None] * (decays @ (self.first * self.last)[:, :, None]).squeeze(2).abs() * self.sizes[:, None]


Bound = Callable[[Inside], Tensor]
"""The error of a function inside the subspaces, relative to it, (vectors,): at most."""


def inverse_bound(f: Map, floor: float) -> Bound:
    """For ``f(s) = 1 / (s + shift)`` and a matrix whose shifted eigenvalues are at least ``floor``."""
    return lambda inside: ratio(inside.leak(f) / floor, inside.norms(f))


def exponential_bound(accumulated: Map, surviving: Map | None, time: float) -> Bound:
    """For ``accumulated(s) = (1 - exp(-t s)) / s`` and, where it is given, ``surviving(s) = exp(-t s)``, relative to a hundredth of w
    where less is left of it.

    ``y(t) = exp(-t M) w`` solves y' = -M y. Inside the subspace the equation is violated by r(s), so the error is ``int_0^t exp(-(t-s) M)
    r(s) ds``: at most ``int |r|``, M being positive. The first function is y's integral over time (Hochbruck and Lubich 1997).
    """

    def bound(inside: Inside) -> Tensor:
        s, leaks = inside.leaks(time)
        found = ratio(torch.trapezoid((time - s) * leaks, s), inside.norms(accumulated))
        if surviving is not None:
            left = torch.maximum(inside.norms(surviving), inside.sizes / 100)
            found = torch.maximum(found, ratio(torch.trapezoid(leaks, s), left))
        return found

    return bound


@dataclass(frozen=True)
class Krylov:
    """Orthonormal bases (m, size) of the vectors' subspaces and what is known inside each; none for a vector that is 0."""

    bases: list[Tensor]
    inside: list[Inside | None]

    def apply(self, f: Map) -> Tensor:
        """``f(M) w``, (vectors, size)."""

        def one(basis: Tensor, known: Inside | None) -> Tensor:
            return basis.new_zeros(basis.shape[1]) if known is None else known.coordinates(f)[0].to(basis.dtype) @ basis

        return torch.stack([one(basis, known) for basis, known in zip(self.bases, self.inside, strict=True)])


def lanczos(product: Map, w: Tensor, bound: Bound, residual: Map, tolerance: float, steps: int) -> tuple[Krylov, Trust]:
    """Krylov subspaces of the rows of ``w``, each grown until ``bound`` is below ``tolerance``, by at most ``steps`` products.

    Every new direction is made orthogonal to all before it, twice: in floating point Lanczos' recurrence alone forgets them.
    ``residual``: the function whose residual is reported.
    """
    count, sizes = len(w), lengths(w)
    basis = w.new_empty(count, min(steps, w.shape[1]), w.shape[1])
    diagonal, off = (torch.zeros(count, basis.shape[1], dtype=torch.float64, device=w.device) for _ in range(2))
    used = torch.zeros(count, dtype=torch.long)
    trust = [torch.zeros(count, dtype=torch.float64) for _ in range(2)]
    live = (sizes > 0).nonzero().flatten()
    following = {int(k): w[k] / sizes[k].to(w.dtype) for k in live}
    for m in range(basis.shape[1]):
        if not len(live):
            break
        for k in live.tolist():
            basis[k, m] = following[k]
        images = product(basis[live, m])
        for k, image in zip(live.tolist(), images, strict=True):
            diagonal[k, m] = basis[k, m] @ image
            following[k], off[k, m] = _orthogonal(image, basis[k, : m + 1])
        inside = Inside.of(diagonal[live, : m + 1], off[live, : m + 1], sizes[live])
        used[live.cpu()] = m + 1
        trust[0][live.cpu()], trust[1][live.cpu()] = (ratio(inside.leak(residual), sizes[live])).cpu(), bound(inside).cpu()
        live = live[((trust[1][live.cpu()] > tolerance) & (off[live, m].cpu() > 0)).to(live.device)]
    bases = [basis[k, : used[k]] for k in range(count)]
    known = [Inside.of(diagonal[k : k + 1, : used[k]], off[k : k + 1, : used[k]], sizes[k : k + 1]) if used[k] else None for k in range(count)]
    return Krylov(bases, known), Trust(used, trust[0], trust[1], trust[1])


def _orthogonal(image: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """The unit vector along what ``image`` has outside of the basis, and the length of that; 0 where it is rounding."""
    left = image
    for _ in range(2):
        left = left - (basis @ left) @ basis
    size, whole = float(left.double().norm()), float(image.double().norm())
    if size <= 10 * torch.finfo(image.dtype).eps * whole or len(basis) == basis.shape[1]:
        return left, 0.0
    return left / size, size


def conjugate_gradients(product: Map, precondition: Map, b: Tensor, start: Tensor, floor: float, tolerance: float, steps: int) -> tuple[Tensor, Trust]:
    """Solutions x of ``A x = b`` for a positive definite A = ``product``, from ``start``, by at most ``steps`` products each.

    A vector is done when what ``precondition``, an approximate inverse of A, makes of its residual is below ``tolerance`` of x.
    ``floor``: a lower bound of A's eigenvalues; the error is at most the residual divided by it.
    """
    x, r = start.clone(), b - product(start)
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum(1)
    used = torch.ones(len(b), dtype=torch.long)
    live = _unsolved(x, z, tolerance)
    for _ in range(steps - 1):
        if not len(live):
            break
        a = product(p[live])
        step = (rz[live] / (p[live] * a).sum(1)).unsqueeze(1)
        x[live] += step * p[live]
        r[live] -= step * a
        z[live] = precondition(r[live])
        now = (r[live] * z[live]).sum(1)
        p[live] = z[live] + (now / rz[live]).unsqueeze(1) * p[live]
        rz[live] = now
        used[live.cpu()] += 1
        live = live[torch.isin(live, _unsolved(x, z, tolerance))]
    residual = lengths(r)
    return x, Trust(used, ratio(residual, lengths(b)).cpu(), ratio(lengths(z), lengths(x)).cpu(), ratio(residual / floor, lengths(x)).cpu())


def _unsolved(x: Tensor, z: Tensor, tolerance: float) -> Tensor:
    return (lengths(z) > tolerance * lengths(x)).nonzero().flatten()
