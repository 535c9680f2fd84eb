"""Training a recorded run again, step by step: to check that nothing escaped the record, with other weights, or to differentiate it."""

from headwater.training.replay.player import Gradient, Graph, Player, Terms, as_recorded, twice_differentiable
from headwater.training.replay.replay import Replay
from headwater.training.replay.script import Move, Part, Script
from headwater.training.replay.state import State
from headwater.training.replay.updates import Adam, Bundle, Moments, Rule, Sgd

__all__ = [
    "Adam",
    "Bundle",
    "Gradient",
    "Graph",
    "Moments",
    "Move",
    "Part",
    "Player",
    "Replay",
    "Rule",
    "Script",
    "Sgd",
    "State",
    "Terms",
    "as_recorded",
    "twice_differentiable",
]
