"""The demo's numbers as a page. Every sentence that depends on how the measurement came out is written from the measurement."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import torch

from headwater.demo.pixels import TOLERANCE
from headwater.demo.study import EACH, METHODS, Damping, Study
from headwater.evaluate import Detection, SlopeResult
from headwater.report import Attribution, Axis, Bar, Bars, Card, Curve, Exhibit, Figure, Figures, Gallery, Line, Overlay, Page, Prose, Section, Series, Table, attribution
from headwater.report.examples import picture
from headwater.report.numbers import minus, number
from headwater.result import FeatureScores, TrainingScores

FIRST = 3  # digits before the measurements; the others come after them, so that nobody has to scroll past a dozen
SUSPECTS = 16  # how many of the most suspicious training digits are pictured
LOOKED_AT = 0.05  # of the training digits: as many as there are wrong labels
LOOKED_TO = 0.3  # how far the curve is drawn

SIGN = """The digit at the left was asked about; beside it are the training digits that its answer is owed to. ▲ and plus: training on this one \
pushed the right answer up (a proponent). ▼ and minus: it pushed the right answer down (an opponent).

The number is the predicted change of the log-odds of the right label that training on this one digit caused; without it they are predicted to be lower \
by as much. Log-odds are log(p / (1 − p)): 0 is a probability of 50 %, +3 is 95 %, −3 is 5 %. How far such predictions hold is measured below."""

PIXELS = """The second picture of a digit says which of its pixels carried these log-odds: blue ones pushed them up, orange ones pushed them down, compared \
with the average training digit. Dark pixels count too, where ink is missing that the average digit has. All pixels of a digit sum to its log-odds minus \
those of the average digit. Under a training digit the picture says what in that digit speaks, to the trained network, for the class that the digit at \
the left was asked about. Shades are full at the 99th percentile of each picture's own sizes: between pictures compare the sums, not the shades."""

CARRIED = """Integrated Gradients of {count} digits: the gradient of the log-odds with respect to the pixels, averaged along the straight line from the \
average training digit to the digit. The number of points on the line is chosen for each digit until the estimated error of the values is below {tolerance}. \
{missed} The largest gap between the sum of a digit's values and the change of its log-odds is {gap} of the change; {evaluations} evaluations of the \
network for a digit on average, {most} at most. The gap is a lower bound on the error of single values.

Do the values mean something? From {judged} test digits pixels were taken away in the order of their values, those that pushed up most first, and replaced \
with those of other training digits. Averaged over the way, {area} of the answer's lead over the replacement is left (below zero: the replacement \
is ahead); taken away in random order, {random}. {verdict}

What they do not say: they describe the trained network between the average digit and this one; compared with something else (a black image, say) the values \
are others. Single pixels are noisy, strokes are what to look at. And what the network reads in a training digit today is not the part of that digit by which \
it changed the network: that is another question."""

JUDGED = """A score is a claim about training that did not happen, so we let it happen: {trainings} models were trained again, {subsets} random \
halves of the training digits with {seeds} random seeds each, and each was asked about {queries} test digits. LDS (linear datamodeling score) \
is the rank correlation, over the halves, between what summed scores predict for a test digit and what the retrained models answered: 1 is \
perfect, 0 is worthless. Whiskers are 95 % intervals over test digits and halves. The dashed line is the most that perfect scores could reach \
here, because training with another seed already changes the answers."""

LABELS = """Of the training labels {count} ({share}) were made wrong on purpose. Self-influence is how much a training digit lowered its own loss: \
large for a digit that the model could learn from nothing but itself. Going through the training digits from large to small finds the wrong \
labels early. The plain loss under the trained model is the cheapest rival; any method should be held against it."""


def share(value: float, digits: int = 0) -> str:
    """A part of a whole, in percent.

    >>> share(0.05), share(0.9107, 1)
    ('5\\xa0%', '91.1\\xa0%')
    """
    return minus(f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%")


def headline(study: Study) -> tuple[Figure, Figure, Figure]:
    """The three figures that matter."""
    source, ahead, found = study.agreement["SOURCE"], study.ahead, study.found["self-influence"]
    return (
        Figure("Agreement with retraining (LDS of SOURCE)", f"{source.mean:.2f}", f"95 % interval {source.low:.2f} to {source.high:.2f}; {_ceiling(study)}"),
        Figure("SOURCE minus best-tuned influence functions", f"{ahead.difference:+.3f}", f"95 % interval {ahead.low:+.3f} to {ahead.high:+.3f}: {_verdict(study)}"),
        Figure(
            "Wrong labels found among the 5 % most suspicious",
            f"{share(found.at(LOOKED_AT))}",
            f"by self-influence; plain loss {share(study.found['loss'].at(LOOKED_AT))}, chance {share(LOOKED_AT)}",
        ),
    )


def page(study: Study) -> Page:
    """The whole page."""
    return Page(
        "Which training digits is a prediction owed to?",
        f"A small network learned {study.size.train:,} handwritten digits, {int(study.digits.flipped.sum())} of them with a wrong label. "
        "Headwater traces its answers back to them, and checks by retraining.",
        (
            Section("", parts=(Figures(headline(study)), Prose(_summary(study)))),
            Section("Answers and what they are owed to", f"{SIGN}\n\n{PIXELS}", _attributions(study, study.shown[:FIRST])),
            _trust(study),
            _pixels(study),
            _labels(study),
            _costs(study),
            Section("More answers", "Wrong ones first, then right ones from unsure to sure.", _attributions(study, study.shown[FIRST:])),
        ),
        _footer(study),
    )


# ------------------------------------------------------------------------------------------------------------------- words


def _ceiling(study: Study) -> str:
    ceiling = study.agreement["SOURCE"].ceiling
    return "1 is perfect" if ceiling is None else f"perfect scores would reach {ceiling:.2f} here"


def _verdict(study: Study) -> str:
    if study.ahead.low > 0:
        return "SOURCE is better here"
    return "SOURCE is worse here" if study.ahead.high < 0 else "no difference could be shown here"


def _summary(study: Study) -> str:
    size, slope = study.size, study.size_of
    return (
        f"The network reads {share(study.accuracy, 1)} of the digits that it has not seen correctly after {size.epochs} passes over the data; training was "
        "stopped long before it had converged. Scores on this page are SOURCE's unless said otherwise.\n\n"
        f"How far to trust them: {_order(study)} Their size is another matter: where half of the training digits were taken away, answers changed by "
        f"{slope.slope:.2f} times the predicted amount (95 % interval {slope.low:.2f} to {slope.high:.2f}), so {_size_word(slope)}."
    )


def _order(study: Study) -> str:
    best = max(study.agreement, key=lambda name: study.agreement[name].mean)
    mean = study.agreement["SOURCE"].mean
    leader = "the best of the methods tried here" if best == "SOURCE" else f"behind {best} ({study.agreement[best].mean:.2f}) here"
    return f"against real retraining the order of the predictions correlates at {mean:.2f}, {leader}."


def _size_word(slope: SlopeResult) -> str:
    if slope.low <= 1 <= slope.high:
        return "the size holds too, as far as this can tell"
    return f"scores {'overstate' if slope.slope < 1 else 'understate'} changes here: read them as a ranking"


# ---------------------------------------------------------------------------------------------------------------- sections


def _attributions(study: Study, rows: np.ndarray) -> tuple[Attribution, ...]:
    values = study.scores["SOURCE"].values
    return tuple(attribution(_query(study, row), values[row], None, _training(study, row), EACH) for row in map(int, rows))


def _training(study: Study, row: int | None = None) -> Exhibit:
    """The training digits; with the pixels of those that pushed the answer of a query up most."""
    places = {} if row is None else {i: study.pixels.pairs.index((i, study.label(row))) for i in study.proponents(row)}
    overlays = {i: _overlay(study.pixels.training, k) for i, k in places.items()}
    given, truth = study.digits.train[1].tolist(), study.digits.truth.tolist()
    wrong = torch.nonzero(study.digits.flipped).flatten().tolist()
    return Exhibit(study.digits.train, notes=[f"labelled {label}" for label in given], flags={i: f"wrong label: it is a {truth[i]}" for i in wrong}, overlays=overlays)


def _overlay(scores: FeatureScores, k: int, told: str = "") -> Overlay:
    """The pixels of one digit, drawn over it."""
    assert isinstance(scores.values, np.ndarray) and isinstance(scores.inputs, np.ndarray) and scores.example_names and scores.converged is not None
    flag = None if scores.converged[k] else "missed the tolerance"
    return Overlay(scores.example_names[k], scores.values[k].sum(0), picture(scores.inputs[k]), subtitle=told, flag=flag)


def _sum(scores: FeatureScores, k: int) -> str:
    """What the pixels of a digit sum to, with the gap and the cost."""
    ends = number(float(scores.output[k])), number(float(scores.baseline_output[k]))
    return f"log-odds {ends[0]}, of the average digit {ends[1]}; gap {number(float(abs(scores.residual[k])))}; {int(scores.evaluations[k])} evaluations"


def _query(study: Study, row: int) -> Card:
    place, label, probabilities = int(study.asked[row]), study.label(row), study.probabilities[row]
    said = int(probabilities.argmax())
    verdict = f"read as {said} ({share(probabilities[said])})" + (", rightly" if said == label else f"; it is a {label} ({share(probabilities[label])})")
    pixels = study.pixels.asked
    return Card(f"Test digit {place}", verdict, image=picture(study.digits.test[0][place]), overlay=_overlay(pixels, row, _sum(pixels, row)))


def _trust(study: Study) -> Section:
    size = study.size
    rows = [Bar(_named(study, name), a.mean, a.low, a.high) for name, a in study.agreement.items()]
    ceiling = study.agreement["SOURCE"].ceiling
    text = JUDGED.format(trainings=study.trainings, subsets=size.subsets, seeds=size.seeds, queries=size.reported_on)
    lines = () if ceiling is None else (Line("noise ceiling", ceiling),)
    bars = Bars(tuple(rows), lines, "LDS: rank correlation with retraining")
    return Section("How far can that be trusted?", text, (bars, Prose(_comparison(study)), _sweep(study)))


def _named(study: Study, name: str) -> str:
    return f"Influence, damping {_damping(study.scores['Influence'])}" if name == "Influence" else name


def _damping(tried: TrainingScores | Damping) -> str:
    return tried.method.removeprefix("Influence(damping=").removesuffix(")")


def _comparison(study: Study) -> str:
    ahead, size = study.ahead, study.size
    return (
        f"SOURCE minus Influence, the same digits and halves for both: {ahead.difference:+.3f}, 95 % interval {ahead.low:+.3f} to {ahead.high:+.3f}; "
        f"{_verdict(study)}. The intervals cover the choice of digits and halves, not that of another dataset or network.\n\n"
        f"Influence functions need a damping, SOURCE does not. To be fair to them the best of {len(study.sweep)} was taken, chosen on {size.chosen_on} other test "
        f"digits than the {size.reported_on} reported here, on the same halves:"
    )


def _sweep(study: Study) -> Table:
    return Table(("damping", *map(_damping, study.sweep)), (("LDS on the other digits", *(f"{tried.lds:.3f}" for tried in study.sweep)),))


def _pixels(study: Study) -> Section:
    pixels, judged = study.pixels, study.pixels.asked.provenance["deletion"]
    missed = sum(int((~e.converged).sum()) for e in (pixels.asked, pixels.training) if e.converged is not None)
    text = CARRIED.format(
        count=pixels.count,
        tolerance=share(TOLERANCE),
        missed=f"{missed} missed that, and {'is' if missed == 1 else 'are'} flagged where shown." if missed else "Every digit met that.",
        gap=share(pixels.gaps.max(), 2),
        evaluations=f"{pixels.evaluations.mean():.0f}",
        most=int(pixels.evaluations.max()),
        judged=judged["digits"],
        area=share(judged["area"]),
        random=share(judged["random"]),
        verdict="The order is no better than chance here." if judged["area"] >= judged["random"] else "Less is better.",
    )
    row = int(study.shown[0])
    assert isinstance(pixels.asked.reference, np.ndarray)
    part = replace(_overlay(pixels.asked, row, _sum(pixels.asked, row)), baseline=picture(pixels.asked.reference[row]))
    return Section("How far can the pixels be trusted?", text, (part,))


def _labels(study: Study) -> Section:
    flipped = study.digits.flipped.numpy()
    text = LABELS.format(count=int(flipped.sum()), share=share(flipped.mean()))
    found, loss = study.found["self-influence"], study.found["loss"]
    verdict = (
        f"Looking at {share(LOOKED_AT)} of the training digits finds {share(found.at(LOOKED_AT))} of the wrong labels by self-influence and "
        f"{share(loss.at(LOOKED_AT))} by the loss; looking at 10 %, {share(found.at(0.1))} and {share(loss.at(0.1))}. {_rival(found, loss)}"
    )
    order = np.argsort(-study.suspicion, kind="stable")[:SUSPECTS]
    training = _training(study)
    gallery = Gallery(tuple(training.card(int(i), float(study.suspicion[i])) for i in order))
    return Section("Wrong labels", text, (_curve(study), Prose(verdict), Prose(f"The {SUSPECTS} most suspicious training digits, by self-influence:"), gallery))


def _rival(found: Detection, loss: Detection) -> str:
    if found.at(LOOKED_AT) > loss.at(LOOKED_AT):
        return "Here self-influence is the better guide."
    return "For this task, on this network, the plain loss is as good a guide or a better one, and far cheaper."


def _curve(study: Study) -> Curve:
    """The first part of the way, where the methods differ."""
    ends = float(study.digits.flipped.float().mean())
    until = round(LOOKED_TO * study.size.train) + 1
    names = {"self-influence": "self-influence (SOURCE)", "loss": "loss"}
    series = [Series(names[name], tuple(d.inspected[:until:2]), tuple(d.found[:until:2])) for name, d in study.found.items()]
    ideal = Series("ideal", (0.0, ends, LOOKED_TO), (0.0, 1.0, 1.0), "reference")
    chance = Series("chance", (0.0, LOOKED_TO), (0.0, LOOKED_TO), "reference")
    return Curve((*series, ideal, chance), Axis("training digits looked at", form="percent"), Axis("wrong labels found", 0, 1, "percent"))


def _costs(study: Study) -> Section:
    names = {**{name: name for name in METHODS}, "Influence": f"Influence ({len(study.sweep)} dampings at once)", "self-influence": "Self-influence (SOURCE)"}
    rows = [(names[name], f"{cost['seconds']:.1f} s", f"{int(cost['example_gradients']):,}") for name, cost in study.costs.items()]
    rows.append((f"Pixels of {study.pixels.count} digits (Integrated Gradients)", f"{study.pixels.seconds:.1f} s", f"{int(study.pixels.evaluations.sum()):,}"))
    rows.append(("Retraining, to check", f"{study.retrain_seconds:.0f} s", f"{study.trainings} trainings"))
    text = (
        f"Measured on this machine, for {study.size.queries} test digits and {study.size.train:,} training digits. An example gradient is one pass of one "
        "example through the network and back. The seconds of retraining are added up over all processes."
    )
    return Section("What it cost", text, (Table(("method", "time", "example gradients"), tuple(rows)),))


def _footer(study: Study) -> tuple[tuple[str, str], ...]:
    size, run = study.size, study.run
    return (
        ("network", "two convolutions, two linear layers, 26,826 parameters"),
        ("training", f"{size.epochs} epochs, SGD with momentum 0.9, weight decay 0.001, cosine schedule from 0.05, batches of {size.batch}"),
        ("test accuracy", f"{share(study.accuracy, 1)} of {len(study.digits.test[1]):,} digits; {share(study.train_accuracy, 1)} of the training labels as given"),
        ("SOURCE", study.scores["SOURCE"].method),
        ("run", str(run.path)),
        ("weights", run.weights_hash(run.checkpoints[-1])),
        ("data", "5,000 digits of MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0)"),
        ("versions", f"headwater {version('headwater')}, torch {torch.__version__}, numpy {np.__version__}"),
    )
