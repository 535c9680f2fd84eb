"""The results of the diffusion evidence as tables in Markdown, printed and put into docs/diffusion-evidence.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from diffusion_methods import BASE, RANDOM
from diffusion_specificity import bias

TracIn, ReTrac = "TracIn, replayed", "ReTrac, expected, shared noise"
REDRAWN = 2000


def specificity(results: dict[str, list[dict[str, Any]]]) -> str:
    """One table a setting, seeds side by side, and whether the target of a third is met."""
    parts = [targets(results)]
    for setting, seeds in results.items():
        shape = "; ".join(f"{bias(found['norms'], 'first'):.1f} → {bias(found['norms'], 'last'):.1f}" for found in seeds)
        rows = []
        for name in seeds[0]["methods"]:
            cells = [found["methods"][name] for found in seeds]
            rows.append([
                name, joined(f"{c['distinct']}" for c in cells), joined(f"{c['widespread']}" for c in cells), joined(f"{c['busiest']:.2f}" for c in cells),
                joined(f"{c['norm correlation']:+.2f}" for c in cells), joined(f"{c['own sevens']:.2f}" for c in cells),
                joined(f"{c['held-out sevens']:.2f}" for c in cells), joined(f"{c['itself first']:.2f}" for c in cells),
            ])  # fmt: skip
        head = [
            "method", "distinct ids", "ids in ≥ 25 %", "busiest id's share of lists", "ρ(abs score, norm)", "sevens in the top 10: own", "held-out", "P(itself first)",
        ]  # fmt: skip
        parts.append(f"#### {setting}\n\nNorm bias, largest over smallest of ten stretches of t, first → last checkpoint: {shape}.\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def targets(results: dict[str, list[dict[str, Any]]]) -> str:
    """Does ReTrac with expected events bring the ids in a quarter of the lists to a third of replayed TracIn's?"""
    rows = []
    for setting, seeds in results.items():
        pairs = [(found["methods"][TracIn]["widespread"], found["methods"][ReTrac]["widespread"]) for found in seeds]
        before, after = (sum(p[k] for p in pairs) for k in (0, 1))
        same = [found["methods"]["ReTrac, replayed"]["widespread"] for found in seeds]
        other = [found["methods"]["TracIn, expected, shared noise"]["widespread"] for found in seeds]
        met = "yes" if all(3 * b <= a for a, b in pairs) else f"{sum(3 * b <= a for a, b in pairs)} of {len(pairs)} seeds"
        rows.append([setting, joined(f"{a}" for a, _ in pairs), joined(f"{x}" for x in same), joined(f"{x}" for x in other), joined(f"{b}" for _, b in pairs),
                     f"{after / before:.2f}" if before else "-", met])  # fmt: skip
    head = ["setting", "TracIn, replayed", "ReTrac, replayed", "TracIn, expected", "ReTrac, expected", "last over first", "at most a third"]
    return f"#### Examples in at least a quarter of 64 lists\n\n{table(head, rows)}"


def truth(found: dict[str, Any]) -> str:
    """LDS of every method, its sweeps, and removals."""
    f = found["facts"]
    about = (
        f"{f['examples']} images, {f['parameters']:,} parameters, {f['epochs']} epochs, {f['checkpoints']} checkpoints; {f['subsets']} half-subsets × {f['seeds']} seeds "
        f"({f['choosing']} more only choose values, by {f['queries']['aside']} held-out images that are judged by nothing); measured at {f['events']} noise events; "
        f"{f['retraining']:,.0f} s of retraining. Loss of training images {f['loss']['train']:.3f}; of generated and held-out ones {f['loss']['generated']:.3f} and "
        f"{f['loss']['held-out']:.3f}, after training on halves {f['loss of halves']['generated']:.3f} and {f['loss of halves']['held-out']:.3f}. "
        f"Noise ceiling {f['ceiling']['generated']:.2f} (generated), {f['ceiling']['held-out']:.2f} (held-out)."
    )
    return f"{about}\n\n{lds(found['lds'], f)}\n\n{pairs(found['pairs'])}\n\n{sweeps(found['sweeps'])}\n\n{removals(found['removals'])}"


def lds(cells: dict[str, Any], f: dict[str, Any]) -> str:
    order = sorted(cells, key=lambda name: -cells[name]["generated"]["lds"])
    rows = []
    for name in order:
        row = [name.replace("several models", f"{f['models']} models")]
        for group in ("generated", "held-out"):
            cell = cells[name].get(group)
            difference = "" if cell is None or name == BASE else signed(cell["minus base"], cell["from"], cell["to"])
            row += ["-", "-"] if cell is None else [interval(cell["lds"], cell["low"], cell["high"]), difference]
        rows.append([*row, f"{cells[name]['seconds']:.1f}"])
    head = ["method", "LDS, generated", f"− {BASE}", "LDS, held-out", f"− {BASE}", "CPU s"]
    return f"#### LDS\n\n{f['queries']['generated']} generated and {f['queries']['held-out']} held-out queries.\n\n{table(head, rows)}"


def pairs(found: list[dict[str, Any]]) -> str:
    """Differences between methods, on the same redrawn queries and subsets."""
    rows = [[f"{row['of']} − {row['minus']}", signed(*row["generated"]), signed(*row["held-out"])] for row in found]
    return f"#### Differences\n\n{table(['LDS of', 'generated', 'held-out'], rows)}"


def sweeps(found: dict[str, Any]) -> str:
    """Every value that was tried: aside, where the best was chosen, and in hindsight on what is judged."""
    rows = []
    for name, sweep in found.items():
        for row in sweep["tried"]:
            mark = "**" if row["value"] == sweep["chosen"] else ""
            rows.append([name.split(",")[0], f"{mark}{row['value']:g}{mark}", f"{row['aside']:.3f}", f"{row['generated']:.3f}", f"{row['held-out']:.3f}"])
    note = "Dampings in units of 1/(ηT), λ relative to the trace of ΦᵀΦ; bold: chosen aside. The last two columns are hindsight."
    return f"#### Values tried\n\n{note}\n\n{table(['method', 'value', 'LDS aside', 'generated', 'held-out'], rows)}"


def removals(found: dict[str, Any]) -> str:
    """How far a regenerated image has moved, and how much the loss of the old one has grown, beside random removal."""
    moved = {name: np.array(values) for name, values in found["moved"].items()}
    base, rows = moved[RANDOM], []
    for name, (distance, loss) in sorted(moved.items(), key=lambda item: -item[1][1].mean()):
        if name == RANDOM:
            rows.append([f"{RANDOM} (mean of {found['random']})", f"{distance.mean():.2f}", "", f"{loss.mean():.4f}", ""])
        else:
            differences = signed(*redrawn(distance - base[0]), digits=2), signed(*redrawn(loss - base[1]), digits=4)
            rows.append([name, f"{distance.mean():.2f}", differences[0], f"{loss.mean():.4f}", differences[1]])
    head = ["removed", "distance", "− random", "growth of the loss", "− random"]
    count = len(base[0])
    return (
        f"#### Without the top {found['out']}\n\n{count} generated images: models trained without the {found['out']} top examples of each, from the recorded "
        f"model's seed; the same noise is made into an image again (distance in 64 pixels of −1..1). Intervals redraw the {count} images.\n\n{table(head, rows)}"
    )


def redrawn(values: np.ndarray) -> tuple[float, float, float]:
    """A mean with its 95 % bootstrap interval over queries."""
    means = values[np.random.default_rng(0).integers(0, len(values), (REDRAWN, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def signed(mean: float, low: float, high: float, digits: int = 3) -> str:
    """A difference, bold where its interval lies on one side of 0."""
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def joined(cells: Iterable[str]) -> str:
    return " / ".join(cells)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
