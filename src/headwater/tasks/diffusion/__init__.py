"""Diffusion and flow-matching models: noise processes, noise events, and the task that is made of them."""

from headwater.tasks.diffusion.densities import CosMap, LogitNormal, Mode
from headwater.tasks.diffusion.encoding import embeddings, latents
from headwater.tasks.diffusion.events import Draw, Drawn, Events, Grid, Listed, Noised
from headwater.tasks.diffusion.loop import Noisy
from headwater.tasks.diffusion.losses import MinSNR
from headwater.tasks.diffusion.outputs import Output
from headwater.tasks.diffusion.processes import Process, cosine, flow, from_betas, linear
from headwater.tasks.diffusion.task import Diffusion
from headwater.tasks.diffusion.trajectory import Trajectory, Travelled, watched

__all__ = [
    "CosMap", "Diffusion", "Draw", "Drawn", "Events", "Grid", "Listed", "LogitNormal", "MinSNR", "Mode", "Noised", "Noisy", "Output", "Process",
    "Trajectory", "Travelled", "cosine", "embeddings", "flow", "from_betas", "latents", "linear", "watched",
]  # fmt: skip
