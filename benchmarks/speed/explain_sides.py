"""Contestants of explanations: Integrated Gradients of a batch of digits, by Headwater and by captum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speed import pictures
from speed.meter import Meter


def headwater(place: Path, name: str, batch: int, points: int, label: str) -> dict[str, Any]:
    import headwater as hw
    from headwater.features import network  # loaded before the clock runs, as captum is

    assert network
    model, (_, (images, labels)) = pictures.read(place, name), pictures.digits()
    rule = hw.quadrature.gauss_legendre(points)
    hw.explain(model, images[:2], labels[:2], rule=hw.quadrature.gauss_legendre(2), progress=False)
    meter = Meter()
    with meter.stage("explain"):
        found = hw.explain(model, images[:batch], labels[:batch], rule=rule, progress=False)
    report = meter.report()
    np.save(place / f"values-{label}.npy", found.values)
    return report


def captum(place: Path, name: str, batch: int, points: int, label: str, at_once: int | None = None) -> dict[str, Any]:
    from captum.attr import IntegratedGradients

    model, (_, (images, labels)) = pictures.read(place, name), pictures.digits()
    method = IntegratedGradients(model)
    method.attribute(images[:2], target=labels[:2], n_steps=2)
    meter = Meter()
    with meter.stage("explain"):
        found = method.attribute(images[:batch], target=labels[:batch], n_steps=points, internal_batch_size=at_once)
    report = meter.report()
    np.save(place / f"values-{label}.npy", found.detach().numpy())
    return report
