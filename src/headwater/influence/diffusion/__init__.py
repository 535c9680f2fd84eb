"""Attribution of diffusion and flow-matching models: rows over noise events, and kernels of their output functions."""

from headwater.influence.diffusion.das import DAS
from headwater.influence.diffusion.dtrak import DTrak
from headwater.influence.diffusion.journey import JourneyTrak
from headwater.influence.diffusion.tracin import DiffusionReTrac, DiffusionTracIn

__all__ = ["DAS", "DTrak", "DiffusionReTrac", "DiffusionTracIn", "JourneyTrak"]
