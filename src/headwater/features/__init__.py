"""Which parts of the input: paths, quadrature, baselines, and an integrator for every kind of model."""

from headwater.features import baselines

__all__ = ["baselines"]
