"""Which parts of the input: paths, quadrature, baselines, and an integrator for every kind of model."""

from headwater.features import baselines, paths, quadrature, regions, targets
from headwater.features.smoothing import Smooth

__all__ = ["Smooth", "baselines", "paths", "quadrature", "regions", "targets"]
