"""Exact unrolling: the memory of its schedules, what a query costs, and how well it foretells removal.

    python benchmarks/unrolled.py            # everything, about four minutes on one quiet core
    python benchmarks/unrolled.py memory | cost | fidelity
    python benchmarks/unrolled.py --tiny     # in miniature, to see that it works: its figures mean nothing

Prints (a) states kept and steps replayed by each schedule, held against a real walk, (b) processor time of 1, 4, 16 and 64 queries in units
of one plain training of the same loop, (c) LDS and slope with 1 % of the examples removed: along the same batches (weights 0 through the
replay), and by really training again with the same seed on the rest.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwater as hw
from headwater.influence.unrolled.schedule import NAMES, Schedule, walk

TASK = hw.tasks.Classification()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def fast_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-3, weight_decay=1e-2)


# ---- (a) memory


def memory(largest: int = 12) -> None:
    """The law, and a walk that counts."""
    print("\n(a) states kept and steps replayed, of T steps walked backwards")
    print(f"{'T':>6}" + "".join(f"{name:>24}" for name in NAMES))
    for power in range(6, largest + 1):
        length = 2**power
        cells = []
        for name in NAMES:
            schedule = Schedule.named(name, length)
            most, replays = counted(schedule)
            assert most <= schedule.states and replays == schedule.replays
            cells.append(f"{most:>8,} states {replays / length:>5.2f} T")
        print(f"{length:>6,}" + "".join(f"{cell:>24}" for cell in cells))
    print("        law: T - 1            sqrt(2 T)               about log2(T) / 2")


def counted(schedule: Schedule) -> tuple[int, int]:
    """(most states held at a time, steps replayed) of a walk through numbers."""
    held: dict[int, int] = {}
    most, replays = 0, 0

    def advance(state: int, at: int, to: int) -> int:
        nonlocal replays
        replays += to - at
        return to

    def keep(step: int, state: int) -> None:
        nonlocal most
        held[step] = state
        most = max(most, len(held))

    walk(schedule, 0, advance, lambda state, k: None, keep, lambda step: held.__delitem__(step), held.__getitem__)
    return most, replays


# ---- (b) cost


def blobs(count: int, width: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g)
    return x, (x[:, :10] + noise * torch.randn(count, 10, generator=g)).argmax(1)


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
        return nn.Sequential(*layers[:-1])

    return build


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int, batch: int, recorder: hw.Recorder | None = None) -> None:
    """The loop that is recorded, and that costs are compared with."""
    if recorder is not None:
        recorder.watch(model, optimizer, steps=steps)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randperm(len(data[1]), generator=g)[:batch]
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][ids]), data[1][ids]).backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(ids)


def timed(work: Callable[[], object]) -> float:
    """Processor seconds: this machine's other work does not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


NETWORKS = (((64, 64, 10), 64, sgd), ((256, 256, 10), 128, sgd), ((784, 256, 128, 10), 256, sgd), ((784, 256, 128, 10), 256, adamw))


def cost(steps: int = 100, networks: tuple[Any, ...] = NETWORKS) -> None:
    """Several sizes of network, since starting kernels costs more than small ones do."""
    print(f"\n(b) processor time of exact unrolling ({steps} steps, every state kept), in plain trainings of the same loop")
    print(f"{'network, batch, optimizer':>36} {'training':>9} {'recorded':>9}" + "".join(f"{f'{q} queries':>12}" for q in (1, 4, 16, 64)) + f"{'64, of one by one':>19}")
    for widths, batch, optimizer in networks:
        data, build = blobs(2000, widths[0], 0), mlp(*widths)

        def plain(recorder: hw.Recorder | None = None, data: tuple[Tensor, Tensor] = data, build=build, optimizer=optimizer, batch: int = batch) -> None:
            model = build()
            train(model, optimizer(model), data, steps, batch, recorder)

        with tempfile.TemporaryDirectory() as place:
            one = min(timed(plain) for _ in range(3))
            recorder = hw.Recorder(Path(place) / "run", task=TASK, train=data)
            recorded = timed(lambda: plain(recorder))  # noqa: B023
            run = recorder.finish()
            times = []
            for queries in (1, 4, 16, 64):
                asked = tuple(t[:queries] for t in data)
                times.append(timed(lambda: hw.trace(run, asked, hw.Unrolled(schedule="every"), memory=2**33, progress=False)))  # noqa: B023
        name = f"{'-'.join(map(str, widths))}, {batch}, {optimizer.__name__}"
        print(f"{name:>36} {one:>8.2f}s {recorded / one:>8.2f}x" + "".join(f"{t / one:>11.2f}x" for t in times) + f"{times[-1] / (64 * times[0]):>19.2f}")


# ---- (c) fidelity


class Fit:
    """A training whose batches are fixed by its seed: drawn from all examples, of which a subset's batches keep those they hold."""

    def __init__(self, optimizer: Callable[[nn.Module], torch.optim.Optimizer], size: int, steps: int, batch: int) -> None:
        self.optimizer, self.size, self.steps, self.batch = optimizer, size, steps, batch

    def __call__(self, model: nn.Module, data, seed: int, recorder: hw.Recorder | None = None) -> nn.Module:
        examples = hw.tasks.Examples(data)
        inputs, targets, numbers = examples.batch(range(len(examples)))
        place = torch.full((self.size,), -1)
        place[numbers] = torch.arange(len(numbers))
        optimizer, g = self.optimizer(model), torch.Generator().manual_seed(seed)
        if recorder is not None:
            recorder.watch(model, optimizer, steps=self.steps)
        for _ in range(self.steps):
            ids = place[torch.randperm(self.size, generator=g)[: self.batch]]
            ids = ids[ids >= 0]
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs[ids]), targets[ids], reduction="sum") / self.batch).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(ids)
        return model


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def measure(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return TASK.measure(model, batch[:2])


def build_tanh() -> nn.Module:
    return mlp(20, 32, 10)()


def build_gelu() -> nn.Module:
    return mlp(20, 32, 10, activation=nn.GELU)()


TRAININGS = (
    ("tanh, SGD momentum", build_tanh, sgd, 160),
    ("GELU, SGD momentum", build_gelu, sgd, 160),
    ("tanh, AdamW", build_tanh, adamw, 400),
    ("tanh, long and fast", build_tanh, fast_sgd, 400),  # 50 epochs into the noise: what the smoothness in front of it warns of
)


TINY = tuple((name, build, optimizer, 8) for name, build, optimizer, _ in TRAININGS[:1])


def fidelity(size: int = 400, batch: int = 50, subsets: int = 40, trainings: tuple[Any, ...] = TRAININGS) -> None:
    """1 % removed, seed and order fixed; the last row is a training that is not smooth."""
    print(f"\n(c) 1 % of {size} examples removed at a fixed seed and order ({subsets} subsets, 20 queries); bars: LDS .9, slope .8 to 1.3")
    print(f"{'network, optimizer':>22} {'metasmooth':>11} {'replayed LDS':>28} {'slope':>7} {'retrained LDS':>28} {'slope':>7}")
    everything, asked = blobs(size, 20, 0), blobs(20, 20, 1)
    train_set = (*everything, torch.arange(size))
    test_set = (*asked, torch.arange(20))
    removed = hw.evaluate.leave_out(size, subsets, 0.01, seed=0)
    for name, build, optimizer, steps in trainings:
        task = hw.tasks.Task(loss, measure)
        experiment = hw.Experiment(build, train_set, test_set, task, Fit(optimizer, size, steps, batch), name)
        with tempfile.TemporaryDirectory() as place:
            run = experiment.record(Path(place) / "run", seed=0)
            scores = hw.trace(run, test_set, hw.Unrolled(), progress=False)
            assert scores.provenance["replay"]["bit_for_bit"] or scores.provenance["replay"]["weights_apart"] < 1e-4
            smooth = hw.evaluate.metasmoothness(run, progress=False).mean
            banks = [hw.evaluate.replayed(run, removed, test_set, progress=False)]
            banks.append(hw.evaluate.retrain(experiment, removed, seeds=1, directory=Path(place) / "bank", workers=1, progress=False))
        cells = []
        for bank in banks:
            lds, slope = hw.evaluate.lds(scores, bank, bootstrap=300), hw.evaluate.slope(scores, bank, bootstrap=300)
            cells.append(f"{lds.mean:>10.3f} [{lds.low:.3f}, {lds.high:.3f}] {slope.slope:>7.2f}")
        print(f"{name:>22} {smooth:>11.3f} {cells[0]:>36} {cells[1]:>36}")


def main() -> None:
    parts = {"memory": memory, "cost": cost, "fidelity": fidelity}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(parts))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="not used: processor seconds of one process")
    given = parser.parse_args()
    unknown = [name for name in given.parts if name not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(parts)}")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, numpy {np.__version__}\n\n```")
    small = {"memory": {"largest": 7}, "cost": {"steps": 3, "networks": NETWORKS[:1]}, "fidelity": {"trainings": TINY, "subsets": 4}}
    for name in given.parts or parts:
        parts[name](**(small[name] if given.tiny else {}))
    print("```")


if __name__ == "__main__":
    main()
