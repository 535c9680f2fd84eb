"""Ensembles: one method over several models, with a standard error from how much they differ."""

from headwater.influence.ensembles.checkpoints import CheckpointEnsemble
from headwater.influence.ensembles.dropout import DropoutEnsemble
from headwater.influence.ensembles.ensemble import Ensemble
from headwater.influence.ensembles.lora import LoraEnsemble
from headwater.influence.ensembles.members import Member, Variants

__all__ = ["CheckpointEnsemble", "DropoutEnsemble", "Ensemble", "LoraEnsemble", "Member", "Variants"]
