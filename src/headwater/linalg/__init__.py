"""Linear algebra of curvature: symmetric matrices known by what they do to a spectrum. Knows torch and the errors, nothing else."""

from headwater.linalg.operators import Apply, Dense, Diagonal, Flow, Grid, Kronecker, Operator, Response, ScaledFlow, Split, Turned, eigh

__all__ = ["Apply", "Dense", "Diagonal", "Flow", "Grid", "Kronecker", "Operator", "Response", "ScaledFlow", "Split", "Turned", "eigh"]
