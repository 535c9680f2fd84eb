"""Markdown tables, the machine, and how far two sets of scores agree."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
from scipy.stats import rankdata


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; every column but the first is set to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the smallest and largest where there are several."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def times(ratio: float) -> str:
    return f"{ratio:,.1f} x" if ratio < 100 else f"{ratio:,.0f} x"


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> str:
    """Date, processor and versions: what the numbers belong to."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    found = {name: installed(name) for name in ("torch", "numpy", "headwater", "kronfluence", "dattri", "captum")}
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    cores = f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores, contestants on one thread"
    return f"{date.today()}; {cores}; Python {platform.python_version()}, {versions}"


def agreement(found: np.ndarray, reference: np.ndarray) -> list[str]:
    """Largest difference relative to the largest score, root mean square difference relative to that of the scores, and the lowest
    Spearman correlation of any query."""
    found, reference = found.astype(float), reference.astype(float)
    largest = np.abs(found - reference).max() / np.abs(reference).max()
    square = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    ranks = [np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in zip(found, reference, strict=True)]
    return [f"{largest:.1e}", f"{square:.1e}", f"{min(ranks):.6f}"]
