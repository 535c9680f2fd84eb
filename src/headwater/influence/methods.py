"""The methods, as tables. A method is a frozen record that turns a run into rows; the loop over rows is written once (scoring.py).

A row says: at these checkpoints take the training gradients of this stage's examples (their mean), and compare them with the query
gradient seen through ``phi`` of this curvature; afterwards carry the query to the rows before with ``psi``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from headwater.curvature import EKFAC, Estimate
from headwater.errors import InputError, RunError
from headwater.influence.refine import Refine
from headwater.influence.responses import Accumulated, Constant, DampedInverse, Surviving
from headwater.linalg import Response
from headwater.training import Run, Segment, segments
from headwater.training.segments import AUTO

RANK_ONLY, COSINE, MEASUREMENT, MAGNITUDE = "rank only", "cosine", "measurement", "magnitude"
Weights = tuple[int, ...]
"""Steps whose recorded parameters are averaged; one step for a plain checkpoint."""


@dataclass(frozen=True)
class Fit:
    """A curvature to estimate: at each of ``at`` = (stage, weights), with the given estimate."""

    estimate: Estimate
    at: tuple[tuple[int, Weights], ...]


@dataclass(frozen=True)
class Pace:
    """How fast training moved over steps (start, stop]: summed learning rates per parameter, and Adam's preconditioner at
    ``moments`` (the steps whose second moments are averaged; none for SGD)."""

    start: int
    stop: int
    moments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asking:
    """What a row compares training gradients with: the query gradient at weights ``at``, the mean over ``events`` (noise events of a
    diffusion model, of which one query gradient each is taken; None: as the queries come). ``unit``: each of them at unit norm."""

    at: Weights
    events: tuple[Any, ...] = (None,)
    unit: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a method's table.

    ``time`` is in units of the largest summed learning rate of ``pace``. ``refine``: apply phi and psi to the exact curvature, by iterations
    that begin at ``curvature``. ``asking``: None for the query gradient at the final weights, carried back by later rows. ``events``: noise
    events at which training gradients are taken (None: as the examples come). ``unit``: each training gradient at unit norm. ``share``:
    of the row in a mean over rows. ``labels``: what the row stands for, ``(("checkpoint", 300), ("timestep", 37))``, for scores by part.
    """

    stage: int
    at: tuple[Weights, ...]
    phi: Response
    psi: Response | None = None
    asking: Asking | None = None
    curvature: Fit | None = None
    pace: Pace | None = None
    examples: int | None = None
    refine: Refine | None = None
    events: Any = None
    unit: bool = False
    share: float = 1.0
    labels: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Table:
    """A method on a run: rows in the order of training, and what its scores mean. ``cosine``: gradients are brought to unit norm.
    ``keep``: the labels by which scores are kept apart as well."""

    name: str
    rows: tuple[Row, ...]
    unit: str
    cosine: bool = False
    keep: tuple[str, ...] = ()

    def labels(self, axis: str) -> list[float]:
        """What rows stand for along an axis, in order."""
        return sorted({value for row in self.rows for name, value in row.labels if name == axis})


@runtime_checkable
class Method(Protocol):
    """What `hw.trace` takes: a record that can plan itself for a run."""

    def plan(self, run: Run) -> Table: ...


def _final(run: Run) -> Weights:
    return (run.checkpoints[-1],)


@dataclass(frozen=True)
class GradDot:
    """Inner product of gradients at the final weights: ``-<grad measure, grad loss> / N``. The cheapest row; ranks only.

    >>> GradDot()
    GradDot()
    """

    def plan(self, run: Run) -> Table:
        rows = tuple(Row(stage.index, (_final(run),), Constant(1.0)) for stage in run.stages)
        return Table(repr(self), rows, RANK_ONLY)


@dataclass(frozen=True)
class GradCos:
    """Cosine of gradients at the final weights, ``-cos(grad measure, grad loss)``: blind to how large an example's gradient is.
    A zero gradient has cosine 0.

    >>> GradCos()
    GradCos()
    """

    def plan(self, run: Run) -> Table:
        rows = tuple(Row(stage.index, (_final(run),), Constant(1.0), examples=1) for stage in run.stages)
        return Table(repr(self), rows, COSINE, cosine=True)


@dataclass(frozen=True)
class TracIn:
    """Inner products along training (Pruthi et al. 2020, arXiv 2002.08484): over the run's checkpoints c,
    ``-sum_c t_c <grad measure(c), grad loss(c)> / N`` with t_c the learning rate summed over the steps that c stands for. In the
    measurement's unit to first order in training time: it ignores that later training undoes part of a change. For Adam and AdamW the
    product is taken through ``P = 1/(sqrt(v) + eps)``, by which their steps differ from the gradient.

    Args:
        keep: ``("checkpoint",)`` keeps the scores of each checkpoint as well: ``scores.by("checkpoint")``.

    >>> TracIn()
    TracIn()
    """

    keep: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", kept(self.keep, ("checkpoint",)))

    def plan(self, run: Run) -> Table:
        rows = []
        for stage in run.stages:
            start = stage.start
            for step in [c for c in run.checkpoints if stage.start < c <= stage.stop]:
                pace = Pace(start, step, (step,) if stage.optimizer.kind != "sgd" else ())
                rows.append(Row(stage.index, ((step,),), Constant(total_rate(run, pace)), asking=Asking((step,)), pace=pace, labels=(("checkpoint", step),)))
                start = step
        return Table(repr(self), tuple(rows), MEASUREMENT, keep=self.keep)


@dataclass(frozen=True)
class Influence:
    """Influence functions: ``-grad measure^T (H + damping)^-1 grad loss / N`` at the final weights (Koh & Liang 2017; with EK-FAC,
    Grosse et al. 2023, arXiv 2308.03296). H is the Gauss-Newton matrix of the mean loss plus the weight decay of the objective.

    Args:
        damping: a number; a sequence of numbers (a sweep: as many scores, from one pass); or None: ``1 / sum of the effective
            learning rates``, the damping that stopping training when it was stopped amounts to. With Adam that default damps
            in the preconditioned geometry: ``(H + P^-1 / t)^-1``.
        curvature: how H is estimated.
        refine: a :class:`headwater.Refine`, or a number of steps: the inverse of the Gauss-Newton matrix itself instead of an
            estimate's. The damping must be above 0.

    Exact at the optimum of a convex objective. On a run of several stages H is that of all stages' data together.

    >>> Influence(damping=0.01).damping
    0.01
    """

    damping: float | tuple[float, ...] | None = None
    curvature: Estimate = EKFAC()
    refine: Refine | int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.damping, list):
            object.__setattr__(self, "damping", tuple(self.damping))
        values = self.damping if isinstance(self.damping, tuple) else (self.damping,)
        if not values or any(v is not None and v < 0 for v in values):
            raise InputError(f"damping={self.damping!r}", "a number of at least 0, a non-empty sweep of them, or None", "leave it out for the default 1/(eta K)")
        if Refine.of(self.refine, self.curvature) is not None and 0 in values:
            raise InputError("refine= with damping=0", "a damping above 0: the Gauss-Newton matrix alone may have no inverse", "leave damping= out for the default")

    def sweep(self) -> tuple[Influence, ...]:
        """One method per damping."""
        values = self.damping if isinstance(self.damping, tuple) else (self.damping,)
        return tuple(replace(self, damping=value) for value in values)

    def plan(self, run: Run) -> Table:
        if isinstance(self.damping, tuple):
            raise InputError(f"a sweep of {len(self.damping)} dampings where one is needed", "one number or None", "use damping.sweep()")
        total = sum(stage.size for stage in run.stages)
        fit = Fit(self.curvature, tuple((stage.index, _final(run)) for stage in run.stages))
        pace = default_pace(run) if self.damping is None else None
        damping = self.damping if pace is None else 1.0 / total_rate(run, pace)
        phi = DampedInverse(float(damping))  # type: ignore[arg-type]
        refine = Refine.of(self.refine, self.curvature)
        rows = tuple(Row(stage.index, (_final(run),), phi, curvature=fit, pace=pace, examples=total, refine=refine) for stage in run.stages)
        name = f"Influence(damping={damping:.3g}{_refined(refine)})"
        return Table(name, rows, MEASUREMENT)


@dataclass(frozen=True)
class Source:
    """SOURCE: approximate unrolled differentiation (Bae et al. 2024, arXiv 2405.12186).

    Training is cut into segments; inside one, curvature H_l, gradients and learning rate count as stationary. With t_l the summed
    effective learning rate of segment l, ``S_l = exp(-t_l H_l)`` and ``F(s) = (1 - exp(-t_l s)) / s`` (Eqs. 15-24):

        score(q, m) = - sum_l  grad measure(q)^T S_L ... S_{l+1} F(H_l) grad_l loss(m) / N_l

    so a change made early is carried through what training did afterwards, and no damping is needed. H_l and grad_l are means over
    the segment's checkpoints.

    Args:
        segments: how many in the whole run (stages share them by steps, at least one each), one number per stage, or "auto": the fewest
            whose gradients drift little, as the recorded weights and rates tell. Where to cut was found to matter little.
        average: "gradients": one pass per checkpoint; "parameters": one pass per segment at the mean of its checkpoints'
            weights (FAST-SOURCE), about C/L times cheaper.
        curvature: how H_l is estimated.
        refine: a :class:`headwater.Refine`, or a number of steps: F and S of the Gauss-Newton matrix itself instead of an estimate's, by
            products with it. Under Adam P is not approximated then. Closer to the exact derivative on every network measured (Spearman
            .57 to .94 instead of .29 to .84 under Adam), and no better, or worse, on half-subset retraining (docs/lab-notes.md).

    Optimizers: effective rates count clipping and, for momentum (Nesterov too), ``1/(1 - beta)``; weight decay in the gradient is
    part of the objective's Hessian. For Adam and AdamW the segment contracts by ``P^1/2 H P^1/2`` with ``P = 1/(sqrt(v) + eps)``
    averaged over the segment's checkpoints (the paper's Eq. 43); with EK-FAC that product has no Kronecker basis, and **P is
    approximated inside H's eigenbasis** by the harmonic projection ``1 / diag(Q^T P^-1 Q)``; with ``hw.Dense`` it is exact. P counts
    as fixed: that removing an example also changes v is ignored. AdamW's decoupled decay is added to the contracting matrix.

    >>> Source(segments=3, average="parameters")
    Source(segments=3, average='parameters', curvature=EKFAC(fisher='auto', seed=0, examples=None), refine=None)
    """

    segments: int | tuple[int, ...] | str = 3
    average: str = "gradients"
    curvature: Estimate = EKFAC()
    refine: Refine | int | None = None

    def __post_init__(self) -> None:
        Refine.of(self.refine, self.curvature)
        if isinstance(self.segments, list):
            object.__setattr__(self, "segments", tuple(self.segments))
        if self.average not in ("gradients", "parameters"):
            raise InputError(f"average={self.average!r}", "'gradients' or 'parameters'", "see hw.Source")
        counts = self.segments if isinstance(self.segments, tuple) else (self.segments,)
        if self.segments != AUTO and (not counts or any(isinstance(count, str) or count < 1 for count in counts)):
            raise InputError(f"segments={self.segments!r}", 'at least one segment (per stage), or "auto"', "hw.Source(segments=3) is the published choice")

    def plan(self, run: Run) -> Table:
        rows = tuple(self._row(run, segment) for segment in segments(run, self.segments))
        return Table(f"Source(segments={self.segments}, average={self.average!r}{_refined(Refine.of(self.refine, self.curvature))})", rows, MEASUREMENT)

    def _row(self, run: Run, segment: Segment) -> Row:
        steps = tuple(segment.checkpoints)
        at: tuple[Weights, ...] = (steps,) if self.average == "parameters" else tuple((step,) for step in steps)
        adaptive = run.stages[segment.stage].optimizer.kind != "sgd"
        pace = Pace(segment.start, segment.stop, steps if adaptive else ())
        time = total_rate(run, pace)
        fit = Fit(self.curvature, tuple((segment.stage, weights) for weights in at))
        return Row(segment.stage, at, Accumulated(time), psi=Surviving(time), curvature=fit, pace=pace, refine=Refine.of(self.refine, self.curvature))


def _refined(refine: Refine | None) -> str:
    """What a table's name says of refinement."""
    return "" if refine is None else f", refine={refine.steps}"


def kept(given: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    """What ``keep=`` was given as, a name or several. Raises InputError."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if not set(names) <= set(known):
        raise InputError(f"keep={given!r}", f"names among {known}", 'keep=("checkpoint",), say')
    return names


def total_rate(run: Run, pace: Pace) -> float:
    """The largest summed effective learning rate of any parameter over the pace's steps: the unit of its time."""
    rates = run.rates(pace.start, pace.stop)
    total = max(rates.values(), default=0.0)
    if total <= 0:
        raise RunError(
            f"learning rates that sum to {total} over steps {pace.start + 1}..{pace.stop}",
            "a positive learning rate somewhere in every segment",
            "use fewer segments, or record the learning rates that training really used",
        )
    return total


def default_pace(run: Run) -> Pace:
    """The whole run: what Influence's default damping is taken from."""
    return Pace(run.stages[0].start, run.stages[-1].stop, _final(run) if run.stages[-1].optimizer.kind != "sgd" else ())
