"""Series of a smart watch: six motion sensors, four activities."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from torch import Tensor

__all__ = ["MOTIONS", "MOTION_SENSORS", "motions"]

MOTIONS = ("standing", "walking", "running", "badminton")
"""What the labels of ``motions()`` stand for."""

MOTION_SENSORS = ("accelerometer x", "accelerometer y", "accelerometer z", "gyroscope x", "gyroscope y", "gyroscope z")
"""The axis of sensors of ``motions()``."""


def motions() -> tuple[Tensor, Tensor]:
    """80 recordings of ten seconds from a smart watch, 20 of each of four activities, in a fixed shuffled order.

    Four people recorded each activity five times; the files do not say who recorded what, so recordings of one person fall on both sides
    of any split, and accuracy on new people is not measured by it.

    Returns:
        ``signals (80, 6, 100)`` float32, the sensors of ``MOTION_SENSORS`` at 10 Hz in the watch's own units, not standardised, and
        ``labels (80,)`` int64 into ``MOTIONS``.

    Source: BasicMotions, recorded in a student project at the University of East Anglia and published in the UEA multivariate time series
    classification archive (Bagnall et al. 2018, arXiv 1811.00075), as shipped by the PyPI package sktime 1.2.0.
    Licence: the package is BSD-3; the archive's file names no licence of its own.

    >>> signals, labels = motions()
    >>> signals.shape, [MOTIONS[k] for k in labels[:3]]
    (torch.Size([80, 6, 100]), ['running', 'standing', 'walking'])
    """
    with resources.as_file(resources.files("headwater.data") / "motions.npz") as path, np.load(path, allow_pickle=False) as stored:
        signals, labels = stored["signals"], stored["labels"]
    order = np.argsort(np.random.PCG64([0, 0]).random_raw(len(labels)), kind="stable")  # the file is sorted by class
    return torch.from_numpy(signals[order]), torch.from_numpy(labels[order]).to(torch.int64)
