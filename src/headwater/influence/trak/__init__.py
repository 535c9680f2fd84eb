"""TRAK: gradients of outputs, projected or not, and the kernel that they make."""

from headwater.influence.trak.method import Trak

__all__ = ["Trak"]
