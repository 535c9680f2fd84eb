"""What is compared on diffusion models. Plain tables, by name; a method of a later day is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusion_trainings import Training

import headwater as hw

FACTORS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # dampings of Influence, in units of 1 / (eta T)
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)  # regularisations of kernels, relative to the trace of Phi^T Phi
WINDOW = 20
REPLAYED, SHARED, OWN = "replayed", "expected, shared noise", "expected, own noise"
KINDS = {"TracIn": hw.DiffusionTracIn, "ReTrac": hw.DiffusionReTrac}
INFLUENCE, SOURCE, RANDOM = "Influence, chosen damping", "Source", "random"
OUTPUTS = {"TRAK of the loss, chosen λ": "loss", "D-TRAK, chosen λ": "square_norm"}
BASE = f"TracIn, {REPLAYED}"
PAIRS = (
    ("DAS, chosen λ", SOURCE),
    (SOURCE, f"ReTrac, {SHARED}"),
    (SOURCE, "D-TRAK, chosen λ"),
    (SOURCE, "Influence, damping 1/(ηT)"),
    ("D-TRAK, chosen λ", "TRAK of the loss, chosen λ"),
    (f"ReTrac, {SHARED}", f"TracIn, {SHARED}"),
    (f"ReTrac, {REPLAYED}", BASE),
    (f"TracIn, {SHARED}", BASE),
    (f"ReTrac, {SHARED}", "pixels, distance"),
    ("DAS, chosen λ", "pixels, distance"),
)


@dataclass(frozen=True)
class Method:
    """``of``: the method for a run (a damping may depend on its learning rates). ``ensemble``: averaged over all recorded models.
    ``removed``: whether its top examples are left out of trainings as well. ``journey``: it asks how an image was generated, so it knows nothing of
    others."""

    of: Callable[[hw.Run], Any]
    ensemble: bool = False
    removed: bool = False
    journey: bool = False


def modes(kind: str, timesteps: int, draws: int, window: int = WINDOW) -> dict[str, Any]:
    """A method over events, in every mode: as published, over a window, and with expected events."""
    make = KINDS[kind]
    return {
        f"{kind}, {REPLAYED}": make(timesteps, draws, events="replay"),
        f"{kind}, window of {window}": make(timesteps, draws, events="replay", window=window),
        f"{kind}, {SHARED}": make(timesteps, draws),
        f"{kind}, {OWN}": make(timesteps, draws, noise="example"),
    }


def methods(training: Training) -> dict[str, Method]:
    """Everything without a value to choose, by name."""
    found = {name: Method(_always(method), removed=name.endswith((REPLAYED, SHARED))) for kind in KINDS for name, method in modes(kind, 10, 2, training.window).items()}
    plain = {
        "TracIn through Adam": hw.TracIn(),
        "Grad-Dot": hw.GradDot(),
        "Grad-Cos": hw.GradCos(),
        "Influence, damping 1/(ηT)": hw.Influence(),
        SOURCE: hw.Source(),
        "Source, one segment": hw.Source(segments=1),
        "pixels, dot": hw.floors.inputs("dot"),
        "pixels, cosine": hw.floors.inputs("cosine"),
        "pixels, distance": hw.floors.inputs("l2"),
        "features of the last layer, cosine": hw.Representations(),
        "gradient norm": hw.floors.gradient_norm(),
        "loss": hw.floors.loss(),
        RANDOM: hw.floors.random(0),
    }
    removed = ("Grad-Cos", SOURCE, "pixels, cosine", "gradient norm")
    found |= {name: Method(_always(method), removed=name in removed) for name, method in plain.items()}
    several = {f"ReTrac, {SHARED}": hw.DiffusionReTrac(10, 2), SOURCE: hw.Source(), "Grad-Cos": hw.GradCos()}
    found["Journey-TRAK, default λ"] = Method(_always(hw.JourneyTrak(timesteps=20)), journey=True)
    return found | {f"{name}, several models": Method(_always(method), ensemble=True) for name, method in several.items()}


def sweeps() -> dict[str, dict[float, Method]]:
    """Methods with a value that is chosen aside, by value."""
    kernels = {name: partial(hw.DTrak, output=output) for name, output in OUTPUTS.items()} | {"DAS, chosen λ": hw.DAS}
    swept = {name: {r: Method(_always(make(timesteps=10, draws=2, regularisation=r)), removed=True) for r in RIDGES} for name, make in kernels.items()}
    return {INFLUENCE: {f: Method(partial(damped, f), removed=True) for f in FACTORS}, **swept}


def damped(factor: float, run: hw.Run) -> hw.Influence:
    """Influence with a damping in units of 1 / (eta T)."""
    return hw.Influence(damping=factor / max(run.rates(0, run.checkpoints[-1]).values()))


def _always(method: Any) -> Callable[[hw.Run], Any]:
    return lambda run: method
