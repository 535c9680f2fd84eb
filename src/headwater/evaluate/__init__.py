"""How far can it be trusted? Retraining on subsets, and what scores are worth against it.

>>> from headwater import evaluate
>>> subsets = evaluate.halves(1000, 50, seed=0)

``retrain`` makes the truth (a :class:`Bank`); ``lds``, ``paired`` and ``slope`` hold scores against it; ``detection_curve`` asks whether
suspicious examples are indeed mislabelled.
"""

from headwater.evaluate.agreement import LDS, Paired, SlopeResult, lds, paired, slope
from headwater.evaluate.bank import Bank
from headwater.evaluate.mislabels import Detection, auroc, detection_curve
from headwater.evaluate.retrain import retrain
from headwater.evaluate.subsets import Subsets, halves, leave_out, removing

__all__ = [
    "LDS",
    "Bank",
    "Detection",
    "Paired",
    "SlopeResult",
    "Subsets",
    "auroc",
    "detection_curve",
    "halves",
    "lds",
    "leave_out",
    "paired",
    "removing",
    "retrain",
    "slope",
]
