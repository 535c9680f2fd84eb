"""What a scheduler of diffusers says about the noise process that its network was trained with.

A sampler's own scale is not always the network's: EulerDiscrete adds noise as ``x + sigma eps`` and rescales the input before the network
sees it. The network was trained on ``sqrt(abar) x + sqrt(1 - abar) eps`` all the same, so the tables are read off ``alphas_cumprod``. And a
pipeline that has sampled leaves its own few timesteps in the scheduler: the tables of training are made again from the config.
"""

from __future__ import annotations

from typing import Any

import torch

from headwater.errors import TaskError
from headwater.tasks.diffusion.processes import FLOW, Process, flow, from_kept

_NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
_OWN = "write the process yourself: headwater.tasks.diffusion.Process(kind, signal, noise, time, prediction)"


def process_of_scheduler(scheduler: Any) -> Process:
    """The process of a scheduler of diffusers. Raises TaskError for what is none, for those of another scale (EDM, consistency models, ...)
    and for configs that contradict themselves."""
    config, name = getattr(scheduler, "config", None), type(scheduler).__name__
    if isinstance(scheduler, type) or config is None or not hasattr(config, "get"):
        what = scheduler.__name__ if isinstance(scheduler, type) else name
        mend = f"construct it: {what}(...)" if isinstance(scheduler, type) else "pipe.scheduler, say"
        raise TaskError(f"{what} where a scheduler belongs", "a scheduler of diffusers, or hw.tasks.cosine(), linear(), flow()", mend)
    prediction = _prediction(config, name)
    if name.startswith("FlowMatch"):
        return _matched(scheduler, config, name)
    if config.get("use_flow_sigmas"):
        return _flowing(config, name, prediction)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise TaskError(
            f"{name}, whose scale Headwater does not know",
            "a scheduler with alphas_cumprod (DDPM, DDIM, PNDM, Euler, LMS, Heun, DPM-Solver, UniPC, ...), or FlowMatch*",
            f"pass DDPMScheduler.from_config(pipe.scheduler.config) if the network was trained so; otherwise {_OWN}",
        )
    return _kept(scheduler, config, name, prediction)


def _prediction(config: Any, name: str) -> str | None:
    declared = config.get("prediction_type")
    if declared not in (None, *_NAMES):
        raise TaskError(f"{name} with prediction_type={declared!r}", f"one of {sorted(_NAMES)}", _OWN)
    found = _NAMES.get(declared or "")
    if (found == "flow") != bool(config.get("use_flow_sigmas")) and declared is not None:
        raise TaskError(
            f"{name} with prediction_type={declared!r} and use_flow_sigmas={bool(config.get('use_flow_sigmas'))}",
            "'flow_prediction' together with use_flow_sigmas=True, and neither without the other",
            "pass the scheduler that the network was trained with",
        )
    return found


def _kept(scheduler: Any, config: Any, name: str, prediction: str | None) -> Process:
    """Of the DDPM family: abar as the scheduler holds it."""
    kept = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64).detach().cpu().clone()
    steps = config.get("num_train_timesteps")
    if steps is not None and len(kept) != steps:
        raise TaskError(
            f"{name} with num_train_timesteps={steps} and a schedule of {len(kept)} timesteps",
            "as many variances as timesteps",
            f"give trained_betas= of length {steps}, or num_train_timesteps={len(kept)}",
        )
    if config.get("rescale_betas_zero_snr"):
        kept[-1] = 0.0  # samplers that divide by it put 2^-24 here; training has noise alone
    return from_kept(kept, prediction)


def _matched(scheduler: Any, config: Any, name: str) -> Process:
    """Flow matching: the tables that a new scheduler of this config has, turned to rise (they come descending)."""
    if config.get("invert_sigmas"):
        raise TaskError(f"{name} with invert_sigmas=True, whose networks are told the time backwards", "levels that rise with the noise", _OWN)
    fresh = type(scheduler).from_config(config)
    sigmas, times = (torch.as_tensor(table, dtype=torch.float64).cpu().flip(0) for table in (fresh.sigmas, fresh.timesteps))
    return Process(FLOW, 1 - sigmas, sigmas, times, "flow")


def _flowing(config: Any, name: str, prediction: str | None) -> Process:
    """A solver that samples a flow-matching network: its shift is in the config."""
    if config.get("use_dynamic_shifting"):
        return flow(config.get("num_train_timesteps"))
    return flow(config.get("num_train_timesteps"), shift=config.get("flow_shift") or 1.0)
