"""The eigenbasis index: what it costs, what its answers cost beside the run's own, and what leaving coordinates out does to them.

    python benchmarks/index.py                      three problems: about ten minutes on one core
    python benchmarks/index.py --tiny               the first and the last in miniature, to see that it works
    python benchmarks/index.py mlp cnn transformer  some of them

Everything on one thread, in CPU seconds. The first answer is SOURCE by the run itself, with its curvature, from nothing.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import headwater as hw

Batch = Any


@dataclass(frozen=True)
class Problem:
    """A training to trace. ``dims``: how many numbers of each example to try to keep."""

    title: str
    build: Callable[[], nn.Module]
    train: Batch
    queries: Batch
    task: Any
    steps: int
    batch: int
    rate: float
    dims: tuple[int, ...]
    adam: bool = False


class Transformer(nn.Module):
    """Two layers over characters, each a head of attention and a perceptron."""

    def __init__(self, entries: int, width: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(entries, width), nn.Embedding(length, width)
        self.attend = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.think = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2))
        self.norms, self.out = nn.ModuleList(nn.LayerNorm(width) for _ in range(3)), nn.Linear(width, entries)

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for attend, think, norm in zip(self.attend, self.think, self.norms, strict=False):
            q, k, v = attend(norm(h)).chunk(3, -1)
            h = h + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + think(h)
        return self.out(self.norms[2](h))


def digits(train: int, queries: int) -> tuple[Batch, Batch]:
    images, labels = hw.data.mnist()
    moved = images.roll(1, -1)
    asked = torch.linspace(0, len(images) - 1, queries).long()
    return (images[:train], labels[:train]), (moved[asked], labels[asked])


def mlp(tiny: bool) -> Problem:
    (x, y), (q, r) = digits(100 if tiny else 5000, 10 if tiny else 100)
    wide = 16 if tiny else 128

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, wide), nn.ReLU(), nn.Linear(wide, 64), nn.ReLU(), nn.Linear(64, 10))

    title = f"An MLP of {sum(p.numel() for p in build().parameters()):,} parameters"
    return Problem(title, build, (x, y), (q, r), hw.tasks.Classification(), 12 if tiny else 780, 64, 0.03, ())


def cnn(tiny: bool) -> Problem:
    (x, y), (q, r) = digits(40 if tiny else 2000, 5 if tiny else 100)
    x, q = (nn.functional.avg_pool2d(t, 2) for t in (x, q))

    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*conv, nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))

    return Problem("A CNN of 14,378 parameters", build, (x, y), (q, r), hw.tasks.Classification(), 12 if tiny else 400, 50, 0.03, (4000,) if tiny else (4000, 2000, 1000))


def transformer(tiny: bool) -> Problem:
    text = re.sub(r"\s+", " ", hw.data.austen()["Persuasion"])
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text[:200_000]]).unfold(0, 48, 97)
    train, asked, width = (ids[:30], ids[30:35], 16) if tiny else (ids[:1000], ids[1000:1050], 32)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Transformer(len(letters), width, 48)

    size = sum(p.numel() for p in build().parameters())
    dims = (2 * size // 3,) if tiny else (2 * size // 3, size // 3, size // 6)
    title, steps = f"A transformer of {size:,} parameters, 48 characters at a time", 12 if tiny else 400
    return Problem(title, build, train, asked, hw.tasks.Language(), steps, 20, 3e-3, dims, adam=True)


def record(problem: Problem, place: Path) -> hw.Run:
    model = problem.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=problem.rate) if problem.adam else torch.optim.SGD(model.parameters(), lr=problem.rate, momentum=0.9)
    recorder = hw.Recorder(place, model, optimizer, task=problem.task, train=problem.train, steps=problem.steps, checkpoints=6)
    examples, draw = hw.tasks.Examples(problem.train), torch.Generator().manual_seed(0)
    for _ in range(problem.steps):
        chosen = torch.randint(len(examples), (problem.batch,), generator=draw)
        optimizer.zero_grad()
        problem.task.loss(model, examples.batch(chosen.numpy())).mean().backward()
        optimizer.step()
        recorder.step(chosen)
    return recorder.finish()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Spearman, the mean over queries and the lowest of any."""
    found = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    return float(np.mean(found)), float(np.min(found))


def measure(problem: Problem, place: Path) -> None:
    """Print one problem's tables."""
    run, again = record(problem, place / "run"), record(problem, place / "again")
    trace = {"progress": False}
    first, source = timed(lambda: hw.trace(run, problem.queries, hw.Source(), **trace))
    built, index = timed(lambda: hw.index(again, **trace))
    damping = 1 / max(run.rates(0, run.checkpoints[-1]).values())
    methods = [hw.GradDot(), hw.GradCos(), *([hw.TracIn()] if len(index.panels) > 4 else []), hw.Influence(), hw.Influence(damping=damping / 100), hw.Source()]
    own = [source if isinstance(m, hw.Source) else hw.trace(run, problem.queries, m, **trace) for m in methods]
    print(f"### {problem.title}; {run.size:,} training examples, {len(source)} queries\n")
    print(f"SOURCE by the run itself, first: {first:.1f} s. The index, built from nothing: {built:.1f} s, {index.bytes / 2**20:,.0f} MB.\n")
    print("| method, from the index | s | of the first | Spearman, mean | lowest |\n|---|---|---|---|---|")
    for method, truth in zip(methods, own, strict=True):
        seconds, found = timed(lambda method=method: hw.trace(index, problem.queries, method, **trace))
        mean, low = agreement(truth.values, found.values)
        print(f"| {truth.method} | {seconds:.2f} | {100 * seconds / first:.1f} % | {mean:.5f} | {low:.5f} |", flush=True)
    settings = [{"dim": dim} for dim in problem.dims] + [{"dtype": "float16"}, {"dtype": "int8"}]
    settings = settings[-1:] if problem.steps < 100 else settings  # in miniature
    print("\n| kept | MB | " + " | ".join(f"{o.method.split('(')[0]}{'' if 'damping' not in o.method else ' ' + o.method.split('=')[1][:-1]}" for o in own) + " |")
    print("|---|---|" + "---|" * len(own))
    for setting in settings:
        kept = hw.index(again, **setting, **trace)
        cells = [agreement(truth.values, hw.trace(kept, problem.queries, m, **trace).values)[0] for m, truth in zip(methods, own, strict=True)]
        print(f"| {', '.join(f'{k}={v}' for k, v in setting.items())} | {kept.bytes / 2**20:,.0f} | " + " | ".join(f"{c:.4f}" for c in cells) + " |", flush=True)
    print()


# ------------------------------------------------------------------------------------------------ which coordinates to leave out


def leaving_out(place: Path, tiny: bool) -> None:
    """One convolution's gradients, kept in few numbers by four rules, for dampings over six decades."""
    from headwater.influence.engine import Engine

    problem = cnn(tiny)
    run = record(problem, place)
    engine = Engine.of(run, None)
    row = hw.Influence(damping=1.0).plan(run).rows[0]
    assert row.curvature is not None
    operator: Any = engine.curvature(row.curvature).operators["3.weight"]  # type: ignore[attr-defined]
    engine.load(row.at[0])
    u, g = (
        operator.rotate(engine.capture.gradients(f, batch)["3.weight"].dense()).flatten(1).double()
        for f, batch in ((problem.task.measure, problem.queries), (problem.task.loss, problem.train))
    )
    spectrum = operator.spectrum.flatten().double().clamp_min(0)
    middle = 1 / max(run.rates(0, run.checkpoints[-1]).values())
    print("### Which numbers of a gradient to keep\n")
    print(f"A convolution of {len(spectrum):,} weights; Spearman with all coordinates, mean over queries. Damping in units of {middle:.2g}.\n")
    print("| kept | damping | largest eigenvalues | leading eigenvectors | hashed, whitened | hashed in bands | half and half |\n|---|---|---|---|---|---|---|")
    for count in (len(spectrum) // 16, len(spectrum) // 5, len(spectrum) * 2 // 5):
        for decade in (1e2, 1.0, 1e-2, 1e-4):
            phi = 1 / (spectrum + decade * middle)
            exact = (u * phi) @ g.mT
            cells = [agreement(exact.numpy(), rule(u * phi, g, spectrum, operator.spectrum.shape[1:], middle, count).numpy())[0] for rule in RULES]
            print(f"| {count} | {decade:g} | " + " | ".join(f"{c:.3f}" for c in cells) + " |", flush=True)
    print()


def largest(u: Tensor, g: Tensor, spectrum: Tensor, shape: tuple[int, int], middle: float, count: int) -> Tensor:
    kept = spectrum.argsort(descending=True)[:count]
    return u[:, kept] @ g[:, kept].mT


def corner(u: Tensor, g: Tensor, spectrum: Tensor, shape: tuple[int, int], middle: float, count: int) -> Tensor:
    """The leading eigenvectors of each side, as many as keep most of the trace."""
    grid = spectrum.reshape(shape)
    outs, ins = grid.sum(1).argsort(descending=True), grid.sum(0).argsort(descending=True)
    corners = [(outs[:k, None] * shape[1] + ins[: max(1, count // k)]).flatten() for k in range(1, min(shape[0], count) + 1)]
    kept = max(corners, key=lambda ids: float(spectrum[ids].sum()))
    return u[:, kept] @ g[:, kept].mT


def hashed(u: Tensor, g: Tensor, ids: Tensor, weight: Tensor, count: int) -> Tensor:
    """Both sides' coordinates ``ids`` added up with signs in ``count`` places, the examples' multiplied with ``weight`` and the queries' divided."""
    draw = torch.Generator().manual_seed(0)
    place, sign = torch.randint(count, (len(ids),), generator=draw), torch.randint(2, (len(ids),), generator=draw).double() * 2 - 1
    parts = [v.new_zeros(len(v), count).index_add_(1, place, v[:, ids] * sign * w) for v, w in ((u, 1 / weight), (g, weight))]
    return parts[0] @ parts[1].mT


def whitened(u: Tensor, g: Tensor, spectrum: Tensor, shape: tuple[int, int], middle: float, count: int) -> Tensor:
    return hashed(u, g, torch.arange(len(spectrum)), (spectrum + middle).rsqrt(), count)


def banded(u: Tensor, g: Tensor, spectrum: Tensor, shape: tuple[int, int], middle: float, count: int) -> Tensor:
    """Eigenvalues within a factor of 4 share a band; a band gets places by its part of the effective dimension."""
    share, total = spectrum / (spectrum + middle), torch.zeros(len(u), len(g), dtype=u.dtype)
    band = (spectrum.clamp_min(1e-9 * float(spectrum.max())).log() / np.log(4)).floor()
    for b in band.unique():
        ids = (band == b).nonzero().flatten()
        places = max(1, round(count * float(share[ids].sum() / share.sum())))
        total += u[:, ids] @ g[:, ids].mT if places >= len(ids) else hashed(u, g, ids, torch.ones(len(ids), dtype=u.dtype), places)
    return total


def halved(u: Tensor, g: Tensor, spectrum: Tensor, shape: tuple[int, int], middle: float, count: int) -> Tensor:
    rest = spectrum.argsort(descending=True)[count // 2 :]
    return largest(u, g, spectrum, shape, middle, count // 2) + hashed(u, g, rest, (spectrum[rest] + middle).rsqrt(), count - count // 2)


RULES = (largest, corner, whitened, banded, halved)
PROBLEMS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join([*PROBLEMS, "rules"]))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="not used: CPU seconds of one process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts or (["mlp", "rules"] if given.tiny else [*PROBLEMS, "rules"]):
            if part == "rules":
                leaving_out(Path(folder) / "rules", given.tiny)
            else:
                measure(PROBLEMS[part](given.tiny), Path(folder) / part)


if __name__ == "__main__":
    main()
