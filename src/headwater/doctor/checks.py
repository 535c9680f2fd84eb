"""The table of checks, and the loop that makes findings of them."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch

from headwater.doctor import curvature, explaining, gradients, regression, resume
from headwater.training import settled


class Allowed(NamedTuple):
    """What a measured figure may be, both ends included."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low == -np.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == np.inf else f"{self.low:g} to {self.high:g}"


def at_most(value: float) -> Allowed:
    return Allowed(-np.inf, value)


def at_least(value: float) -> Allowed:
    return Allowed(value, np.inf)


@dataclass(frozen=True)
class Check:
    """``measure()`` gives a figure; the check passes where it is ``allowed``. ``name`` says what is compared with what."""

    name: str
    measure: Callable[[], float]
    allowed: Allowed


@dataclass(frozen=True)
class Finding:
    """How a check came out. ``trouble``: the error that stopped it, or nothing."""

    name: str
    measured: float
    allowed: Allowed
    seconds: float
    trouble: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is one that is allowed (a NaN never is)."""
        return not self.trouble and self.allowed.low <= self.measured <= self.allowed.high

    def __str__(self) -> str:
        figure = self.trouble or f"{self.measured:.3g}"
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.name:<78} {figure:>10}   ({self.allowed})"


EXACT = at_most(1e-10)  # relative, in float64
CHECKS: tuple[Check, ...] = (
    *(Check(f"gradients of {kind} = autograd's", measure, EXACT) for kind, measure in gradients.CHECKS.items()),
    Check("EK-FAC = dense Gauss-Newton, one linear layer under squared error", curvature.linear_layer, EXACT),
    Check("EK-FAC eigenvalues = E[(Q_g' G Q_a)^2] formed example by example, a network", curvature.eigenvalues, EXACT),
    Check("SOURCE, one segment and endless training = undamped influence", regression.long_training, at_most(1e-6)),
    Check("SOURCE, one segment and hardly any training = Grad-Dot times learning rate", regression.short_training, at_most(1e-6)),
    *(
        check
        for name, case in regression.CASES.items()
        for check in (
            Check(f"SOURCE ranks as exact unrolling does, {name} (Spearman)", case.against_unrolling, at_least(0.98)),
            Check(f"SOURCE ranks as retraining without each example, {name} (Spearman)", case.against_leave_one_out, at_least(0.98)),
            Check(f"retrained change / SOURCE's prediction, {name} (slope)", case.slope, Allowed(0.9, 1.35)),
        )
    ),
    Check("attributions of a linear model = weight times distance from the baseline", explaining.linear, EXACT),
    Check("attributions of a product = half of it for each factor", explaining.product, EXACT),
    Check(f"attributions of a network, tolerance {explaining.TOLERANCE:g} = {explaining.POINTS:,} points", explaining.tolerance, at_most(explaining.TOLERANCE)),
    *([Check("attributions of boosted trees on 0 and 1 = Shapley values over all subsets", explaining.trees, EXACT)] if explaining.with_trees() else []),
    Check("scores after an interruption = scores without one (largest difference)", resume.difference, at_most(0)),
)


def examine(checks: Iterable[Check] = CHECKS) -> Iterator[Finding]:
    """Carry out each check; what a check raises becomes a finding that failed."""
    for check in checks:
        started = time.perf_counter()
        measured, trouble = float("nan"), ""
        try:
            with settled(0):
                measured = check.measure()
        except Exception as error:  # noqa: BLE001  a machine on which a check cannot run is what this is for
            trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield Finding(check.name, measured, check.allowed, time.perf_counter() - started, trouble)


def machine() -> str:
    """Versions, device and threads: what a report of a defect needs to say."""
    others = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "safetensors"))
    others += "" if explaining.with_trees() else "; scikit-learn or numba is missing: trees are not examined"
    versions = f"headwater {metadata.version('headwater')}, torch {torch.__version__}, {others}"  # torch's own word names the build
    device = f"CUDA {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU only"
    return f"Python {platform.python_version()} on {platform.platform()}; {versions}; {device}; {torch.get_num_threads()} threads"
