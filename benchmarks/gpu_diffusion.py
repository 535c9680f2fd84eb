"""Attribution of a diffusion model of CIFAR-10's size: images a second, and how that compares with plain training.

    python benchmarks/gpu_diffusion.py                 a UNet of 35.7 million parameters, 50,000 images of 3 x 32 x 32, 10 timesteps, on the GPU if there is one
    python benchmarks/gpu_diffusion.py --images 2000   fewer images: time is proportional to them
    python benchmarks/gpu_diffusion.py --tiny          in miniature, to see that it works: its times mean nothing

Weights and images are random: time does not depend on them. A training image costs ten events (a timestep with one draw of noise each) at one checkpoint;
plain training is the same number of forward and backward passes with Adam's steps, at the batch size that is asked for. Traced are eight
queries. Also printed: peak memory of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusion_networks import UNet, cifar
from gpu_resnet import peak

import headwater as hw

TIMESTEPS, QUERIES = 10, 8


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128, help="of plain training, and rows at once in attribution")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = (UNet(1, (8, 8)) if given.tiny else cifar()).to(device)
    count, batch, side, colours = (24, 8, 4, 1) if given.tiny else (given.images, given.batch, 32, 3)
    task, x = hw.tasks.Diffusion(hw.tasks.linear(), timesteps=TIMESTEPS), torch.rand(count, colours, side, side) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step(ids: torch.Tensor) -> None:
        images = x[ids].to(device)
        noised = task.noised(images, task.draw(len(images)))
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, noised).mean().backward()
        optimizer.step()

    some = min(count, 20 * batch)  # plain training is timed on some batches: every one costs the same
    step(torch.arange(batch))
    trained = seconds(lambda: [step(ids) for ids in torch.arange(some).split(batch)], device) / some
    memory = peak(lambda: step(torch.arange(batch)), device)
    with tempfile.TemporaryDirectory() as folder:
        recorder = hw.Recorder(Path(folder) / "run", model, optimizer, task=task, train=x, checkpoints=1, steps=1)
        step(torch.arange(batch))
        recorder.step(range(batch))
        run, queries = recorder.finish(), torch.rand(QUERIES, colours, side, side) * 2 - 1
        name = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {count:,} x {colours} x {side} x {side}, "
              f"{TIMESTEPS} timesteps, {QUERIES} queries, batches of {batch}")  # fmt: skip
        print(f"plain training: {1 / trained:,.1f} images/s, one event each; peak memory {memory}")
        for method in (hw.DiffusionTracIn(TIMESTEPS), hw.DiffusionReTrac(TIMESTEPS)):
            hw.trace(few(run, batch), queries, method, batch_size=batch, progress=False)  # what is loaded once
            spent = seconds(lambda method=method: hw.trace(run, queries, method, batch_size=batch, progress=False), device)
            memory = peak(lambda method=method: hw.trace(few(run, batch), queries, method, batch_size=batch, progress=False), device)
            ratio = spent / count / TIMESTEPS / trained
            print(f"{type(method).__name__}: {count / spent:,.1f} images/s of {TIMESTEPS} events; an event costs {ratio:.2f} of one in training; peak memory {memory}")


def few(run: hw.Run, count: int) -> hw.Run:
    """The same run on its first images alone."""
    from dataclasses import replace

    stage = run.stages[0]
    data = stage.task.examples(stage.data.data[:count])
    return replace(run, stages=(replace(stage, data=data),), variant=f"first {count}")


if __name__ == "__main__":
    main()
