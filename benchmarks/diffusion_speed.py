"""What attribution of a denoiser costs, in units of the forward and backward passes that it needs; and its memory.

    python benchmarks/diffusion_speed.py                 every network, one thread: some minutes
    python benchmarks/diffusion_speed.py --tiny          in miniature, to see that it works: its figures mean nothing

An *event* is one training image at one timestep with one draw of noise. Its cost is the slope of the time of a whole ``hw.trace`` over the number
of training images, at one checkpoint with eight queries, divided by timesteps x draws: what is spent once (proving gradients, the queries' side) is not in it,
noise and products with the queries are. The bare pass is forward and backward of the mean squared error on ready-made noised images, gradients
of all weights left in ``.grad``, at the batch size that is fastest of two. CPU seconds; each is the least of several in alternation. Peak memory is
that of a whole process each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusion_networks import Network, networks
from speed.tables import table

import headwater as hw
from headwater.influence.engine import Engine

QUERIES, TIMESTEPS = 8, 10
METHODS = {
    "TracIn, expected": hw.DiffusionTracIn(TIMESTEPS),
    "ReTrac, expected": hw.DiffusionReTrac(TIMESTEPS),
    "ReTrac, window of 10": hw.DiffusionReTrac(TIMESTEPS, events="replay", window=10),
}


def recorded(network: Network, count: int, place: Path) -> hw.Run:
    """One checkpoint of a network on ``count`` random images that were all met ten times; it has not learned a thing."""
    torch.manual_seed(0)
    model, task, x = network.build(), hw.tasks.Diffusion(hw.tasks.cosine()), torch.rand(count, *network.shape) * 2 - 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    recorder = hw.Recorder(place, model, optimizer, task=task, train=x, checkpoints=1, steps=10, overwrite=True)
    for _ in range(10):  # a step that changes next to nothing: its gradient is that of two images, its record that of all
        events = task.draw(count)
        few = hw.tasks.Diffusion.noised(task, x[:2], type(events)(events.t[:2], events.seeds[:2]))
        optimizer.zero_grad()
        task.loss(model, few).mean().backward()
        optimizer.step()
        recorder.step(range(count), events=events)
    return recorder.finish()


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def bare(network: Network, rows: int) -> Callable[[], None]:
    """Forward and backward passes over ``rows`` noised images."""
    torch.manual_seed(0)
    model, x, eps, t = network.build(), torch.randn(rows, *network.shape), torch.randn(rows, *network.shape), torch.randint(0, 1000, (rows,))

    def work() -> None:
        model.zero_grad(set_to_none=True)
        out = model(x, t)
        F.mse_loss(getattr(out, "sample", out), eps).backward()

    return work


def measure(name: str, network: Network, events: int, repeats: int) -> list[list[str]]:
    """One row for each method."""
    with tempfile.TemporaryDirectory() as folder:
        counts = [max(2, events // TIMESTEPS // 4), max(4, events // TIMESTEPS)]
        runs = [recorded(network, count, Path(folder) / str(count)) for count in counts]
        queries = torch.rand(QUERIES, *network.shape) * 2 - 1
        batches = sorted({32, min(events, Engine.of(runs[0], None).batch_size)})
        floors = {rows: [] for rows in batches}
        spent: dict[str, list[list[float]]] = {method: [[], []] for method in METHODS}
        for k in range(repeats + 1):  # the first round loads what is needed
            for rows in batches:
                work, times = bare(network, rows), max(1, events // rows)
                work()
                floors[rows] += [seconds(lambda work=work, times=times: [work() for _ in range(times)]) / times / rows] * (k > 0)
            for method, asked in METHODS.items():
                for run, held in zip(runs, spent[method], strict=True):
                    held += [seconds(lambda run=run, asked=asked: hw.trace(run, queries, asked, progress=False))] * (k > 0)
        floor = min(min(held) for held in floors.values())
        size = sum(p.numel() for p in network.build().parameters())
        rows = []
        for method, (few, many) in spent.items():
            each = (min(many) - min(few)) / (counts[1] - counts[0]) / TIMESTEPS
            whole = min(many) / (counts[1] + QUERIES) / TIMESTEPS
            rows.append([name, f"{size:,}", method, f"{1e3 * floor:.3f}", f"{1e3 * each:.3f}", f"{each / floor:.2f}", f"{whole / floor:.2f}"])
        return rows


def peak(network: str, count: int, tiny: bool) -> int:
    """Peak memory in MB of a process that traces ``count`` images, beyond one that has done everything but that."""
    command = [sys.executable, __file__, "--peak", network, str(count), *["--tiny"] * tiny]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def traced(network: Network, count: int) -> int:
    """Bytes that a trace adds to the largest resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        run = recorded(network, count, Path(folder) / "run")
        queries = torch.rand(QUERIES, *network.shape) * 2 - 1
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        hw.trace(run, queries, METHODS["ReTrac, expected"], progress=False)
        return status("VmHWM") - before


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--events", type=int, default=2560, help="events that are traced and timed, of each network")
    parser.add_argument("--only", nargs="+", default=None, metavar="NETWORK", help="the costs of some networks alone")
    parser.add_argument("--peak", nargs=2, metavar=("NETWORK", "IMAGES"), help="print the memory of one trace")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = networks(given.tiny)
    if given.peak:
        print(traced(known[given.peak[0]], int(given.peak[1])) >> 20)
        return
    rows = []
    for name in given.only or known:
        rows += measure(name, known[name], 80 if given.tiny else given.events, given.repeats)
    head = ["network", "parameters", "method", "bare pass, ms an event", "trace, ms an event", "ratio", "ratio of the whole call"]
    print(f"### Cost of an event\n\n{QUERIES} queries, {TIMESTEPS} timesteps, float32, CPU time on one thread.\n\n{table(head, rows)}\n")
    if given.only:
        return
    sizes = (20, 160) if given.tiny else (1000, 8000)
    rows = [[name, *(f"{peak(name, count, given.tiny):,}" for count in sizes)] for name in list(known)[:2]]
    scores = 4 * QUERIES * (sizes[1] - sizes[0]) / 2**20
    head = ["network", *(f"MB added by {count:,} images" for count in sizes)]
    print(f"### Memory\n\nReTrac, expected events; scores of {QUERIES} queries grow by {scores:.2f} MB.\n\n{table(head, rows)}\n")


if __name__ == "__main__":
    main()
