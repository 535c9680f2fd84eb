"""Ensembles: one method over several models, with a standard error from how much they differ."""

from headwater.influence.ensembles.dropout import DropoutEnsemble
from headwater.influence.ensembles.ensemble import Ensemble
from headwater.influence.ensembles.lora import LoraEnsemble
from headwater.influence.ensembles.members import Member, Variants

__all__ = ["DropoutEnsemble", "Ensemble", "LoraEnsemble", "Member", "Variants"]
