"""What happened in training: recorded as it happens, or rebuilt from checkpoints and a known schedule."""

from headwater.training.experiment import Experiment, settled
from headwater.training.optimizers import Group, OptimizerRecord
from headwater.training.recorder import Recorder
from headwater.training.run import Run, Stage
from headwater.training.segments import Segment, segments

__all__ = ["Experiment", "Group", "OptimizerRecord", "Recorder", "Run", "Segment", "Stage", "segments", "settled"]
