"""``refine=``: functions of the exact curvature applied to queries, by iterations.

EK-FAC drops what lies between layers and makes each layer's curvature a Kronecker product. Here the matrix is the Gauss-Newton matrix
itself, known by its products (:mod:`headwater.curvature.products`), and as the optimizer meets it: ``M = P^1/2 (G + decay) P^1/2 +
decoupled`` is exact too, since P is diagonal in the parameters.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.curvature import GaussNewton, Vectors
from headwater.curvature.estimate import flatten
from headwater.errors import InputError
from headwater.influence.responses import Accumulated, DampedInverse
from headwater.linalg import Response
from headwater.linalg.krylov import Krylov, Trust, conjugate_gradients, exponential_bound, inverse_bound, lanczos
from headwater.store import Store, bytes_hash

MEMORY = 2**29  # bytes of the vectors held for the queries that are solved at once
SAVE_ABOVE = 2.0  # seconds of work that are worth a file


@dataclass(frozen=True)
class Refine:
    """How far products with curvature are refined: ``hw.Source(refine=hw.Refine(steps=50))``, or ``refine=50`` for short.

    Args:
        steps: at most so many products with the Gauss-Newton matrix for each query and segment; each passes ``examples`` at all of the
            segment's checkpoints through the model, once forwards along the query's vector and once backwards. 0: no refinement.
        tolerance: a query is done when its vector's relative error is below this: by a bound that holds, or, preconditioned, by what the
            estimate makes of the residual.
        examples: of each checkpoint use only so many evenly spaced examples (default: all).
        preconditioned: False: each query gets a Krylov subspace, of a vector a step, in which SOURCE's F and what is carried to earlier
            segments are both exact; the estimate is not even made. True: conjugate gradients, begun from the estimate's answer and
            preconditioned by it, which hold four vectors. They know inverses only: of SOURCE, ``(M + 1/t)^-1`` stands for F (they differ
            by at most 1.298) and the carry is left to the estimate, as in ASTRA (Wang et al. 2025, arXiv 2507.14740). For models whose
            vectors are large, and for few steps: below about ten they are ahead, beyond that the subspace is.

    >>> Refine(steps=20).tolerance
    0.01
    """

    steps: int = 50
    tolerance: float = 1e-2
    examples: int | None = None
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise InputError(f"steps={self.steps!r}", "a number of products, 0 for no refinement", "hw.Refine(steps=50)")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance={self.tolerance!r}", "a relative error from 0 to below 1", "hw.Refine(tolerance=1e-3)")
        if self.examples is not None and self.examples < 1:
            raise InputError(f"examples={self.examples}", "at least one example, or None for all", "see hw.Refine")

    @staticmethod
    def of(given: Refine | int | None, estimate: Any) -> Refine | None:
        """What was passed as ``refine=``; None where it asks for nothing."""
        if isinstance(given, int) and not isinstance(given, bool):
            given = Refine(steps=given)
        if given is not None and not isinstance(given, Refine):
            raise InputError(f"refine={given!r}", "a number of steps, or a hw.Refine", "refine=hw.Refine(steps=50)")
        if given is not None and given.steps and getattr(estimate, "matrix", "gauss_newton") == "hessian":
            raise InputError("refine= with the exact Hessian", "an estimate of the Gauss-Newton matrix, which is what products are refined to", "curvature=hw.EKFAC()")
        return given if given is not None and given.steps else None


@dataclass
class RefinedFlow:
    """A row's curvature as its optimizer met it, exactly. ``gain`` (P), ``decay`` and ``decoupled``: one number for each parameter, flat.

    ``approximate``: makes the same from the estimate, the preconditioner, where it is wanted. ``notes``: what each solution cost and how far it can be
    trusted. ``store`` and ``kept``: solutions are kept under a name made of what they depend on, so that interrupted work resumes.
    """

    approximate: Callable[[], Any]
    product: GaussNewton
    shapes: dict[str, tuple[int, ...]]
    gain: Tensor
    decay: Tensor
    decoupled: Tensor
    settings: Refine
    key: str
    store: Store
    notes: list[Note]
    kept: set[str]

    def solve(self, phi: Response, psi: Response | None, queries: int, part: Callable[[slice], Vectors]) -> tuple[Vectors, Vectors | None]:
        """``respond(phi)`` and ``carry(psi)`` of ``queries`` vectors, as many at once as memory allows."""
        at_once = max(1, MEMORY // (self._held() * len(self.gain) * self.gain.element_size()))
        found = [self._kept(phi, psi, part(slice(i, min(i + at_once, queries)))) for i in range(0, queries, at_once)]
        seen = _joined([f[0] for f in found])
        return seen, None if psi is None else _joined([f[1] for f in found if f[1] is not None])

    def _held(self) -> int:
        """Vectors in memory for each query."""
        return 8 if self.settings.preconditioned else self.settings.steps + 8

    def _kept(self, phi: Response, psi: Response | None, u: Vectors) -> tuple[Vectors, Vectors | None]:
        """The solution, from the store where interrupted work left it."""
        flat = flatten(u, self.shapes)
        name = "jobs/refined-" + bytes_hash(f"{self.key} {phi} {psi}".encode() + flat.detach().cpu().contiguous().numpy().tobytes())
        self.kept.add(name)
        if self.store.has(name):
            held = {k: t.to(flat.device) for k, t in self.store.read(name).items()}
            self.notes.append(Note(**self.store.meta(name)))
            self.product.setting.advance(len(flat) * self.settings.steps * self.product.count)
            return self._shaped(held["seen"]), self._shaped(held["carried"]) if psi is not None else None
        started = time.perf_counter()
        seen, carried, note = self._solved(phi, psi, u, flat)
        self.notes.append(note)
        self.product.setting.advance(max(0, len(flat) * self.settings.steps - note.products) * self.product.count)  # what was planned and not needed
        if time.perf_counter() - started >= SAVE_ABOVE:
            tensors = {"seen": seen} | ({"carried": carried} if carried is not None else {})
            self.store.write(name, {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, vars(note))
        return self._shaped(seen), None if carried is None else self._shaped(carried)

    def _solved(self, phi: Response, psi: Response | None, u: Vectors, flat: Tensor) -> tuple[Tensor, Tensor | None, Note]:
        return self._from_estimate(phi, psi, u, flat) if self.settings.preconditioned else self._in_subspace(phi, psi, flat)

    def _in_subspace(self, phi: Response, psi: Response | None, flat: Tensor) -> tuple[Tensor, Tensor | None, Note]:
        """``P^1/2 phi(M) P^1/2 u`` and what is carried, from one Krylov subspace."""
        root, settings = self.gain.sqrt(), self.settings
        bound = exponential_bound(phi, psi, phi.time) if isinstance(phi, Accumulated) else inverse_bound(phi, self._floor(phi))
        space, trust = lanczos(self._matrix, flat * root, bound, phi, settings.tolerance, settings.steps)
        return space.apply(phi) * root, None if psi is None else self._carried(space, psi, flat), Note.of(phi, trust, settings.tolerance)

    def _from_estimate(self, phi: Response, psi: Response | None, u: Vectors, flat: Tensor) -> tuple[Tensor, Tensor | None, Note]:
        """``P^1/2 (M + shift)^-1 P^1/2 u`` by preconditioned conjugate gradients; the estimate carries."""
        root, settings, shift, estimate = self.gain.sqrt(), self.settings, self._shift(phi), self.approximate()
        start = flatten(estimate.respond(phi)(u), self.shapes) / torch.where(root > 0, root, 1.0)
        inverse = estimate.symmetric(DampedInverse(shift))
        x, trust = conjugate_gradients(
            lambda v: self._matrix(v) + shift * v,
            lambda v: flatten(inverse(self._shaped(v)), self.shapes),
            flat * root,
            start,
            self._floor(phi),
            settings.tolerance,
            settings.steps,
        )
        carried = None if psi is None else flatten(estimate.carry(psi)(u), self.shapes)
        return x * root, carried, Note.of(phi, trust, settings.tolerance)

    def _shift(self, phi: Response) -> float:
        assert isinstance(phi, DampedInverse | Accumulated)
        return phi.damping if isinstance(phi, DampedInverse) else 1.0 / phi.time

    def _floor(self, phi: Response) -> float:
        """A lower bound of the shifted matrix's eigenvalues: G has none below 0."""
        return self._shift(phi) + float((self.gain * self.decay + self.decoupled).min())

    def _matrix(self, v: Tensor) -> Tensor:
        """``(P^1/2 (G + decay) P^1/2 + decoupled) v``."""
        root = self.gain.sqrt()
        return root * (self.product(root * v) + self.decay * root * v) + self.decoupled * v

    def _carried(self, space: Krylov, psi: Response, flat: Tensor) -> Tensor:
        """``psi(H P + decoupled) u = P^-1/2 psi(M) P^1/2 u``. Parameters that do not move: see :class:`headwater.linalg.ScaledFlow`."""
        root = self.gain.sqrt()
        held = root == 0
        out = space.apply(psi) / torch.where(held, 1.0, root)
        for d in self.decoupled[held].unique():
            mine = held & (self.decoupled == d)
            across = space.apply(_divided(psi, d.double()))
            out[:, mine] = psi(d.double()).to(flat.dtype) * flat[:, mine] + self.product(root * across)[:, mine]
        return out

    def _shaped(self, flat: Tensor) -> Vectors:
        parts = flat.split([torch.Size(s).numel() for s in self.shapes.values()], 1)
        return {n: part.reshape(len(flat), *s) for part, (n, s) in zip(parts, self.shapes.items(), strict=True)}


def _divided(psi: Response, d: Tensor) -> Response:
    """``(psi(s) - psi(d)) / (s - d)``, and its slope where the two meet."""

    def f(s: Tensor) -> Tensor:
        step = 1e-6 * (s.max() + d).clamp_min(1e-30)
        far = (s - d).abs() > step
        return torch.where(far, psi(s) - psi(d), psi(d + step) - psi(d)) / torch.where(far, s - d, step)

    return f


def _joined(parts: list[Vectors]) -> Vectors:
    return {n: torch.cat([part[n] for part in parts]) for n in parts[0]}


@dataclass
class Note:
    """What one refined product cost and how far it can be trusted, over its queries: the provenance of scores made from it."""

    response: str
    queries: int
    products: int
    most: int
    residual: float
    error: float
    bound: float
    missed: int
    wanted: float

    @classmethod
    def of(cls, phi: Response, trust: Trust, tolerance: float) -> Note:
        residual, error, bound = (float(t.max()) for t in (trust.residual, trust.error, trust.bound))
        missed = int((trust.error > tolerance).sum())
        return cls(repr(phi), len(trust.error), int(trust.products.sum()), int(trust.products.max()), residual, error, bound, missed, tolerance)


def told(notes: list[Note]) -> dict[str, Any]:
    """The notes as one entry of a provenance; warns where products were not refined as far as was asked."""
    missed, queries, worst = sum(n.missed for n in notes), sum(n.queries for n in notes), max(notes, key=lambda n: n.error)
    if missed:
        warnings.warn(
            f"{missed} of {queries} refined products stopped after {worst.most} steps above the tolerance of {worst.wanted:g}: an error of up to {worst.error:.2g} "
            "is left. Give refine= more steps, or a tolerance that will do",
            stacklevel=2,
        )
    largest = {name: max(getattr(n, name) for n in notes) for name in ("residual", "error", "bound", "most")}
    return {"products": sum(n.products for n in notes), "queries": queries, "missed": missed, "responses": sorted({n.response for n in notes}), **largest}
