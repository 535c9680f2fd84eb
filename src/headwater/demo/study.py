"""What the demo measures: records a training, traces it, retrains it, and holds the one against the other. Every step is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.demo.experiment import Digits, Size, digits, experiment, minus_loss
from headwater.demo.kept import kept
from headwater.demo.pixels import Pixels, carried
from headwater.errors import RunError
from headwater.evaluate import LDS, Bank, Detection, Paired, SlopeResult, detection_curve, halves, lds, paired, retrain, slope
from headwater.evaluate.identity import differences, identity
from headwater.influence import GradDot, Influence, Source, TracIn, self_influence, trace
from headwater.influence.methods import Method
from headwater.result import TrainingScores
from headwater.store import read_json, write_json
from headwater.tasks import fingerprint
from headwater.training import Experiment, Run, settled

EACH = 6  # proponents, and opponents, of each digit on the page
SEED = 0  # of the recorded training and of the subsets
DAMPINGS = (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
METHODS: dict[str, Method] = {"Grad-Dot": GradDot(), "TracIn": TracIn(), "Influence": Influence(damping=DAMPINGS), "SOURCE": Source()}
Teller = Callable[[str], AbstractContextManager[Any]]
"""Says what is being done for as long as it takes."""


@dataclass(frozen=True)
class Damping:
    """One damping of Influence's sweep and its LDS on the digits that the choice is made on."""

    method: str
    lds: float


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that the page says, as numbers.

    Args:
        size, digits: what was done on what.
        asked: the reported queries' rows in the test digits. probabilities: the recorded model's, (reported queries, classes).
        accuracy, train_accuracy: of the recorded model on all test digits, and on the training labels as given.
        scores: by method, of the reported queries; for Influence those of the damping that was chosen. sweep: how it was chosen.
        agreement: LDS by method. ahead: SOURCE minus Influence, the same queries and subsets redrawn. size_of: of SOURCE's sums.
        suspicion: self-influence of each training example. losses: under the recorded model.
        found: detection of the flipped labels, by "self-influence" and "loss".
        costs: seconds and example gradients by method. trainings: how many were repeated. retrain_seconds: of work in all processes.
        run: the recorded training.
        pixels: which pixels carried the answers, and those of the strongest proponents of the digits on the page.
    """

    size: Size
    digits: Digits
    asked: np.ndarray
    probabilities: np.ndarray
    accuracy: float
    train_accuracy: float
    scores: dict[str, TrainingScores]
    sweep: tuple[Damping, ...]
    agreement: dict[str, LDS]
    ahead: Paired
    size_of: SlopeResult
    suspicion: np.ndarray
    losses: np.ndarray
    found: dict[str, Detection]
    costs: dict[str, dict[str, float]]
    trainings: int
    retrain_seconds: float
    run: Run
    pixels: Pixels

    @property
    def shown(self) -> np.ndarray:
        """The reported queries on the page, as rows of ``asked``: wrong ones first (at most two thirds), then right ones from unsure to sure."""
        return pictured(self.size.shown, self.digits.test[1].numpy()[self.asked], self.probabilities)

    def proponents(self, row: int) -> list[int]:
        """The training digits that pushed the answer of a reported query up most, the strongest first."""
        return strongest(self.scores["SOURCE"].values[row])

    def label(self, row: int) -> int:
        """The right label of a reported query: the class that its trace is about."""
        return int(self.digits.test[1][self.asked[row]])


def pictured(count: int, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Which of the reported queries are on the page: see :attr:`Study.shown`."""
    certainty = probabilities[np.arange(len(labels)), labels]
    right = probabilities.argmax(1) == labels
    order = np.argsort(certainty, kind="stable")
    wrong = order[~right[order]][: 2 * count // 3]
    others = order[right[order]]
    spread = np.linspace(0, len(others) - 1, min(len(others), count - len(wrong))).astype(int)
    return np.concatenate([wrong, others[spread]])


def strongest(values: np.ndarray) -> list[int]:
    """The training digits of the largest positive scores, at most ``EACH``."""
    return [int(i) for i in np.argsort(-values, kind="stable")[:EACH] if values[i] > 0]


def measure(size: Size, out: Path, telling: Teller) -> Study:
    """Do all of it, or what of it is not in ``out`` yet. In one thread, so that every machine gets the same figures, whatever its number of cores,
    and a busy one is not slowed by threads that wait for each other; retraining uses all cores, a process on each."""
    with settled(SEED, threads=1):
        return _measured(size, out, telling)


def _measured(size: Size, out: Path, telling: Teller) -> Study:
    plan = experiment(size)
    _claim(out, plan)
    with telling("Training a small network and recording it"):
        run = _recorded(plan, out / "run")
    scores: dict[str, list[TrainingScores]] = {}
    for name, method in METHODS.items():
        with telling(f"{name}: tracing {size.queries} test digits to {size.train:,} training digits"):
            scores[name] = _traced(out / "scores", name, run, method, plan.test, lambda m=method: trace(run, plan.test, [m], progress=False))  # type: ignore[misc]
    with telling("Self-influence: how much each training digit lowered its own loss"):
        suspicion = _traced(out / "scores", "self", run, Source(), plan.train, lambda: [self_influence(run, Source(), measure=minus_loss, progress=False)])[0]
    bank = retrain(plan, halves(size.train, size.subsets, SEED), size.seeds, directory=out / "bank")
    with telling("Which pixels carried the answers, and those of the training digits that they are owed to"):
        pixels = _carried(size, run, scores["SOURCE"][0].at(np.arange(size.chosen_on, size.queries)), out / "scores")
    with telling("Comparing predictions with retraining"):
        return _compared(size, run, scores, suspicion, bank, pixels)


def _claim(out: Path, plan: Experiment) -> None:
    """Make the directory this experiment's; refuse one that belongs to another (other data, other code)."""
    facts, file = identity(plan), out / "experiment.json"
    if file.exists() and (reasons := list(differences(read_json(file), facts))):
        raise RunError(
            f"{out} holds another demo: {'; '.join(reasons[:3])}", "an empty directory, or one begun by this very demo", "choose another with --out, or delete that one"
        )
    write_json(file, facts)


def _recorded(plan: Experiment, path: Path) -> Run:
    if (path / "manifest.json").exists() and read_json(path / "manifest.json")["finished"]:
        return plan.open(path)
    return plan.record(path, seed=SEED, overwrite=path.exists())


def _traced(place: Path, name: str, run: Run, method: Method, data: Any, work: Callable[[], list[TrainingScores]]) -> list[TrainingScores]:
    """Scores from their files, or made and written."""
    return kept(place, name, (repr(method), [run.weights_hash(step) for step in run.checkpoints], fingerprint(data)), work)


def _carried(size: Size, run: Run, scores: TrainingScores, place: Path) -> Pixels:
    """Of all reported queries, and of the strongest proponents of those on the page."""
    found, asked = digits(size), np.arange(size.chosen_on, size.queries)
    labels = found.test[1].numpy()[asked]
    logits, _ = _answers(run.load(run.model(), run.checkpoints[-1]), found)
    shown = pictured(size.shown, labels, logits.softmax(1).numpy()[asked])
    pairs = sorted({(i, int(labels[row])) for row in shown.tolist() for i in strongest(scores.values[row])})
    return carried(place, run, found, asked, pairs)


def _compared(size: Size, run: Run, scores: dict[str, list[TrainingScores]], suspicion: TrainingScores, bank: Bank, pixels: Pixels) -> Study:
    chosen_on, asked = np.arange(size.chosen_on), np.arange(size.chosen_on, size.queries)
    found = digits(size)
    sweep, best = _chosen(scores["Influence"], bank.at(chosen_on), chosen_on)
    picked = {name: (best if name == "Influence" else many[0]).at(asked) for name, many in scores.items()}
    judge = bank.at(asked)
    model = run.load(run.model(), run.checkpoints[-1])
    logits, losses = _answers(model, found)
    return Study(
        size=size,
        digits=found,
        asked=asked,
        probabilities=logits.softmax(1).numpy()[asked],
        accuracy=float((logits.argmax(1) == found.test[1]).float().mean()),
        train_accuracy=_accuracy(model, *found.train),
        scores=picked,
        sweep=sweep,
        agreement={name: lds(s, judge) for name, s in picked.items()},
        ahead=paired(picked["SOURCE"], picked["Influence"], judge),
        size_of=slope(picked["SOURCE"], judge),
        suspicion=suspicion.values[0],
        losses=losses,
        found={"self-influence": detection_curve(suspicion.values[0], found.flipped), "loss": detection_curve(losses, found.flipped)},
        costs={name: many[0].provenance["cost"] for name, many in scores.items()} | {"self-influence": suspicion.provenance["cost"]},
        trainings=(len(bank.subsets) + 1) * len(bank.seeds),
        retrain_seconds=bank.seconds,
        run=run,
        pixels=pixels,
    )


def _chosen(sweep: list[TrainingScores], bank: Bank, rows: np.ndarray) -> tuple[tuple[Damping, ...], TrainingScores]:
    """The damping with the best LDS on digits that are not reported on."""
    tried = [lds(scores.at(rows), bank, bootstrap=1).mean for scores in sweep]
    return tuple(Damping(s.method, value) for s, value in zip(sweep, tried, strict=True)), sweep[int(np.argmax(tried))]


@torch.no_grad()
def _answers(model: torch.nn.Module, found: Digits) -> tuple[torch.Tensor, np.ndarray]:
    """Logits of every test digit, and the loss of every training digit under its given label."""
    images, given = found.train
    return model(found.test[0]), torch.nn.functional.cross_entropy(model(images), given, reduction="none").numpy()


@torch.no_grad()
def _accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())
