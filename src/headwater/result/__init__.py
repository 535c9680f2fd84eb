"""What an answer is: values with their meaning, their error, and what they were made from."""

from headwater.result.features import FeatureScores
from headwater.result.files import load
from headwater.result.interactions import InteractionScores
from headwater.result.slices import Slices
from headwater.result.summary import Accumulator, Summary
from headwater.result.training import Ranking, TrainingScores

__all__ = ["Accumulator", "FeatureScores", "InteractionScores", "Ranking", "Slices", "Summary", "TrainingScores", "load"]
