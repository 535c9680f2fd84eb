"""Exact unrolled differentiation through a recorded training."""

from headwater.influence.unrolled import weigh
from headwater.influence.unrolled.method import Unrolled

__all__ = ["Unrolled", "weigh"]
