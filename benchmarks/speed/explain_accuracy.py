"""Is a tolerance kept, is the estimated error right, and what does captum need for the same? Against 4,096 points in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater as hw
from speed import pictures
from speed.tables import installed, table

STEPS = (4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def measure(place: Path, tiny: bool, repeats: int) -> str:
    names = pictures.NETWORKS[:1] if tiny else pictures.NETWORKS
    count, reference = (8, 64) if tiny else (100, 4096)
    pictures.make(place, names, epochs=1 if tiny else 4)
    _, (images, labels) = pictures.digits()
    kept, fixed = [], []
    for name in names:
        model = pictures.read(place, name)
        truth = _truth(pictures.read(place, name).double(), images[:count].double(), labels[:count], reference)
        peer = _captum(model, images[:count], labels[:count], truth) if installed("captum") else None
        for tolerance in (1e-2, 3e-3, 1e-3):
            e = hw.explain(model, images[:count], labels[:count], tolerance=tolerance, progress=False)
            kept.append(_kept(name, tolerance, e, _off(e.values, truth), peer))
        for points in (16, 32, 64):
            e = hw.explain(model, images[:count], labels[:count], rule=hw.quadrature.gauss_legendre(points), progress=False)
            off = _off(e.values, truth)
            ratio = e.error / off
            fixed.append([name, str(points), _pair(off), _pair(e.relative_residual), *(f"{np.percentile(ratio, q):.2g}" for q in (5, 50, 95))])
    head = ["network", "tolerance", "met by", "evaluations: mean (p95)", "relative residual p95", "error: median / p95", "estimated / true: 5 %, 50 %, 95 %"]
    head += ["captum for the same residual p95", "captum for the same error p95"]
    text = (
        f"The true error of attributions is |values - reference| / |reference| (Euclidean, {reference:,} midpoints in float64), over {count} test digits. "
        f"captum's columns: the fewest of {STEPS[0]} .. {STEPS[-1]} Gauss-Legendre steps whose 95th percentile is as low, plus its two evaluations of the ends."
    )
    second = "The same for fixed Gauss-Legendre rules: how good is the estimate that every answer carries?"
    columns = ["network", "points", "true error: median / p95", "relative residual: median / p95", "estimated / true: 5 %", "50 %", "95 %"]
    return f"### How accurate, and at what cost\n\n{text}\n\n{table(head, kept)}\n\n{second}\n\n{table(columns, fixed)}\n"


def _truth(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, points: int) -> np.ndarray:
    return hw.explain(model, x, labels, rule=hw.quadrature.midpoint(points), progress=False).values


def _off(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    flat = (len(truth), -1)
    return np.linalg.norm((values - truth).reshape(flat), axis=1) / np.linalg.norm(truth.reshape(flat), axis=1)


def _captum(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, truth: np.ndarray) -> dict[int, tuple[float, float]]:
    """95th percentiles of residual and error by number of steps."""
    from captum.attr import IntegratedGradients

    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x))).gather(1, labels[:, None])[:, 0].double().numpy()
    found = {}
    for steps in STEPS:
        values = IntegratedGradients(model).attribute(x, target=labels, n_steps=steps, internal_batch_size=1024).detach().double().numpy()
        residual = np.abs(values.reshape(len(x), -1).sum(1) - change) / np.abs(change)
        found[steps] = float(np.percentile(residual, 95)), float(np.percentile(_off(values, truth), 95))
    return found


def _kept(name: str, tolerance: float, e: Any, off: np.ndarray, peer: dict[int, tuple[float, float]] | None) -> list[str]:
    residual, error = (float(np.percentile(v, 95)) for v in (e.relative_residual, off))
    ratio = " / ".join(f"{np.percentile(e.error / off, q):.2g}" for q in (5, 50, 95))
    cost = f"{e.evaluations.mean():.0f} ({np.percentile(e.evaluations, 95):.0f})"
    row = [name, f"{tolerance:g}", f"{100 * (e.relative_residual <= tolerance).mean():.1f} %", cost, f"{residual:.1e}", _pair(off), ratio]
    if peer is None:
        return [*row, "", ""]
    needed = [next((str(steps + 2) for steps, values in peer.items() if values[k] <= least), f"> {STEPS[-1]}") for k, least in enumerate((residual, error))]
    return [*row, *needed]


def _pair(values: np.ndarray) -> str:
    return f"{np.median(values):.1e} / {np.percentile(values, 95):.1e}"
