"""What a user provides: per-example loss and measure, and the batches they act on."""

from headwater.tasks.batches import Examples, fingerprint
from headwater.tasks.diffusion import CosMap, Diffusion, LogitNormal, MinSNR, Mode, Process, cosine, embeddings, flow, from_betas, latents, linear
from headwater.tasks.diffusion.trajectory import Trajectory, watched
from headwater.tasks.draws import Draws
from headwater.tasks.task import Classification, Language, Measure, Regression, Task, log_odds, mean_tokens

__all__ = [
    "Classification", "CosMap", "Diffusion", "Draws", "Examples", "Language", "LogitNormal", "Measure", "MinSNR", "Mode", "Process", "Regression",
    "Task", "Trajectory", "cosine", "embeddings", "fingerprint", "flow", "from_betas", "latents", "linear", "log_odds", "mean_tokens", "watched",
]  # fmt: skip
