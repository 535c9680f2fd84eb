"""The results of ensembles.py as tables in Markdown and as figures (SVG, on a white ground so that they can be read on dark pages)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ensembles_schemes import (
    ADAPTED,
    BRIEF,
    CHECKPOINTS,
    CHOSEN,
    DROPOUT,
    EACH,
    ENSEMBLED,
    EXACT,
    FLOORS,
    FORWARD,
    GRAD_DOT,
    LORA,
    MERGED,
    MODEL_FREE,
    NAIVE,
    SOURCE,
    TRAK,
)
from evidence_tables import signed, table, with_interval

Results = dict[str, dict[str, Any]]
COSTS = {"training": "training (CPU s)", "serving": "serving (CPU s)", "storage": "storage (MB)"}
COLOURS = {TRAK: "#0072b2", EXACT: "#cc79a7", SOURCE: "#d55e00", CHOSEN: "#009e73", GRAD_DOT: "#7f7f7f"}
MARKS = {NAIVE: "o", DROPOUT: "s", EACH: "D", FORWARD: "^", LORA: "P", BRIEF: "p", MERGED: "X", CHECKPOINTS: "v"}
REFERENCE = "5 models"


def render(results: Results) -> str:
    """All tables."""
    return "\n\n".join([advice(results), verdicts(results), claims(results), *(training(name, found) for name, found in results.items())])


def advice(results: Results) -> str:
    """The largest LDS within what one has: final weights only or a recorded training, so many models, so much time to serve."""
    final = {NAIVE, DROPOUT, EACH, FORWARD}

    def cheap(m: str, c: dict[str, Any], held: dict[str, Any]) -> bool:
        return final_only(m, c) and c["models"] == 1 and c["serving"] <= 3 * held[GRAD_DOT]["one model"]["serving"]

    def final_only(m: str, c: dict[str, Any]) -> bool:
        return c["kind"] in final and m != SOURCE

    rules: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], bool]] = {
        "no model at all": lambda m, c, held: m in MODEL_FREE,
        "final weights of one model, at most 3 × the time of Grad-Dot": cheap,
        "final weights of one model": lambda m, c, held: final_only(m, c) and c["models"] == 1,
        "one recorded training": lambda m, c, held: c["kind"] not in ADAPTED and c["models"] == 1,
        "one recorded training, adapters may be trained": lambda m, c, held: c["models"] == 1,
        "two trainings": lambda m, c, held: c["models"] <= 2,
        "five trainings": lambda m, c, held: c["models"] <= 5,
        "as many as were measured": lambda m, c, held: True,
    }
    rows = []
    for told, allowed in rules.items():
        row = [told]
        for found in results.values():
            cells = [(c["lds"], m, s, c) for m, held in found["cells"].items() for s, c in held.items() if allowed(m, c, found["cells"])]
            _, method, scheme, cell = max(cells, key=lambda item: item[0])
            row.append(f"{method}, {scheme}: {with_interval(cell, 'lds')}, {cell['serving']:.2g} s")
        rows.append(row)
    return "### The largest LDS within what one has (and the CPU seconds of serving)\n\n" + table(["what there is", *results], rows)


def verdicts(results: Results) -> str:
    """At the LDS of five independent models, or not told apart from it: what was saved at most, and by what."""
    rows = []
    for name, found in results.items():
        for method in (m for m in ENSEMBLED if m in found["cells"] and REFERENCE in found["cells"][m]):
            cells = found["cells"][method]
            equal = {s: c for s, c in cells.items() if REFERENCE in c["minus"] and c["minus"][REFERENCE]["high"] >= 0}
            fewest = min((c["models"] for c in equal.values() if c["kind"] == NAIVE), default=5)
            row = [name, method, with_interval(cells[REFERENCE], "lds"), str(min(fewest, 5))]
            rivals = {s: c for s, c in equal.items() if c["kind"] != NAIVE}
            for cost in COSTS:
                best = min(rivals, key=lambda s: rivals[s][cost], default=None)
                row.append("none" if best is None else f"{1 - rivals[best][cost] / cells[REFERENCE][cost]:+.0%}: {best} ({signed(rivals[best]['minus'][REFERENCE])})")
            rows.append(row)
    head = ["training", "method", f"LDS of {REFERENCE}", "models that do as well", *(f"{cost} saved at most" for cost in COSTS)]
    return f"### At the LDS of {REFERENCE}: not told apart from it, or above\n\n" + table(head, rows)


def claims(results: Results) -> str:
    """Every cheap scheme against independent models: how many of them reach the same LDS, and what it saves against those."""
    rows = []
    for name, found in results.items():
        for method in (m for m in ENSEMBLED if m in found["cells"]):
            cells = found["cells"][method]
            for scheme, cell in cells.items():
                if cell["kind"] != NAIVE:
                    worth = as_many_models(cell["lds"], cells)
                    saved = [saving(cell[cost], cells, worth, cost) for cost in COSTS]
                    against = [signed(cell["minus"][other]) if other in cell["minus"] else "" for other in ("one model", REFERENCE)]
                    rows.append([name, method, scheme, *against, worth_told(worth, cells), *saved])
    head = ["training", "method", "scheme", "LDS − one model", f"LDS − {REFERENCE}", "worth as many models", "training saved", "serving saved", "storage saved"]
    return "### Cheap members against independent models\n\n" + table(head, rows)


def naive_of(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of independent models, by their number."""
    return sorted((c for c in cells.values() if c["kind"] == NAIVE), key=lambda c: c["models"])


def as_many_models(lds: float, cells: dict[str, Any]) -> float:
    """How many independent models reach an LDS (interpolated); below 1 where one has more, infinite where the most measured have less."""
    better: list[dict[str, Any]] = []
    for cell in naive_of(cells):
        if not better or cell["lds"] > better[-1]["lds"]:
            better.append(cell)
    reached = [c["lds"] for c in better]
    if lds < reached[0]:
        return 0.0
    return float("inf") if lds > reached[-1] else float(np.interp(lds, reached, [c["models"] for c in better]))


def worth_told(worth: float, cells: dict[str, Any]) -> str:
    if worth == 0:
        return "less than 1"
    return f"more than {naive_of(cells)[-1]['models']}" if worth == float("inf") else f"{worth:.1f}"


def saving(cost: float, cells: dict[str, Any], worth: float, key: str) -> str:
    """The share of a cost that is saved against as many independent models as are worth the same. (Against the most measured, where more are.)"""
    naive = naive_of(cells)
    models = [c["models"] for c in naive]
    instead = float(np.interp(min(max(worth, 1.0), models[-1]), models, [c[key] for c in naive]))
    return f"{1 - cost / instead:+.0%}"


def training(name: str, found: dict[str, Any]) -> str:
    """One training: what it was, and every scheme of every method."""
    rows = [
        [method, scheme, with_interval(c, "lds"), f"{c['training']:.1f}", f"{c['serving']:.2f}", f"{c['storage'] / 2**20:.1f}", f"{c['memory'] / 2**20:.0f}"]
        for method, cells in found["cells"].items()
        for scheme, c in sorted(cells.items(), key=lambda item: (list(MARKS).index(item[1]["kind"]), item[1]["models"], item[1]["each"]))
    ]
    head = ["method", "members", "LDS", *COSTS.values(), "memory (MB)"]
    picture = f"![LDS against training, serving and storage: {name}](images/pareto-{name}.svg)"
    return f"### {name}\n\n{described(found['facts'])}\n\n{picture}\n\n{table(head, rows)}\n\n{fronts(found['cells'])}"


def described(f: dict[str, Any]) -> str:
    s, d = f["settings"], f["damping"]
    optimizer = "AdamW" if s.get("adam") else "SGD, momentum .9"
    sweep = ", ".join(f"{x:g}: {lds:.3f}" for x, lds in zip(d["factors"], d["judging"], strict=True))
    return (
        f"{f['about'].capitalize()}: {f['examples']:,} examples, {s['epochs']} epochs, batches of {s['batch']}, {optimizer}, rate {s['rate']:g} (cosine), weight decay "
        f"{s['decay']:g}; {f['parameters']:,} parameters. Loss of the training examples {f['loss'][0]:.2f}, of the {f['queries']} queries {f['loss'][1]:.2f}. "
        f"{f['subsets']} halves × {f['seeds']} seeds, noise ceiling {f['ceiling']:.2f}; {f['retraining']:,.0f} s of retraining on one core. "
        f"Damping chosen on other halves: {d['factor']:g} / (ηT) (LDS of one model on the judging halves at multiples of 1/(ηT): {sweep})."
    )


def fronts(cells: dict[str, Any]) -> str:
    """What nothing else beats: for each cost, the schemes that reach more than all that cost less."""
    lines = []
    for cost in ("training", "serving", "storage"):
        every = sorted((c[cost], -c["lds"], f"{method}, {scheme}") for method, held in cells.items() if method not in FLOORS for scheme, c in held.items())
        front: list[tuple[float, float, str]] = []
        for spent, lds, told in every:
            if not front or lds < front[-1][1]:
                front.append((spent, lds, told))
        scale = 2**20 if cost == "storage" else 1
        lines.append(f"- {COSTS[cost]}: " + "; ".join(f"{told} ({spent / scale:.3g}: {-lds:.3f})" for spent, lds, told in front))
    return "The front (what reaches more than everything that costs less; in brackets cost and LDS):\n\n" + "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------- figures


def draw(results: Results, folder: Path) -> None:
    """``pareto-NAME.svg`` for each training: LDS against the three costs."""
    import matplotlib

    matplotlib.use("svg")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "headwater", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        for name, found in results.items():
            _figure(name, found).savefig(folder / f"pareto-{name}.svg", facecolor="white", metadata={"Date": None, "Title": f"LDS against cost: {name}"})


def _figure(name: str, found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, shown = figure.subplots(1, 3, sharey=True), [method for method in COLOURS if method in found["cells"]]
    for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
        for method in shown:
            _points(axis, found["cells"][method], cost, COLOURS[method])
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("LDS")
    axes[0].set_ylim(bottom=0)
    figure.suptitle(f"{name}: {found['facts']['about']} (noise ceiling {found['facts']['ceiling']:.2f}; bars: 95 % intervals)")
    there = {c["kind"] for cells in found["cells"].values() for c in cells.values()}
    kinds = {kind: "independent models" if kind == NAIVE else kind for kind in MARKS if kind in there}
    by_colour = [Line2D([], [], color=colour, lw=3, label=method) for method, colour in COLOURS.items() if method in shown]
    by_mark = [Line2D([], [], color="#333333", marker=MARKS[kind], ls="-" if kind == NAIVE else "", label=label) for kind, label in kinds.items()]
    figure.legend(handles=by_colour + by_mark, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(axis: Any, cells: dict[str, Any], cost: str, colour: str) -> None:
    scale = 2**20 if cost == "storage" else 1
    naive = naive_of(cells)
    axis.plot([c[cost] / scale for c in naive], [c["lds"] for c in naive], color=colour, lw=1.5)
    for c in cells.values():
        x, cheap = c[cost] / scale, c["kind"] != NAIVE
        axis.plot([x, x], [c["low"], c["high"]], color=colour, lw=0.8, alpha=0.3)
        axis.plot(x, c["lds"], marker=MARKS[c["kind"]], color=colour, ms=7 if cheap else 5, mec="white", mew=0.6, ls="")
