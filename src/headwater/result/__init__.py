"""What an answer is: values with their meaning, their error, and what they were made from."""

from headwater.result.features import FeatureScores
from headwater.result.files import load
from headwater.result.training import Ranking, TrainingScores

__all__ = ["FeatureScores", "Ranking", "TrainingScores", "load"]
