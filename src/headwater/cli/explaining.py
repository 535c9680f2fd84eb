"""``headwater explain`` and ``headwater report``, in terms of the door."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import headwater as hw
from headwater import report
from headwater.cli import naming, subjects
from headwater.cli.screen import say
from headwater.errors import InputError
from headwater.result.interactions import InteractionScores
from headwater.result.pages import page
from headwater.result.pictures import PICTURES

FLAGS = {"rule": "points"}  # what an argument of hw.explain is called on the command line, where that differs
EXAMPLES, ROWS = 5, 15  # that a terminal is shown; the page and the table hold more
TOLERANCE = 1e-2  # of networks along a path that can keep one, where nothing is said


def explain(
    run: Path | None,
    experiment: Path | None,
    name: str | None,
    model: Path | None,
    data: Path | None,
    background: Path | None,
    queries: str,
    target: str | None,
    baseline: str | None,
    path: str,
    tolerance: float | None,
    points: int | None,
    layer: str | None,
    kind: str | None,
    top: int,
    out: Path | None,
    csv: Path | None,
    html: Path | None,
) -> None:
    """``headwater explain``."""
    _asked_once(run, experiment, name, model, data, background)
    if kind is not None and kind not in PICTURES:
        raise InputError(f"--show {kind}", f"one of {', '.join(PICTURES)}", "leave it out: the input decides")
    if tolerance is not None and points is not None:
        raise InputError(f"--tolerance {tolerance:g} and --points {points}", "one of them", "a tolerance chooses its own points")
    way = naming.path(path)
    for place in (csv, html):
        writable(place)
    subject = subjects.of_run(run, experiment, name, queries) if run is not None else subjects.of_file(model, data, background, queries)  # type: ignore[arg-type]
    scores = _explained(subject, target, baseline, way, tolerance, points, layer)
    say(_told(scores, kind, top))
    _written(scores, out, csv, html, kind, top)
    if run is not None:
        say(f"Next: headwater trace {run} --queries {queries}, which says which training examples these predictions are owed to")


def _asked_once(run: Path | None, experiment: Path | None, name: str | None, model: Path | None, data: Path | None, background: Path | None) -> None:
    """Raise InputError unless it is a run, or a model from a file, with what belongs to each."""
    if (run is None) == (model is None):
        given = "neither a run nor a model" if run is None else f"both the run {run} and --model {model}"
        raise InputError(given, "one of them", "headwater explain RUN, or headwater explain --model FILE --data TABLE")
    others = {"--data": data, "--background": background} if run is not None else {"--experiment": experiment, "--name": name}
    for flag, value in others.items():
        if value is not None:
            whose = "a run, whose test and training sets these are" if run is not None else "a model from a file"
            raise InputError(f"{flag} {value} with {whose}", f"no {flag}", "leave it out")


def _explained(
    subject: subjects.Subject, target: str | None, baseline: str | None, way: Any, tolerance: float | None, points: int | None, layer: str | None
) -> hw.FeatureScores:
    blur, guided = (isinstance(way, type(kind)) for kind in (hw.paths.blur(), hw.paths.guided()))
    if blur and baseline is not None:
        raise InputError(f"--path blur and --baseline {baseline}", "one of them: a blur path begins at the blurred input", "leave --baseline out")
    said = {"target": target, "baseline": baseline, "path": way, "tolerance": tolerance, "rule": points, "layer": layer}  # on the command line
    for key, value in said.items():
        if value is not None and key in subject.settings:
            raise InputError(f"--{FLAGS.get(key, key)}, which settings() of the file says too", "it once", "leave one of them out")
    asked, called = dict(subject.settings), None
    compared = baseline or subject.baseline
    if compared is not None and not blur and "baseline" not in asked:
        asked["baseline"], called = naming.baseline(compared, subject)
    if "target" not in asked:
        asked["target"] = naming.target(target, subject)
    if points is not None:
        asked["rule"] = hw.quadrature.gauss_legendre(points)
    if tolerance is None and subject.network and not guided and not {"rule", "tolerance"} & set(asked):
        tolerance = TOLERANCE
    asked |= {key: value for key, value in (("path", way), ("tolerance", tolerance), ("layer", layer)) if value is not None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The baseline equals the input")  # it is among the notes, which are shown
        scores = hw.explain(subject.model, subject.inputs, **{"example_names": subject.names, **asked})
    return replace(scores, baseline=called or scores.baseline, notes=(*subject.said, *scores.notes))


def _told(scores: hw.FeatureScores, kind: str | None, top: int) -> str:
    """The page as text, its first examples and the first rows of its tables: a terminal is read from the end."""
    whole = page(scores, kind, range(min(scores.n, EXAMPLES)), top)
    return report.text(replace(whole, sections=tuple(replace(s, parts=tuple(map(_shortened, s.parts))) for s in whole.sections)))


def _shortened(part: report.Part) -> report.Part:
    if not isinstance(part, report.Table) or len(part.rows) <= ROWS:
        return part
    more = (f"and {len(part.rows) - ROWS:,} lines more", *[""] * (len(part.columns) - 1))
    return report.Table(part.columns, (*part.rows[:ROWS], more))


def writable(place: Path | None) -> None:
    """Raise InputError where a file could not be written at ``place``: before the work, not after it."""
    if place is None:
        return
    if place.is_dir():
        raise InputError(f"{place} is a folder", "the name of a file", f"write to {place / 'explained.html'}")
    if not place.parent.is_dir():
        raise InputError(f"there is no folder {place.parent}", "a file name in a folder that exists", f"mkdir -p {place.parent}")


def _written(scores: hw.FeatureScores, out: Path | None, csv: Path | None, html: Path | None, kind: str | None, top: int) -> None:
    if out is not None:
        say(f"The values: {scores.save(out)}   (read them with headwater.load)")
    if csv is not None:
        scores.to_frame().to_csv(csv, index=False)
        say(f"The table: {csv.resolve()}")
    if html is not None:
        say(f"The page: {scores.to_html(html, kind, k=top).resolve()}")


# ---- saved answers --------------------------------------------------------------------------------------------------------------


def show(file: Path, html: Path | None, csv: Path | None, top: int) -> None:
    """``headwater report``: an answer that was saved, as text, as a page, as a table."""
    for place in (csv, html):
        writable(place)
    if not file.is_file():
        raise InputError(f"{file}, where no file is", "a file of scores", "check the path; headwater trace RUN --out FILE.safetensors writes one, and so does explain")
    answer = hw.load(file)
    if isinstance(answer, hw.FeatureScores):
        say(_told(answer, None, top))
    elif isinstance(answer, InteractionScores):
        say(report.text(report.Page("What features did together", repr(answer), (report.Section("", parts=tuple(answer.parts())),))))
    else:
        say(f"{answer!r}\n")
        say(f"proponents\n{answer.top(top)!r}\n\nopponents\n{answer.bottom(top)!r}\n")
    if csv is not None:
        answer.to_frame().to_csv(csv, index=False)
        say(f"The table: {csv.resolve()}")
    if html is not None:
        settings = {} if isinstance(answer, InteractionScores) else {"k": top}
        say(f"The page: {answer.to_html(html, **settings).resolve()}")
