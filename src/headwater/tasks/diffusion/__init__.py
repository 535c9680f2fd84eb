"""Diffusion and flow-matching models: noise processes, noise events, and the task that is made of them."""

from headwater.tasks.diffusion.events import Draw, Drawn, Events, Grid, Listed, Noised
from headwater.tasks.diffusion.processes import Process, cosine, flow, from_betas, linear
from headwater.tasks.diffusion.task import Diffusion, Output

__all__ = ["Diffusion", "Draw", "Drawn", "Events", "Grid", "Listed", "Noised", "Output", "Process", "cosine", "flow", "from_betas", "linear"]
