"""Why a replay left the record: each suspect is put to the test on the steps that can be to blame."""

from __future__ import annotations

from headwater.errors import ReplayMismatch
from headwater.training.replay.player import Player
from headwater.training.replay.script import Script
from headwater.training.replay.state import State
from headwater.training.replay.witness import Departure


def mismatch(player: Player, script: Script, departed: Departure, before: State) -> ReplayMismatch:
    """The error that names the step and what escaped."""
    return ReplayMismatch(f"{departed}")
