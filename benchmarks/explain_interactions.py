"""Integrated Hessians beside brute force, in one run: prints errors, times and ratios.

    python benchmarks/explain_interactions.py              one thread: about two minutes
    python benchmarks/explain_interactions.py --tiny       in miniature, to see that it works: its times mean nothing

Brute force is the definition: a double integral, by Gauss-Legendre in both variables, n^2 Hessians for each example. It is given the best Hessians
that torch has (``vmap`` of ``jacfwd(jacrev)``, all points of a chunk at once), which the published implementation for tensors of two axes (path-explain)
does not use. "Gauss-log, same Hessians" is Headwater's rule with them: what the rule brings without the rest. Headwater's times are those of the
whole call, with the attributions that the rows are checked against. The reference is Gauss-log with 96 nodes; the best brute force is within the
error that its row shows. Errors are the largest of any entry of any example, as a share of the largest entry. CPU seconds, the least of the repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from speed.tables import machine, table, times
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

import headwater as hw
from headwater.features.interactions import interactions

CHUNK = 256
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]  # places u on the line, weights of u H, weights of the gradient


def problems(tiny: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """Smooth networks in double precision, and inputs."""
    torch.manual_seed(0)
    few = 2 if tiny else 16
    wide = 8 if tiny else 64
    mlp = nn.Sequential(nn.Linear(10, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, 1))
    digits = nn.Sequential(nn.Flatten(), nn.Linear(64, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, 1))
    cnn = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(72, 1))
    for model in (mlp, digits, cnn):  # trained networks are steeper than fresh ones
        for p in model.parameters():
            p.data.mul_(2.0)
    return {
        "MLP, 10 inputs": (mlp.double(), torch.randn(few, 10).double()),
        "MLP, 8 x 8 images": (digits.double(), torch.randn(few // 2, 1, 8, 8).double()),
        "CNN, 8 x 8 images": (cnn.double(), torch.randn(few // 2, 1, 8, 8).double()),
    }


def square(n: int) -> Grid:
    """The definition: n^2 places."""
    rule = hw.quadrature.gauss_legendre(n)
    u, w = np.multiply.outer(rule.nodes, rule.nodes).ravel(), np.multiply.outer(rule.weights, rule.weights).ravel()
    return u, w * u, w


def line(n: int) -> Grid:
    """The reduction: n places."""
    rule = hw.quadrature.gauss_log(n)
    return rule.nodes, rule.weights * rule.nodes, rule.weights


def hessians(model: nn.Module, x: Tensor, grid: Grid) -> np.ndarray:
    """(n, p, p) interactions from a baseline of zeros, by torch's own Hessians."""

    def f(flat: Tensor) -> Tensor:
        return model(flat.view(1, *x.shape[1:]))[0, 0]

    d, size = x.flatten(1), x[0].numel()
    u, second, first = (torch.from_numpy(part) for part in grid)
    total = torch.zeros(len(x), size, size, dtype=x.dtype)
    for k in range(len(x)):
        for part in torch.arange(len(u)).split(CHUNK):
            at = u[part, None] * d[k]
            total[k] += torch.einsum("k,kij->ij", second[part], vmap(jacfwd(jacrev(f)))(at)) * torch.outer(d[k], d[k])
            total[k] += torch.diag(torch.einsum("k,ki->i", first[part], vmap(jacrev(f))(at)) * d[k])
    return total.detach().numpy()


def least(call: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float]:
    """What a call gives, and the least CPU seconds it took."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        found = call()
        taken.append(time.process_time() - start)
    return found, min(taken)


def contest(name: str, model: nn.Module, x: Tensor, tiny: bool, repeats: int) -> str:
    """One table."""
    reference = hessians(model, x, line(24 if tiny else 96))
    calls: dict[str, tuple[int, Callable[[], np.ndarray]]] = {"Headwater, 16 points": (16, lambda: interactions(model, x, progress=False).values)}
    calls["Gauss-log 16, same Hessians"] = (16, lambda: hessians(model, x, line(16)))
    for n in (4, 8) if tiny else (4, 8, 12, 16, 24):
        calls[f"brute force, {n} x {n}"] = (n * n, lambda n=n: hessians(model, x, square(n)))  # type: ignore[misc]
    rows, ours = [], 0.0
    for label, (places, call) in calls.items():
        found, seconds = least(call, repeats)
        ours = ours or seconds
        error = np.abs(found - reference).max() / np.abs(reference).max()
        rows.append((label, str(places), f"{error:.1e}", f"{seconds:.3f}", times(seconds / ours)))
    head = (name, "Hessians per example", "largest error", "CPU seconds", "against Headwater")
    return f"{table(head, rows)}\n\n{len(x)} examples, {x[0].numel()} features.\n"


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, (model, x) in problems(given.tiny).items():
        print(contest(name, model, x, given.tiny, given.repeats), flush=True)
    print(f"{machine()}; {given.repeats} runs{', in miniature' * given.tiny}.")


if __name__ == "__main__":
    main()
