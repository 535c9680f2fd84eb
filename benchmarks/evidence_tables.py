"""The results as tables in Markdown, printed and put between the markers of docs/evidence.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]


def render(results: Results) -> str:
    """All tables of evidence.py."""
    return "\n\n".join([claims(results), costs(results), *(training(name, found) for name, found in results.items())])


def put(page: Path, part: str, text: str) -> None:
    """Replace what stands between a page's markers ``<!-- part: ... -->`` and ``<!-- end of part -->``."""
    before, begin, rest = page.read_text().partition(f"<!-- {part}: written by benchmarks/ -->")
    _, end, after = rest.partition(f"<!-- end of {part} -->")
    if begin and end:
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def claims(results: Results) -> str:
    """Source against the best swept Influence, training by training."""
    rows = []
    for name, found in results.items():
        for which in ("single", "ensemble")[: 1 if found["facts"]["models"] == 1 else 2]:
            one, models = found[which], 1 if which == "single" else found["facts"]["models"]
            best, chosen, plain = (one["paired"][f"Source - Influence, {d}"] for d in ("best damping", "chosen damping", "1/(ηT)"))
            rows.append([
                name, found["facts"]["kind"], models, f"{found['facts']['ceiling']:.2f}", with_interval(one["methods"]["Source"], "lds"),
                with_interval(one["methods"]["Influence, best damping"], "lds"), *(signed(d) for d in (best, chosen, plain)),
            ])  # fmt: skip
    head = ["training", "kind", "models", "ceiling", "LDS of Source", "LDS of Influence, best damping", "Source − best", "Source − chosen", "Source − 1/(ηT)"]
    return "### Source against Influence\n\n" + table(head, rows)


def training(name: str, found: dict[str, Any]) -> str:
    """One training: what it was, and the LDS of every method."""
    f, single, ensemble = found["facts"], found["single"], found["ensemble"]
    rows = []
    for method, figures in single["methods"].items():
        cost = found["costs"].get(method.partition(", ")[0] if method.startswith("Influence") else method, {})
        mean = ensemble["methods"].get(method)
        paired = single["paired"].get(f"Source - {method}")
        rows.append([
            method, with_interval(figures, "lds"), with_interval(mean, "lds") if mean and f["models"] > 1 else "", signed(paired) if paired else "",
            f"{figures['slope']:.2g}" if not method.startswith("Grad") else "",
            f"{cost['seconds']:.1f}", f"{cost['example_gradients']:,}",
        ])  # fmt: skip
    several = f"LDS, mean of {f['models']} models" if f["models"] > 1 else ""
    head = ["method", "LDS, 1 model", several, "Source − it, 1 model", "slope", "seconds", "example gradients"]
    return f"### {name}\n\n{described(f)}\n\n{table(head, rows)}\n\n{swept(single, ensemble)}"


def described(f: dict[str, Any]) -> str:
    phases = "; ".join(
        f"{n:,} examples, {p['epochs']} epochs, rate {p['rate']:g}{' (cosine)' if p['cosine'] else ''}, weight decay {p['decay']:g}, batches of {p['batch']}"
        for n, p in zip(f["examples"], f["phases"], strict=True)
    )
    losses = ", ".join(f"{a:.3g} → {b:.3g}" for a, b in zip(f["loss before"], f["loss after"], strict=True))
    accuracy = "" if f["accuracy"] is None else f"; {f['accuracy']:.0%} of the queries right"
    return (
        f"{f['about'].capitalize()}: {phases}; momentum .9; {f['parameters']:,} parameters. Training loss {losses}{accuracy}. "
        f"{f['queries']} queries; {f['subsets']} half-subsets (and {f['choosing']} that only choose the damping) × {len(f['seeds'])} seeds, "
        f"noise ceiling {f['ceiling']:.2f}; {f['retraining seconds']:,.0f} s of retraining on one core. ηT = {sum(f['effective_rates']):.3g}; "
        f"{len(f['checkpoints']) - 1} checkpoints, {f['segments']} segments{' a stage' if len(f['phases']) > 1 else ''}."
    )


def swept(single: dict[str, Any], ensemble: dict[str, Any]) -> str:
    """The damping sweep: LDS at each multiple of 1/(eta T)."""
    head = ["damping × ηT", *(f"{x:g}" for x in single["sweep"]["factors"])]
    both = (("1 model", single), ("mean of all", ensemble))[: 1 if single["sweep"] == ensemble["sweep"] else 2]
    rows = [[label, *(f"{x:.3f}" for x in found["sweep"]["lds"])] for label, found in both]
    return table(head, rows)


def costs(results: Results) -> str:
    """Seconds of each method on each training."""
    names = dict.fromkeys(name for found in results.values() for name in found["costs"])
    rows = [[name, *(f"{found['costs'][name]['seconds']:.1f}" if name in found["costs"] else "" for found in results.values())] for name in names]
    return "### Seconds on one core, all queries, one model (a sweep of dampings counts as one)\n\n" + table(["method", *results], rows)


def render_causes(found: dict[str, Any]) -> str:
    """The table of evidence_causes.py."""
    truths = list(found["ceilings"])
    rows = [["(noise ceiling)", "", "", "", *(f"{found['ceilings'][t]:.3f}" for t in truths)]]
    for name, row in found["rows"].items():
        label = name if row["damping"] is None else f"{name}, best damping {row['damping']:.2g}"
        rows.append([label, f"{row['with exact unrolling']:.3f}", with_interval(row, "lds"), f"{row['slope']:.2g}", *(f"{row[t]:.3f}" for t in truths)])
    mean = f"mean of {found['models']}"
    head = ["variant", "agreement with exact unrolling", "LDS, 1 model", "slope", *(f"LDS, {mean}: {t}" for t in truths)]
    return table(head, rows)


def with_interval(found: dict[str, float], key: str) -> str:
    return f"{found[key]:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def signed(found: dict[str, float]) -> str:
    """A difference; bold where its interval lies on one side of 0."""
    text = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
