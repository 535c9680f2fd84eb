"""Reading numbers out of whatever holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def array(held: Any) -> np.ndarray:
    """A numpy array from TrainingScores (anything with ``values``), a tensor on any device and of any float type, an array or a list."""
    if not isinstance(held, Tensor | np.ndarray) and hasattr(held, "values") and not callable(held.values):
        held = held.values
    if isinstance(held, Tensor):
        held = held.detach().cpu()
        return (held.double() if held.is_floating_point() else held).numpy()
    return np.asarray(held)
