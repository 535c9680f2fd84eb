"""Truths that a recorded training gives by being repeated: with examples left out along the same batches, and how smoothly it answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.errors import InputError
from headwater.evaluate.bank import Bank
from headwater.evaluate.subsets import Subsets
from headwater.tasks import Examples
from headwater.tasks.batches import to
from headwater.tasks.task import per_example
from headwater.training import Run
from headwater.training.replay import Replay

AT_ONCE = 256  # queries measured in one pass


def replayed(run: Run, subsets: Subsets, queries: Any, *, measure: Callable[..., Any] | None = None, progress: bool = True) -> Bank:
    """Train the run anew on every subset *along its own batches and random numbers*: examples that are left out have weight 0, the
    normaliser of a batch stays, everything else is as it was.

    This is the truth that exact unrolling predicts to first order, without the noise of other batches: how removal ends when nothing but
    the examples' losses is taken away. It is not the truth of :func:`retrain`, whose batches are drawn anew, and the two are not to be
    compared. The replay is first held against the record.

    Args:
        run: recorded from its start, with the order of its examples.
        subsets: over the examples of all stages, in the order of the scores' columns.
        queries: a dataset or batch. measure: ``(model, batch) -> (n,)``; default: the last stage's ``task.measure``.
        progress: show a bar on stderr.

    Returns:
        A :class:`Bank` with one seed: for :func:`lds` and :func:`slope`.

    Raises:
        ReplayMismatch, RunError: the run cannot be repeated. InputError: subsets of another number of examples.
    """
    if subsets.n != run.size:
        raise InputError(f"subsets of {subsets.n} examples for a run of {run.size}", f"subsets of {run.size}", "hw.evaluate.leave_out(run.size, ...)")
    replay = Replay(run)
    replay.check()
    task = run.stages[-1].task
    examples = queries if isinstance(queries, Examples) else task.examples(queries)
    keep = torch.as_tensor(subsets.mask()).double()
    full = _measured(replay, replay.train(), examples, measure or task.measure)
    rows = tqdm(keep, disable=not progress, desc="replay", unit=" trainings", leave=False, file=sys.stderr)
    values = np.stack([_measured(replay, replay.train(weights), examples, measure or task.measure) for weights in rows])
    return Bank(subsets, (0,), values[:, None], full[None])


def _measured(replay: Replay, weights: dict[str, Tensor], examples: Examples, measure: Callable[..., Any]) -> np.ndarray:
    """The measurements of all queries under trained weights, (queries,)."""
    player, run = replay.player, replay.run
    player.set_mode(frozenset())
    player.place({n: weights[n] for n in player.names}, {n: t.clone() for n, t in weights.items() if n not in player.names}, ())
    found = []
    with torch.no_grad():
        for start in range(0, len(examples), AT_ONCE):
            batch = to(examples.batch(range(start, min(start + AT_ONCE, len(examples)))), run.device)
            found.append(per_example(measure(player.model, batch), batch, "measure").double().cpu().numpy())
    return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class Metasmoothness:
    """How smoothly a training answers to the weights of its examples (see :func:`metasmoothness`). ``mean``: over directions,
    ``values``: of each, from -1 to 1. ``step``: of the weights."""

    mean: float
    values: np.ndarray
    step: float

    def __repr__(self) -> str:
        each = ", ".join(f"{value:.3f}" for value in self.values)
        return f"Metasmoothness({self.mean:.3f} over {len(self.values)} directions ({each}), steps of {self.step:g}; near 1: derivatives foretell, near 0: they do not)"


def metasmoothness(run: Run, *, step: float = 0.1, directions: int = 3, seed: int = 0, progress: bool = True) -> Metasmoothness:
    """Whether derivatives in the examples' weights foretell anything in this training: look at it before trusting ``hw.Unrolled``.

    With weights 1, 1 + h v and 1 + 2 h v, v standard normal, training ends at θ0, θ1, θ2, and

        S = sum_j |θ2 - θ0|_j / ||θ2 - θ0||_1  sign(θ1 - θ0)_j  sign(θ2 - θ1)_j

    is 1 where every coordinate goes on in its direction and 0 where the second half step says nothing about the first (Engstrom et al.
    2025, "Optimizing ML training with metagradient descent", arXiv 2503.13751, Def. 1). Costs ``1 + 2 directions`` trainings, repeated
    from the record. Raise it by a larger Adam ``eps``, smaller rates, smooth activations, wider layers.

    Args:
        run: recorded from its start, with the order of its examples.
        step: h. directions: how many v, drawn from ``seed``. progress: show a bar on stderr.

    Raises:
        ReplayMismatch, RunError: the run cannot be repeated. InputError: a step of 0, no direction.
    """
    if not step > 0 or directions < 1:
        raise InputError(f"step={step}, directions={directions}", "a step above 0, at least one direction", "metasmoothness(run, step=0.1, directions=3)")
    replay = Replay(run)
    names: Sequence[str] = replay.player.names

    def trained(weights: Tensor | None) -> np.ndarray:
        state = replay.train(weights)
        return np.concatenate([state[n].detach().double().cpu().numpy().ravel() for n in names])

    replay.check()
    start, values = trained(None), []
    for v in tqdm(_directions(run.size, directions, seed), total=directions, disable=not progress, desc="metasmoothness", leave=False, file=sys.stderr):
        one, two = trained(1 + step * v), trained(1 + 2 * step * v)
        whole = np.abs(two - start)
        values.append(float((whole * np.sign(one - start) * np.sign(two - one)).sum() / (whole.sum() or 1.0)))
    return Metasmoothness(float(np.mean(values)), np.array(values), step)


def _directions(size: int, count: int, seed: int) -> Iterator[Tensor]:
    return (torch.as_tensor(np.random.default_rng([seed, k]).standard_normal(size)) for k in range(count))
