"""The diffusion demo's numbers as a page. Every sentence that depends on how the measurement came out is written from the measurement."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch

from headwater.demo.diffusion.experiment import CATEGORIES
from headwater.demo.diffusion.study import EXPECTED, REPLAYED, RETRAC, RETRAC_REPLAYED, TOP, Study
from headwater.demo.page import share
from headwater.report import Axis, Card, Curve, Figure, Figures, Page, Prose, Ranking, Rankings, Section, Series, Strip, Table
from headwater.report.examples import picture
from headwater.report.numbers import duration, minus

ROW = 8  # training images shown in a row
BUSY = 8  # of the busiest training images of each method
SIDE_BY_SIDE = (REPLAYED, EXPECTED, RETRAC)
ALONG = "along timesteps, from nearly clean at the left to nearly pure noise at the right"
WHAT = {
    REPLAYED: "gradients at the one noise event that training met last before each checkpoint, as first published",
    RETRAC_REPLAYED: "at that one event, each gradient at unit norm",
    EXPECTED: "mean gradients over a grid of noise events",
    RETRAC: "over that grid, each timestep's gradient at unit norm",
}

MADE = """The network was asked for {each} pictures of each category, from fixed noise, with {steps} steps of DDIM and a guidance of {guidance}. None was left \
out. It has {parameters} parameters and saw each of {train} emoji about {epochs} times, on a CPU: expect shapes and colours of emoji, not detail."""

OWED = """At the left a generation; beside it the training images that it is owed to, strongest first: those whose gradients point the way that lowers the \
generation's own denoising loss. Scores only rank here, so no numbers are shown. "Nearest in pixels" knows no network.

The strip under an image says at which timesteps of the generation its score arises, {along}: blue where training on it helped, orange over a line where \
it hurt. A badge "3 of {made}" says that it is in the top ten of 3 of the {made} generations. From a quarter on that is flagged: it may then say more about itself \
than about the generation."""

BIAS = """A score is a product of gradients, and gradients differ in size between timesteps. So in a plain product (TracIn) timesteps with large gradients \
decide, and if each training image is looked at through the one event that it met last, as first published, it matters at which timestep that was. ReTrac brings \
every timestep's gradient to unit norm first (Xie, Li, Bai and Hsieh 2024)."""

LATE = 900  # timesteps from here on show the network nearly nothing but noise
NOISE_ALONE = """ At timesteps as late as that nearly nothing is left of a picture: all that can be learned there is an average, and the pictures \
farthest from it (one flat colour, say) pull most."""

CROWD = """In each generation's top ten there is room for ten of {train} training images. If the same few fill most lists, the method says little about \
any one generation. Counted over {made} generations:"""

COPIES = """Distance is the root mean square difference over pixels and colours, where black to white is 1. The yardstick is how far training images are \
from their own nearest fellow (exact copies left out): {usual:.3f} in the middle. A generation less than half as far from a training image counts as a copy of it here."""

LIMITS = """These figures say how specific the lists are, not whether they are right. A method may be specific and wrong: only training again without the images that \
it names would tell, and that is not done on this page (hw.evaluate can). They are of one training of one small network on {train} pictures; \
with {made} generations, differences of a few images between two methods may be chance."""


def headline(study: Study) -> tuple[Figure, Figure, Figure, Figure]:
    """The figures that matter."""
    crowd, (first, last) = study.concentration, study.norms.ratios
    close = int(study.near.close.sum())
    slots = TOP * study.size.made
    return (
        Figure(
            f"Training images in a quarter of the top tens ({REPLAYED})",
            f"{crowd[REPLAYED]['widespread']}",
            f"{RETRAC}: {crowd[RETRAC]['widespread']}; {EXPECTED}: {crowd[EXPECTED]['widespread']}",
        ),
        Figure(
            f"Distinct training images in the top tens ({RETRAC})",
            f"{crowd[RETRAC]['distinct']}",
            f"of {slots} places; {EXPECTED}: {crowd[EXPECTED]['distinct']}, {REPLAYED}: {crowd[REPLAYED]['distinct']}",
        ),
        Figure("Largest gradient norm along timesteps over the smallest", f"{last:.1f} ×", f"at the end of training; {first:.1f} × at the first checkpoint"),
        Figure("Generations that are copies in pixels", f"{close} of {study.size.made}", f"nearest training image {study.near.distances.mean():.2f} away on average"),
    )


def page(study: Study) -> Page:
    """The whole page."""
    shown, rest = study.shown[: study.size.shown], study.shown[study.size.shown :]
    return Page(
        "Which training images is a generated picture owed to?",
        f"A small diffusion model learned {len(study.train[1]):,} emoji and draws new ones. Headwater traces them back by two methods, and looks at what "
        "sets these apart.",
        (
            Section("", parts=(Figures(headline(study)), Prose(_summary(study)))),
            Section("Pictures and what they are owed to", OWED.format(along=ALONG.removeprefix("along timesteps, "), made=study.size.made), _traces(study, shown)),
            _generations(study),
            _bias(study),
            _crowd(study),
            _copies(study),
            *([Section("More generations", "", _traces(study, rest))] if len(rest) else []),
            _costs(study),
        ),
        _footer(study),
    )


# ------------------------------------------------------------------------------------------------------------------- words


def _summary(study: Study) -> str:
    crowd, itself = study.concentration, {name: study.itself(name) for name in study.scores}
    return (
        f"{_fewer(crowd[REPLAYED]['widespread'], crowd[RETRAC_REPLAYED]['widespread'], 'With replayed events')} "
        f"{_fewer(crowd[EXPECTED]['widespread'], crowd[RETRAC]['widespread'], 'With expected events')} {_averaging(study)}\n\n"
        f"A check with a known answer: {study.size.traced} training images were asked about like generations. The image itself comes first for "
        f"{_each(itself, share)}."
    )


def _each(values: dict[str, float], said: Callable[[float], str]) -> str:
    """A figure of each method, in words."""
    *others, last = [f"{said(value)} by {name}" for name, value in values.items()]
    return f"{'; '.join(others)}; and {last}"


def _fewer(plain: float, unit: float, where: str) -> str:
    """What normalising did to the number of images in a quarter of the lists, next to the published claim."""
    if plain == 0:
        return f"{where} no training image is in a quarter of the top tens by TracIn, {unit:.0f} by ReTrac: nothing to remove here."
    ratio = unit / plain
    verdict = "more than TracIn" if ratio > 1 else "the same" if ratio == 1 else "the published third or less" if ratio <= 1 / 3 else "not the published third"
    return (
        f"{where} ReTrac leaves {unit:.0f} training images in a quarter of the top tens or more where TracIn leaves {plain:.0f} ({ratio:.2f} times as many: {verdict})."
    )


def _averaging(study: Study) -> str:
    """Which did more for the number of distinct images: averaging over events, or unit norm."""
    crowd = study.concentration
    averaged = crowd[EXPECTED]["distinct"] - crowd[REPLAYED]["distinct"]
    unit = crowd[RETRAC_REPLAYED]["distinct"] - crowd[REPLAYED]["distinct"]
    more = "averaging did more" if averaged > unit else "unit norm did more" if unit > averaged else "both did as much"
    return (
        f"Two things differ from plain replayed TracIn: averaging over noise events changes the number of distinct images in the lists by {minus(f'{averaged:+.0f}')}, "
        f"unit norm alone by {minus(f'{unit:+.0f}')}; here {more}."
    )


# ---------------------------------------------------------------------------------------------------------------- sections


def _generations(study: Study) -> Section:
    size = study.size
    text = MADE.format(
        each=size.each, steps=size.steps, guidance=f"{size.guidance:g}", train=f"{len(study.train[1]):,}", epochs=size.epochs, parameters=f"{_parameters(study):,}"
    )
    rows = tuple(
        Ranking(name, tuple(Card(f"g{row}", image=_image(study.made[0][row])) for row in np.flatnonzero(study.made[1].numpy() == k))) for k, name in enumerate(CATEGORIES)
    )
    return Section("All that the network drew", text, (Rankings(rows),))


def _traces(study: Study, rows: np.ndarray) -> tuple[Rankings, ...]:
    return tuple(_trace(study, int(row)) for row in rows)


def _trace(study: Study, row: int) -> Rankings:
    """One generation: its nearest training image, and what each method puts first."""
    near = int(study.near.ids[row])
    query = Card(f"Generation g{row}", f"asked for: {CATEGORIES[int(study.made[1][row])]}", image=_image(study.made[0][row]))
    flag = "a copy, by pixels" if study.near.close[row] else None
    beside = Card(f"#{near}", f"{study.near.distances[row]:.3f} away", image=_image(study.train[0][near]), flag=flag)
    lists = tuple(Ranking(name, tuple(_example(study, name, i, row) for i in study.top(name, row, ROW)), WHAT[name]) for name in SIDE_BY_SIDE)
    return Rankings(lists, query, Ranking("Nearest in pixels", (beside,)))


def _example(study: Study, name: str, i: int, row: int | None = None) -> Card:
    """A training image, with its strip of timesteps if it is of one generation's list, and how many lists it is in."""
    count, made = int(study.lists[name][i]), study.size.made
    often = count >= made / 4
    told = f"{count} of {made}"
    strip = None if row is None else Strip(tuple(study.scores[name].by("timestep").values[:, row, i]), ALONG)
    return Card(f"#{i}", image=_image(study.train[0][i]), strip=strip, badge=None if often else told, flag=told if often else None)


def _bias(study: Study) -> Section:
    sizes = study.norms
    along = tuple(map(float, sizes.timesteps))
    names = (f"after {sizes.steps[0]:,} steps", f"after {sizes.steps[1]:,} steps, at the end")
    norms = Curve(tuple(Series(n, along, tuple(map(float, y))) for n, y in zip(names, sizes.along, strict=True)), Axis("timestep"), Axis("mean gradient norm", 0))
    shares = {name: study.along(name) for name in SIDE_BY_SIDE}
    series = tuple(Series(name, tuple(map(float, t)), tuple(map(float, y))) for name, (t, y) in shares.items())
    even = Series("even", (float(along[0]), float(along[-1])), (1 / study.size.timesteps,) * 2, "reference")
    parts = Curve((*series, even), Axis("timestep of the generation"), Axis("share of the scores' size", 0, form="percent"))
    words = (
        f"Here gradients are largest at timestep {sizes.peak} of 1,000: {sizes.ratios[1]:.1f} times as large as where they are smallest "
        f"({sizes.ratios[0]:.1f} times early in training). Measured on {min(study.size.probed, len(study.train[1]))} training images at "
        f"{study.size.along} timesteps each. Which timesteps these are depends on the network's target, schedule and loss; another model may have "
        f"its largest gradients elsewhere.{NOISE_ALONE if sizes.peak >= LATE else ''}"
    )
    heaviest = "; ".join(f"{share(y.max())} by {name} (timestep {int(t[y.argmax()])})" for name, (t, y) in shares.items())
    sized = {name: study.by_size(name) for name in study.scores}
    after = (
        f"What becomes of it in the scores: of {study.size.timesteps} timesteps the heaviest makes up {heaviest} of their size; an even split would be "
        f"{share(1 / study.size.timesteps)}.\n\nIs a training image's score just the size of the gradients that it happened to be met with? Rank "
        f"correlation of the two over the training images: {_each(sized, lambda value: minus(f'{value:+.2f}'))}. 0 is no bias; below 0, small "
        "gradients are preferred."
    )
    return Section("The bias that ReTrac removes", BIAS, (Prose(words), norms, parts, Prose(after)))


def _crowd(study: Study) -> Section:
    crowd, made = study.concentration, study.size.made
    table = Table(
        ("method", "distinct images", "in a quarter of the lists", "busiest is in", "of the category asked for", "itself first"),
        tuple(
            (
                name,
                f"{c['distinct']}",
                f"{c['widespread']}",
                f"{round(c['busiest'] * made)} of {made}",
                share(study.alike(name)),
                share(study.itself(name)),
            )
            for name, c in crowd.items()
        ),
    )
    order = {name: np.argsort(-study.lists[name], kind="stable")[:BUSY] for name in SIDE_BY_SIDE}
    rows = tuple(Ranking(name, tuple(_example(study, name, int(i)) for i in order[name]), WHAT[name]) for name in SIDE_BY_SIDE)
    chance = float((np.bincount(study.train[1].numpy(), minlength=len(CATEGORIES)) / len(study.train[1]))[study.made[1].numpy()].mean())
    text = f"Of the category asked for, {share(chance)} would be by chance. " + LIMITS.format(train=f"{len(study.train[1]):,}", made=made)
    return Section(
        "The same images everywhere?",
        CROWD.format(train=f"{len(study.train[1]):,}", made=made),
        (table, Prose(f"The images in most of the {made} lists, and in how many:"), Rankings(rows), Prose(text)),
    )


def _copies(study: Study) -> Section:
    near, made = study.near, study.size.made
    closest = [int(row) for row in np.argsort(near.distances, kind="stable")[:ROW]]
    generations = tuple(Card(f"g{row}", f"{near.distances[row]:.3f}", image=_image(study.made[0][row])) for row in closest)
    nearest = tuple(Card(f"#{near.ids[row]}", image=_image(study.train[0][near.ids[row]]), flag="a copy, by pixels" if near.close[row] else None) for row in closest)
    listed = ", ".join(f"{study.nearest_listed(name)} by {name}" for name in study.scores)
    close = int(near.close.sum())
    verdict = (
        f"{close} of {made} generations {'is' if close == 1 else 'are'} that close to a training image; the nearest is {near.distances.min():.3f} away, the average "
        f"{near.distances.mean():.3f}. The nearest training image in pixels is in the top ten of {listed} (of {made}): influence and likeness are two things. "
        f"The {len(closest)} generations that are closest:"
    )
    rows = Rankings((Ranking("Generations", generations, "and how far they are"), Ranking("The nearest training image of each", nearest)))
    return Section("Is it memorised?", COPIES.format(usual=near.usual), (Prose(verdict), rows))


def _costs(study: Study) -> Section:
    cost = next(iter(study.scores.values())).provenance["cost"]
    rows = (
        ("Training", f"{study.run.checkpoints[-1] * study.size.batch:,} at most"),
        (f"Tracing {study.size.made + study.size.traced} pictures by {len(study.scores)} methods at once", f"{int(cost['example_gradients']):,}"),
    )
    text = (
        "An example gradient is one pass of one picture at one noise event through the network and back. Tracing took "
        f"{duration(float(cost['seconds']))} on this machine."
    )
    return Section("What it cost", text, (Table(("work", "example gradients"), rows),))


def _parameters(study: Study) -> int:
    return sum(p.numel() for p in study.run.model().parameters())


def _image(pixels: torch.Tensor) -> np.ndarray:
    """Pixels from -1 to 1 as a picture."""
    found = picture(((pixels + 1) / 2).clamp(0, 1))
    assert found is not None
    return found


def _footer(study: Study) -> tuple[tuple[str, str], ...]:
    size, run = study.size, study.run
    counts = np.bincount(study.train[1].numpy(), minlength=len(CATEGORIES))
    return (
        ("network", f"class-conditional UNet, {_parameters(study):,} parameters; 2 x 2 pixels read as one"),
        ("diffusion", "1,000 timesteps, cosine schedule, v-prediction, squared error; the category left out of one example in ten"),
        ("training", f"{size.epochs} epochs, Adam, cosine schedule from {size.rate:g}, batches of {size.batch}, {size.checkpoints} checkpoints"),
        ("weights", f"those of the last step, {run.weights_hash(run.checkpoints[-1])}: they generate, and are traced; no average of weights is taken"),
        ("noise events", f"{size.timesteps} timesteps, one noise each, shared by all pictures, another at each checkpoint"),
        ("run", str(run.path)),
        ("data", f"emoji of Twemoji (Twitter, Inc. and other contributors; CC BY 4.0): {', '.join(f'{n} {name}' for n, name in zip(counts, CATEGORIES, strict=True))}"),
        ("versions", f"headwater {version('headwater')}, torch {torch.__version__}, numpy {np.__version__}"),
    )
