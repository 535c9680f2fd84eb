"""What users give as numbers, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, anything that numpy can read as a tensor; memory that must not be written to (a frame's) is copied.

    Raises TypeError or ValueError for what holds no numbers.
    """
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    return torch.as_tensor(array if array.flags.writeable else array.copy())
