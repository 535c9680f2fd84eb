"""Generating pictures: DDIM with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater.demo.diffusion.experiment import ANY, TASK


@torch.no_grad()
def ddim(model: nn.Module, categories: Tensor, *, seed: int, steps: int, guidance: float) -> Tensor:
    """Pictures (n, 3, 32, 32) from -1 to 1, on the CPU.

    DDIM without added noise (Song, Meng & Ermon 2021, arXiv 2010.02502, Eq. 12 with sigma = 0): from the network's answer follow the clean
    picture and the noise, which are then mixed for the next, less noisy timestep. Guidance (Ho & Salimans 2022, arXiv 2207.12598) answers with
    ``any + guidance * (category - any)``. Clean pictures are cut to -1..1 on the way.

    Args:
        categories: (n,) of the pictures. seed: of the noise that they begin with.
        steps: timesteps visited, evenly spaced from the last to the first.
    """
    process, place = TASK.process, next(model.parameters())
    x = torch.randn(len(categories), 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(place)
    categories = categories.to(place.device)
    visited = torch.linspace(process.steps - 1, 0, steps).round().long().tolist()
    clean = x
    for t, following in zip(visited, [*visited[1:], None], strict=True):
        signal, noise = (table[t].to(x) for table in (process.signal, process.noise))
        time = torch.full((len(x),), t, device=place.device)
        answer = model(x, time, categories)
        if guidance != 1:
            either = model(x, time, torch.full_like(categories, ANY))
            answer = either + guidance * (answer - either)
        clean = process.clean(TASK.prediction, answer, x, signal, noise).clamp(-1, 1)
        if following is not None:
            eps = (x - signal * clean) / noise
            x = process.signal[following].to(x) * clean + process.noise[following].to(x) * eps
    return clean.cpu().contiguous()
