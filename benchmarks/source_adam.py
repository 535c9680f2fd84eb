"""SOURCE under Adam: every way to bring the preconditioner P and the curvature H together, against exact unrolling.

    python benchmarks/source_adam.py            three problems, three seeds: five minutes on one quiet core
    python benchmarks/source_adam.py --tiny     one problem, one seed

Training contracts by ``M = P^1/2 H P^1/2``, and no Kronecker basis diagonalises that. Scored: Spearman with the exact derivative of the
whole training (mean over queries), the slope of the truth on the score, and both for the baselines. What won is in the library
(``hw.Source``); what lost is written out here only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from source_problems import agreement, measure, problem, unrolled
from torch import Tensor

import headwater as hw
from headwater.influence.engine import Engine
from headwater.influence.methods import Row
from headwater.influence.queries import ask
from headwater.influence.responses import Accumulated, Surviving
from headwater.influence.scoring import query_gradients
from headwater.linalg import eigh

PROBLEMS = {
    "waves, Adam": ("waves", "adam", {"lr": 0.01, "beta2": 0.99, "eps": 1e-3}),
    "digits, AdamW": ("digits", "adamw", {"lr": 0.005, "beta2": 0.99, "eps": 1e-4, "weight_decay": 0.1}),
    "concrete, Adam": ("concrete", "adam", {"lr": 0.005, "beta2": 0.99, "eps": 1e-3}),
}
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Part:
    """One layer in one segment: queries u and what is made of them as matrices (n, out, in); eigenvectors ``left``, ``right`` and
    eigenvalues ``lam`` of its EK-FAC; the preconditioner ``p``; pseudo-gradients ``rows`` (n, out, in) whose mean outer product is H."""

    def __init__(self, engine: Engine, row: Row, name: str, rows: Tensor, count: int) -> None:
        op: Any = engine.curvature(row.curvature).operators[name]  # type: ignore[arg-type, attr-defined]
        self.left, self.right, self.lam = op.left[0], op.right[0], op.spectrum[0]
        gains: Any = engine._gains(row.pace)[name]
        self.p, self.rows, self.count = gains[0], rows, count
        decay, decoupled = engine._decays(row)
        self.decay, self.decoupled = decay[name], decoupled[name]
        self.time: float = row.phi.time  # type: ignore[attr-defined]
        self.f, self.s = Accumulated(self.time), Surviving(self.time)

    def turned(self, v: Tensor) -> Tensor:
        return self.left.mT @ v @ self.right

    def back(self, v: Tensor) -> Tensor:
        return self.left @ v @ self.right.mT

    def spread(self, diagonal: Tensor) -> Tensor:
        """The diagonal of ``Q^T diag(x) Q``."""
        return self.left.square().mT @ diagonal @ self.right.square()


Rule = Callable[[Part, Tensor], tuple[Tensor, Tensor]]
"""Queries to what they are compared with, and to what is carried."""


def projected(p: Callable[[Part], Tensor]) -> Rule:
    """P inside H's eigenbasis: one number for each eigenpair."""

    def rule(part: Part, u: Tensor) -> tuple[Tensor, Tensor]:
        gain = p(part)
        s, v = gain * (part.lam + part.decay) + part.decoupled, part.turned(u)
        return part.back(gain * part.f(s) * v), part.back(part.s(s) * v)

    return rule


def hybrid(part: Part, u: Tensor) -> tuple[Tensor, Tensor]:
    """The published one (Bae et al. 2024, App. D): what decays is taken from the diagonal of P H, what is inverted is H's EK-FAC."""
    d = part.p * (part.left.square() @ part.lam @ part.right.square().mT + part.decay) + part.decoupled
    return part.back(part.turned(-torch.expm1(-part.time * d) * u) / (part.lam + part.decay + 1e-8)), part.s(d) * u


def scaled(own_basis: bool) -> Rule:
    """EK-FAC of the gradients that the optimizer steps by, ``P^1/2 o G``: P is exact, eigenvalues are M's own in the basis, which is
    H's or (``own_basis``) that of the scaled gradients' second moments."""

    def rule(part: Part, u: Tensor) -> tuple[Tensor, Tensor]:
        root = part.p.sqrt()
        rows = root * part.rows
        if own_basis:
            part.left, part.right = eigh((rows @ rows.mT).sum(0))[1], eigh((rows.mT @ rows).sum(0))[1]
        s = part.turned(rows).square().sum(0) / part.count + part.decay * part.spread(part.p) + part.decoupled
        v = part.turned(root * u)
        return root * part.back(part.f(s) * v), part.back(part.s(s) * v) / root

    return rule


def layerwise(part: Part, u: Tensor) -> tuple[Tensor, Tensor]:
    """M itself, layer by layer: what is lost between layers, and nothing else."""
    root = part.p.flatten().sqrt()
    rows = part.rows.flatten(1) * root
    s, q = eigh(rows.mT @ rows / part.count + torch.diag(part.decay * root**2 + part.decoupled))
    v = (u.flatten(1) * root) @ q
    return ((v * part.f(s.clamp_min(0))) @ q.mT * root).reshape(u.shape), ((v * part.s(s.clamp_min(0))) @ q.mT / root).reshape(u.shape)


RULES: dict[str, Rule] = {
    "P in H's eigenbasis, harmonic (hw.Source)": projected(lambda part: 1 / part.spread(1 / part.p)),
    "P in H's eigenbasis, arithmetic": projected(lambda part: part.spread(part.p)),
    "diagonal decay, EK-FAC inverse (published)": hybrid,
    "EK-FAC of P^1/2 o G, H's eigenbasis": scaled(False),
    "EK-FAC of P^1/2 o G, its own eigenbasis": scaled(True),
    "exact M, layer by layer": layerwise,
}


def by_rules(run: hw.Run, queries: Any, function: Any) -> dict[str, np.ndarray]:
    """SOURCE's scores by each rule, written out layer by layer; every segment's gradients are taken once."""
    engine = Engine.of(run, None)
    stage, final = run.stages[0], (run.checkpoints[-1],)
    first = {n: side.whole()[:, 0] for n, side in query_gradients(engine, ask(queries, stage.task, function), final, slice(0, len(queries[1]))).items()}
    u = {rule: dict(first) for rule in RULES}
    scores = {rule: np.zeros((len(queries[1]), stage.size)) for rule in RULES}
    for row in reversed(hw.Source().plan(run).rows):
        engine.curvature(row.curvature)  # type: ignore[arg-type]
        pseudo: dict[str, list[Tensor]] = {n: [] for n in first}
        losses: dict[str, list[Tensor]] = {n: [] for n in first}
        for weights in row.at:
            engine.load(weights)
            for column in engine.capture.each(stage.task.exact, stage.data.data):
                for n, g in column.items():
                    pseudo[n].append(g.dense()[:, 0])
            for n, g in engine.capture.gradients(stage.task.loss, stage.data.data).items():
                losses[n].append(g.dense()[:, 0])
        for n in first:
            rows, loss = torch.cat(pseudo[n]), torch.stack(losses[n]).mean(0)
            for rule, apply in RULES.items():
                seen, u[rule][n] = apply(Part(engine, row, n, rows, stage.size * len(row.at)), u[rule][n])
                scores[rule] -= (seen.flatten(1) @ loss.flatten(1).mT).numpy() / stage.size
    return scores


def contest(name: str, seed: int, place: Path) -> dict[str, tuple[float, float]]:
    """Every candidate on one training."""
    of = problem(*PROBLEMS[name])
    run, queries = of.record(place / f"{name}-{seed}", seed)
    truth, function = unrolled(of, run, queries), measure(of)
    found = {rule: agreement(scores, truth) for rule, scores in by_rules(run, queries, function).items()}
    exact = hw.Refine(steps=200, tolerance=1e-4)
    methods = {
        "hw.Source()": hw.Source(),
        "exact M (hw.Source(refine=))": hw.Source(refine=exact),
        "exact M, one segment": hw.Source(1, refine=exact),
        "hw.TracIn()": hw.TracIn(),
        "hw.Influence(), damping P^-1/t": hw.Influence(),
        "hw.Influence(refine=), damping P^-1/t": hw.Influence(refine=exact),
        **{f"damping {d:g}": hw.Influence(d) for d in DAMPINGS},
        **{f"exact, damping {d:g}": hw.Influence(d, hw.Dense()) for d in DAMPINGS},
    }
    scores = hw.trace(run, queries, list(methods.values()), measure=function, progress=False)
    found |= {key: agreement(s.values, truth) for key, s in zip(methods, scores, strict=True)}
    assert abs(found.pop("hw.Source()")[0] - found["P in H's eigenbasis, harmonic (hw.Source)"][0]) < 1e-6, "the rules written out here are not the library's"
    for key, kind in (("damping", "hw.Influence, best damping of five"), ("exact, damping", "hw.Influence(curvature=hw.Dense()), best of five")):
        found[kind] = max((found.pop(f"{key} {d:g}") for d in DAMPINGS), key=lambda pair: pair[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    names, seeds = (list(PROBLEMS)[:1], (0,)) if given.tiny else (list(PROBLEMS), (0, 1, 2))
    columns: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="headwater-adam-") as folder:
        for name in names:
            for seed in seeds:
                print(f"{name}, seed {seed}", file=sys.stderr)
                columns.setdefault(name, []).append(contest(name, seed, Path(folder)))
    print(f"| Spearman with exact unrolling, seeds {', '.join(map(str, seeds))} (slope) | {' | '.join(names)} |")
    print(f"|---|{'---|' * len(names)}")
    for key in columns[names[0]][0]:
        cells = []
        for name in names:
            pairs = [found[key] for found in columns[name]]
            cells.append(f"{' / '.join(f'{rho:.3f}' for rho, _ in pairs)} ({np.mean([b for _, b in pairs]):.2f})")
        print(f"| {key} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
