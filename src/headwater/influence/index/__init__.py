"""The eigenbasis index: training gradients kept once, questions answered without the training data."""

from headwater.influence.index.build import index
from headwater.influence.index.reading import Index

__all__ = ["Index", "index"]
