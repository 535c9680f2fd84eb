"""Which training examples is a prediction owed to?"""

from headwater.influence import floors, projections
from headwater.influence.methods import GradCos, GradDot, Influence, Method, Source, TracIn
from headwater.influence.queries import Query
from headwater.influence.refine import Refine
from headwater.influence.shapley import KNNShapley
from headwater.influence.similarity import Representations
from headwater.influence.trace import self_influence, trace

__all__ = [
    "GradCos",
    "GradDot",
    "Influence",
    "KNNShapley",
    "Method",
    "Query",
    "Refine",
    "Representations",
    "Source",
    "TracIn",
    "floors",
    "projections",
    "self_influence",
    "trace",
]
