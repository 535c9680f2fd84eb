"""TRAK beside dattri, in one run: time, memory, and how well each foretells what retraining on half of the data does.

    python benchmarks/trak_dattri.py                       about five minutes on one core
    python benchmarks/trak_dattri.py --tiny                in miniature, to see that it works: its figures mean nothing

Times: MLP 784-128-64-10 (109,386 parameters), all 5,000 digits x 500 queries, each contestant in a fresh process on one thread, in
alternation; medians. "again": the same queries at another regularisation, from what was kept. Rows of zeros: training examples, and
queries, whose scores are all exactly 0.

LDS: 2,000 digits, 5 % of the labels flipped, 200 queries, 50 halves x 2 seeds; ours and dattri's against one bank. Regularisation is
chosen on every other subset and reported on those between; "as it comes" is each library's default, reported on the same ones.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from speed import problem
from speed.contestant import run
from speed.tables import installed, machine, spread, table, times
from torch import Tensor, nn

import headwater as hw

TASK = hw.tasks.Classification()
REGULARISATIONS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True)
class Size:
    widths: tuple[int, ...] = (784, 128, 64, 10)
    train: int = 5000
    queries: int = 500
    epochs: int = 10
    dim: int = 512
    judged_train: int = 2000
    judged_queries: int = 200
    subsets: int = 50
    seeds: int = 2
    batch: int = 500


TINY = Size((784, 12, 10), 60, 8, 2, 16, 60, 8, 6, 1, 30)


def contestants(size: Size) -> dict[str, tuple[str, dict[str, Any]]]:
    """By label: the side's function and its arguments."""
    ours = "trak_sides:headwater"
    found = {
        f"Headwater, dim {size.dim}": (ours, {"dim": size.dim}),
        f"Headwater, Rademacher({size.dim})": (ours, {"dim": size.dim, "kind": "Rademacher"}),
        f"Headwater, SparseJL({size.dim})": (ours, {"dim": size.dim, "kind": "SparseJL"}),
        f"Headwater, dim {4 * size.dim}": (ours, {"dim": 4 * size.dim}),
        "Headwater, exact": (ours, {}),
    }
    return found | ({f"dattri, dim {size.dim}": ("trak_sides:dattri", {"dim": size.dim, "batch": size.batch})} if installed("dattri") else {})


def ranks(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over queries of Spearman's correlation."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings(action="ignore"):  # rows of zeros have no correlation
        return float(np.nanmean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]))


def timed(place: Path, size: Size, repeats: int) -> str:
    problem.EPOCHS = size.epochs
    problem.make(place, list(size.widths), size.train, size.queries)
    every, reports = contestants(size), {}
    for _ in range(repeats):
        for label, (what, more) in every.items():
            reports.setdefault(label, []).append(run(what, place, label=label, **more))
    costs = {label: [sum(r["cpu"].values()) for r in found] for label, found in reports.items()}
    peer = next((median(c) for label, c in costs.items() if label.startswith("dattri")), None)
    exact, rows = np.load(place / "scores-Headwater, exact.npy"), []
    for label, found in reports.items():
        scores, again = np.load(place / f"scores-{label}.npy"), [r["again"] for r in found if "again" in r]
        ratio = times(peer / median(costs[label])) if peer and label.startswith("Headwater") else ""
        zeros = f"{int((scores == 0).all(0).sum())} / {int((scores == 0).all(1).sum())}"
        bad = f"{int((~np.isfinite(scores)).sum())}"
        memory = f"{median(r['above'] for r in found):,.0f}"
        rows.append([label, spread(costs[label]), ratio, spread(again) if again else "", memory, zeros, bad, f"{ranks(scores, exact):.3f}"])
    head = ["contestant", "CPU s", "less CPU", "again, CPU s", "peak MB above baseline", "rows of zeros (train / queries)", "not finite"]
    head.append("Spearman with the exact kernel")
    net = "-".join(map(str, size.widths))
    return f"MLP {net}, {size.train:,} training examples x {size.queries} queries, {size.epochs} epochs, float32.\n\n{table(head, rows)}"


def fit(model: nn.Module, train: tuple[Tensor, Tensor], seed: int, recorder: Any = None, *, epochs: int) -> nn.Module:
    """SGD with momentum, a constant rate; the batches of a seed."""
    x, y = train
    order, optimizer = torch.Generator().manual_seed(seed), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if recorder is not None:
        recorder.watch(model, optimizer, steps=epochs * -(-len(y) // 50))
    for _ in range(epochs):
        for ids in torch.randperm(len(y), generator=order).split(50):
            optimizer.zero_grad()
            TASK.loss(model, (x[ids], y[ids])).mean().backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(ids)
    return model


def judged(place: Path, size: Size) -> str:
    images, labels = hw.data.mnist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(11))
    x, y = images.flatten(1)[order], labels[order]
    n, stop = size.judged_train, size.judged_train + size.judged_queries
    given, _ = hw.data.flip_labels(y[:n], fraction=0.05, seed=1)
    build = partial(problem.mlp, list(size.widths))
    experiment = hw.Experiment(build, (x[:n], given), (x[n:stop], y[n:stop]), TASK, partial(fit, epochs=size.epochs), "trak")
    halves = hw.evaluate.halves(n, size.subsets, seed=3)
    bank = hw.evaluate.retrain(experiment, halves, seeds=size.seeds, directory=place / "bank", progress=False)
    place.mkdir(parents=True, exist_ok=True)
    recorded = experiment.record(place / "run", seed=0)
    final = recorded.checkpoints[-1]
    save_file(recorded.weights(final), place / f"weights-{final}.safetensors")
    np.savez(place / "data.npz", x=x[:n].numpy(), y=given.numpy(), qx=x[n:stop].numpy(), qy=y[n:stop].numpy(), widths=np.array(size.widths))
    chosen_on, reported_on = (some_of(bank, range(start, size.subsets, 2)) for start in (0, 1))
    rows = []
    for label, (what, more) in contestants(size).items():
        run(what, place, label="judged", others=REGULARISATIONS, **more)
        found = dict(zip((None, *REGULARISATIONS), np.load(place / "scores-judged.npy"), strict=True))
        best = max(REGULARISATIONS, key=lambda r: lds(found[r], chosen_on).mean)
        plain, tuned = (lds(found[r], reported_on) for r in (None, best))
        rows.append([label, *(f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (plain, tuned)), f"{best:g}"])
    for method in (hw.GradDot(), hw.Influence()):
        one = lds(hw.trace(recorded, experiment.test, method, progress=False).values, reported_on)
        rows.append([f"Headwater, {type(method).__name__}", f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]", "", ""])
    head = ["contestant", "LDS as it comes", "LDS, regularisation chosen", "relative to the trace"]
    return f"{n:,} digits x {size.judged_queries} queries, {size.subsets} halves x {size.seeds} seeds, {size.epochs} epochs.\n\n{table(head, rows)}"


def some_of(bank: Any, subsets: range) -> Any:
    return replace(bank, subsets=bank.subsets.take(np.array(subsets)), values=bank.values[np.array(subsets)])


def lds(scores: np.ndarray, bank: Any) -> Any:
    return hw.evaluate.lds(hw.TrainingScores(np.nan_to_num(scores), None, "scores", "rank only"), bank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="*", default=["times", "lds"], choices=["times", "lds"])
    given = parser.parse_args()
    size = TINY if given.tiny else Size()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="headwater-trak-") as folder:
        if "times" in given.parts:
            print(f"### Time and memory\n\n{timed(Path(folder) / 'times', size, given.repeats)}\n", flush=True)
        if "lds" in given.parts:
            print(f"### Faithfulness\n\n{judged(Path(folder) / 'lds', size)}\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
