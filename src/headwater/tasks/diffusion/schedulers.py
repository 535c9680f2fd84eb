"""What a scheduler of diffusers says about the noise process that its network was trained with.

A sampler's own scale is not always the network's: EulerDiscrete adds noise as ``x + sigma eps`` and rescales the input before the network
sees it. The network was trained on ``sqrt(abar) x + sqrt(1 - abar) eps`` all the same, so the tables are read off ``alphas_cumprod``.
"""

from __future__ import annotations

from typing import Any

import torch

from headwater.errors import TaskError
from headwater.tasks.diffusion.processes import Process

_NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}


def process_of_scheduler(scheduler: Any) -> Process:
    """The process of a scheduler of diffusers. Raises TaskError for what is none, and for those of another scale (EDM)."""
    config, name = getattr(scheduler, "config", None), type(scheduler).__name__
    if config is None:
        raise TaskError(f"a {name} where a scheduler belongs", "a scheduler of diffusers, or hw.tasks.cosine(), linear(), flow()", "pipe.scheduler, say")
    if getattr(config, "prediction_type", None) not in (None, *_NAMES):
        raise TaskError(
            f"{name} with prediction_type={config.prediction_type!r}", f"one of {sorted(_NAMES)}", "write the process yourself: headwater.tasks.diffusion.Process"
        )
    prediction = _NAMES.get(getattr(config, "prediction_type", None) or "")
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is not None:
        kept = torch.as_tensor(kept, dtype=torch.float64).cpu()
        return Process("diffusion", kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept), dtype=torch.float64), prediction)
    if name.startswith("FlowMatch"):
        order = torch.argsort(torch.as_tensor(scheduler.sigmas[: len(scheduler.timesteps)]))  # they come descending
        sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float64).cpu()[order]
        return Process("flow", 1 - sigmas, sigmas, torch.as_tensor(scheduler.timesteps, dtype=torch.float64).cpu()[order], "flow")
    raise TaskError(
        f"{name}, whose scale Headwater does not know",
        "a scheduler with alphas_cumprod (DDPM, DDIM, Euler, DPM-Solver, PNDM), or FlowMatch*",
        "pass DDPMScheduler.from_config(pipe.scheduler.config) if the network was trained so, or a headwater.tasks.diffusion.Process",
    )
