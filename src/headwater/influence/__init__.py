"""Which training examples is a prediction owed to?"""

from headwater.influence.methods import GradCos, GradDot, Influence, Method, Source, TracIn
from headwater.influence.queries import Query
from headwater.influence.trace import self_influence, trace

__all__ = ["GradCos", "GradDot", "Influence", "Method", "Query", "Source", "TracIn", "self_influence", "trace"]
