"""What each command does, in terms of the door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import headwater as hw
from headwater import report
from headwater.cli import asking
from headwater.cli.screen import doing, note, say
from headwater.demo import FULL, QUICK, diffusion, headline, measure, page
from headwater.evaluate.jobs import select
from headwater.report.words import marker
from headwater.tasks import Examples


def run_demo(out: Path | None, quick: bool) -> None:
    """``headwater demo``."""
    size = QUICK if quick else FULL
    place = out or Path("runs/demo-quick" if quick else "runs/demo")
    study = measure(size, place, doing)
    file = report.write(page(study), place / "report.html")
    say()
    for figure in headline(study):
        say(f"{figure.name}: {figure.value}  ({figure.note})")
    say(f"The page: {file.resolve()}")
    say("Next: headwater demo diffusion, which traces generated pictures; or your own training, with headwater record")


def run_diffusion_demo(out: Path | None, quick: bool) -> None:
    """``headwater demo diffusion``."""
    size = diffusion.QUICK if quick else diffusion.FULL
    place = out or Path("runs/demo-diffusion-quick" if quick else "runs/demo-diffusion")
    note(diffusion.plan(size, place))
    study = diffusion.measure(size, place, doing)
    made = diffusion.page(study)
    file = report.write(made, place / "report.html")
    twin = file.with_suffix(".txt")
    twin.write_text(report.text(made), encoding="utf-8")
    say()
    for figure in diffusion.headline(study):
        say(f"{figure.name}: {figure.value}  ({figure.note})")
    say(f"The page: {file.resolve()}   (as text: {twin.name})")


def record_experiment(file: Path, name: str | None, out: Path | None, seed: int, checkpoints: int, overwrite: bool) -> None:
    """``headwater record``."""
    experiment = hw.Experiment.load(file, name)
    place = out or Path("runs") / file.stem
    with doing(f"Training {experiment.name or file.stem} and recording it in {place}"):
        run = experiment.record(place, seed=seed, checkpoints=checkpoints, overwrite=overwrite)
    asking.remember(place, file, name)
    for stage in run.stages:
        say(f"{stage.name}: {stage.stop - stage.start:,} steps of {stage.optimizer.kind} on {stage.size:,} examples; checkpoints at {list(run.checkpoints)}")
    say(f"The run: {place}")
    say(f"Next: headwater trace {place}")


def trace_run(
    path: Path,
    file: Path | None,
    name: str | None,
    word: str,
    settings: dict[str, Any],
    beside: list[Path],
    masks: int | None,
    queries: str,
    top: int,
    indexed: bool,
    out: Path | None,
    html: Path | None,
) -> None:
    """``headwater trace``."""
    method = asking.method(word, **settings)
    experiment = asking.recalled(path, file, name)
    run = experiment.open(path)
    method = asking.ensembled(method, run, beside, experiment, masks)
    rows = asking.chosen(queries, experiment, run)
    asked = select(experiment.test, rows)
    where = asking.newest_index(run) if indexed else run
    scores = replace(hw.trace(where, asked, method), query_names=tuple(f"test example {row}" for row in rows))
    say(repr(scores))
    _show(scores, experiment, asked, top)
    if out is not None:
        say(f"The scores: {scores.save(out)}   (read them with headwater.load)")
    collate = experiment.task.collate
    if html is not None:
        say(f"The page: {scores.to_html(html, Examples(asked, collate), Examples(experiment.train, collate), k=min(top, 12)).resolve()}")
    say(f"Next: headwater evaluate {path}, which measures how far this can be trusted")


def index_run(path: Path, file: Path | None, name: str | None, segments: int, dim: int | None, dtype: str | None) -> None:
    """``headwater index``."""
    run = asking.recalled(path, file, name).open(path)
    say(hw.index(run, segments, dim=dim, dtype=dtype).report())
    say()
    say(f"Next: headwater trace {path} --index")


def _show(scores: hw.TrainingScores, experiment: hw.Experiment, asked: Any, top: int) -> None:
    """Each query, its proponents and its opponents, in lines."""
    training = report.Exhibit(Examples(experiment.train, experiment.task.collate))
    queries = report.Exhibit(Examples(asked, experiment.task.collate), scores.query_names)
    for q, values in enumerate(scores.values):
        shown = report.attribution(queries.card(q), values, None, training, top)
        say(f"\n{shown.query.title}  {shown.query.subtitle}")
        for heading, cards in (("proponents", shown.proponents), ("opponents", shown.opponents)):
            told = "   ".join(f"{marker(card.score or 0)} {card.score:+.3g} {card.title} {card.subtitle}".rstrip() for card in cards)
            say(f"  {heading:<10}  {told or 'none'}")
    say()


def evaluate_run(
    path: Path,
    file: Path | None,
    name: str | None,
    words: str,
    dampings: str | None,
    subsets: int,
    seeds: int,
    workers: int | None,
    queries: str,
    bank_path: Path | None,
    html: Path | None,
) -> None:
    """``headwater evaluate``."""
    sweep = None if dampings is None else tuple(asking.numbers(dampings))
    methods = [asking.method(word, damping=sweep) if word.strip() == "influence" else asking.method(word) for word in words.split(",")]
    experiment = asking.recalled(path, file, name)
    run = experiment.open(path)
    rows = asking.chosen(queries, experiment, run)
    scores = hw.trace(run, select(experiment.test, rows), methods)
    halves = hw.evaluate.halves(run.size, subsets, seed=0)
    bank = hw.evaluate.retrain(experiment, halves, seeds, workers=workers, directory=bank_path or path.with_name(f"{path.name}-bank"))
    made = _trust(scores, bank.at(rows), experiment, path)
    say(report.text(made))
    if html is not None:
        say(f"The page: {report.write(made, html).resolve()}")


def _trust(scores: list[hw.TrainingScores], bank: hw.evaluate.Bank, experiment: hw.Experiment, path: Path) -> report.Page:
    """LDS of each method, what the best is ahead by, and the size of predicted changes: a page with its text twin."""
    found = [hw.evaluate.lds(s, bank) for s in scores]
    order = np.argsort([-f.mean for f in found], kind="stable")
    bars = tuple(report.Bar(f.method, f.mean, f.low, f.high) for f in found)
    ceiling = () if found[0].ceiling is None else (report.Line("noise ceiling", found[0].ceiling),)
    parts: list[Any] = [report.Bars(bars, ceiling, "LDS: rank correlation with retraining")]
    if len(found) > 1:
        ahead = hw.evaluate.paired(scores[order[0]], scores[order[1]], bank)
        parts.append(report.Prose(f"{' minus '.join(ahead.methods)}: {ahead.difference:+.3f}, 95 % interval {ahead.low:+.3f} to {ahead.high:+.3f}."))
    sized = [(s.method, hw.evaluate.slope(s, bank)) for s in scores if s.unit == "measurement"]
    if sized:
        rows = tuple((method, f"{s.slope:.2f}", f"{s.low:.2f} to {s.high:.2f}") for method, s in sized)
        parts.append(report.Table(("method", "retrained / predicted change", "95 % interval"), rows))
    text = (
        f"{len(bank.subsets)} random halves of {bank.subsets.n:,} training examples, {len(bank.seeds)} seeds each, {bank.queries:,} queries. LDS is the rank "
        "correlation, over the halves, between summed scores and what retrained models answer; 1 is perfect, 0 is worthless. Intervals are 95 %, over queries and "
        "halves. Where the retrained change is 1 times the predicted one, the sizes of scores hold for half of the data too."
    )
    title = f"How far to trust the scores of {experiment.name or path.name}"
    return report.Page(title, sections=(report.Section("Against retraining", text, tuple(parts)),), footer=(("run", str(path)),))
