"""How close Integrated Gradients of an ImageNet-sized network comes to the bare forward and backward passes that it needs.

    python benchmarks/gpu_resnet.py                  a network of ResNet-50's shape, batch 32 of 3 x 224 x 224, 64 points, on the GPU if there is one
    python benchmarks/gpu_resnet.py --tiny           the same in miniature, to see that it works: its times mean nothing
    python benchmarks/gpu_resnet.py --dtype bfloat16

The bare passes are the same points in the same chunks with nothing else done: ``autograd.grad(model(point)[target].sum(), point)``. Weights are random:
time does not depend on them. Also printed: peak memory at 16 and at 64 points (it should not grow), and captum where it is installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import headwater as hw


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385, figure 5)."""

    def __init__(self, inside: int, narrow: int, stride: int) -> None:
        super().__init__()
        wide = 4 * narrow
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)),
            *(nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)),
            *(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide)),
        )
        same = stride == 1 and inside == wide
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def network(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Sequential:
    """Of ResNet-50's shape by default: 25.6 million parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inside = width
    for k, count in enumerate(blocks):
        for i in range(count):
            layers.append(Bottleneck(inside, width << k, 2 if k and i == 0 else 1))
            inside = 4 * (width << k)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes)).eval()


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of a few runs, the first of which is not counted."""
    least = float("inf")
    for k in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start) if k else least
    return least


def peak(work: Callable[[], object], device: torch.device) -> str:
    """Peak memory of the device during ``work``."""
    if device.type != "cuda":
        return "not measured on a CPU"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=None, help="path points at once; default: Headwater's choice")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype)
    model = (network((1, 1), 8, 10) if given.tiny else network()).to(device, dtype)
    side, batch, points = (32, 4, 8) if given.tiny else (224, given.batch, given.points)
    x = torch.rand(batch, 3, side, side, device=device).to(dtype)
    labels = torch.arange(batch, device=device) % (10 if given.tiny else 1000)

    def ours(n: int) -> hw.FeatureScores:
        return hw.explain(model, x, labels, rule=hw.quadrature.gauss_legendre(n), batch_size=given.chunk, progress=False)

    chunk = int(ours(2).provenance["chunk"])

    def bare() -> None:
        whole = x.repeat(points, 1, 1, 1)
        for part, label in zip(whole.split(chunk), labels.repeat(points).split(chunk), strict=True):
            point = part.detach().requires_grad_()
            torch.autograd.grad(model(point).gather(1, label[:, None]).sum(), point)

    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}: {parameters / 1e6:.1f} M parameters, {batch} x 3 x {side} x {side}, {points} points, {given.dtype}, chunks of {chunk}")
    floor, spent = seconds(bare, device), seconds(lambda: ours(points), device)
    print(f"bare forward and backward passes: {floor:.3f} s    hw.explain: {spent:.3f} s    throughput: {floor / spent:.0%} of the bare passes")
    print(f"peak memory at {points // 4} points: {peak(lambda: ours(points // 4), device)}, at {points}: {peak(lambda: ours(points), device)}")
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        return
    peer = IntegratedGradients(model)
    taken = seconds(lambda: peer.attribute(x, target=labels, n_steps=points, internal_batch_size=max(chunk, batch)), device)
    print(f"captum, internal_batch_size {max(chunk, batch)}: {taken:.3f} s, {taken / spent:.2f} times hw.explain's")


if __name__ == "__main__":
    main()
