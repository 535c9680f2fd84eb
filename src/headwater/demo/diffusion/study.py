"""What the diffusion demo measures: trains, generates, traces what it generated, and looks at the traces. Every step is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.demo.diffusion.bias import Norms, norms
from headwater.demo.diffusion.experiment import CATEGORIES, Size, device, emoji, experiment
from headwater.demo.diffusion.sampling import ddim
from headwater.demo.kept import kept
from headwater.errors import RunError
from headwater.evaluate.accord import spearman
from headwater.evaluate.identity import differences, identity
from headwater.influence import trace
from headwater.influence.diffusion import DiffusionReTrac, DiffusionTracIn
from headwater.result import TrainingScores
from headwater.store import content_hash, read_json, read_tensors, write_json, write_tensors
from headwater.tasks import fingerprint
from headwater.training import Experiment, Run, settled

TOP = 10  # how long the lists are that examples are counted in
SEED, NOISE = 0, 1  # of the training, and of the noise that generations begin with
MEMORY = 2**31  # bytes for the gradients of all queries at once, so that those of the training examples are taken once
REPLAYED, EXPECTED, RETRAC_REPLAYED, RETRAC = "TracIn, replayed", "TracIn, expected", "ReTrac, replayed", "ReTrac, expected"
Teller = Callable[[str], AbstractContextManager[Any]]
"""Says what is being done for as long as it takes."""


def methods(timesteps: int) -> dict[str, DiffusionTracIn | DiffusionReTrac]:
    """The four that are compared: with the one noise event that training met before each checkpoint, as published, and with expected ones."""
    return {
        REPLAYED: DiffusionTracIn(timesteps, events="replay", keep=("timestep",)),
        RETRAC_REPLAYED: DiffusionReTrac(timesteps, events="replay", keep=("timestep",)),
        EXPECTED: DiffusionTracIn(timesteps, keep=("timestep",)),
        RETRAC: DiffusionReTrac(timesteps, keep=("timestep",)),
    }


@dataclass(frozen=True, eq=False)
class Near:
    """The nearest training example of each generation in pixels, and how far it is: root mean square difference, the range of a pixel being 1.
    ``fellow``: from each training example to the nearest other one that is not its exact copy."""

    ids: np.ndarray
    distances: np.ndarray
    fellow: np.ndarray

    @property
    def usual(self) -> float:
        """The median distance between a training example and its nearest fellow."""
        return float(np.median(self.fellow))

    @property
    def close(self) -> np.ndarray:
        """Which generations are less than half as far from their nearest training example as is usual among those: copies, as far as pixels tell."""
        return self.distances < self.usual / 2


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that the page says, as numbers.

    Args:
        size: what was done. train: images (n, 3, 32, 32) from -1 to 1 and categories (n,).
        made: the generations and the categories they were asked for. traced: numbers of the training examples that were asked about too.
        scores: by method, of the generations. own: by method, of the ``traced``.
        near: the generations' nearest training examples. norms: the size of gradients. run: the recorded training.
    """

    size: Size
    train: tuple[Tensor, Tensor]
    made: tuple[Tensor, Tensor]
    traced: np.ndarray
    scores: dict[str, TrainingScores]
    own: dict[str, TrainingScores]
    near: Near
    norms: Norms
    run: Run

    @cached_property
    def lists(self) -> dict[str, np.ndarray]:
        """By method: in how many generations' top ten each training example is, (train,)."""
        return {name: scores.generally_influential(TOP) for name, scores in self.scores.items()}

    @cached_property
    def concentration(self) -> dict[str, dict[str, float]]:
        """By method: distinct examples in the top tens, those in a quarter of them or more, and the share of lists with the busiest."""
        return {name: scores.concentration(TOP) for name, scores in self.scores.items()}

    def top(self, name: str, row: int, count: int = TOP) -> list[int]:
        """The training examples of the largest scores of a generation, the strongest first."""
        return [int(i) for i in self.scores[name].at([row]).top(count).indices[0]]

    def alike(self, name: str) -> float:
        """The share of the top tens that is of the category that was asked for."""
        found = self.train[1].numpy()[self.scores[name].top(TOP).indices]
        return float((found == self.made[1].numpy()[:, None]).mean())

    def itself(self, name: str) -> float:
        """How often a training example that is asked about comes first in its own list."""
        return float((self.own[name].values.argmax(1) == self.traced).mean())

    def nearest_listed(self, name: str) -> int:
        """How many generations have their nearest training example in the top ten."""
        found = self.scores[name].top(TOP).indices
        return int((found == self.near.ids[:, None]).any(1).sum())

    def by_size(self, name: str) -> float:
        """Rank correlation of the mean size of a training example's scores with the norm of its gradients at the events that it met."""
        return float(spearman(np.abs(self.scores[name].values).mean(0)[None], self.norms.met[None])[0])

    def along(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps, and the share of each in the sizes of all scores kept apart by it."""
        slices = self.scores[name].by("timestep")
        sizes = np.abs(slices.values).astype(np.float64).sum((1, 2))
        return np.array(slices.labels), sizes / sizes.sum()

    @property
    def shown(self) -> np.ndarray:
        """The generations at the top of the page: the first of each category, by turns. None was chosen by its looks."""
        return np.arange(self.size.made).reshape(len(CATEGORIES), -1).T.ravel()


def plan(size: Size, out: Path) -> str:
    """What :func:`measure` will do, in words."""
    n, tried = len(emoji(size)[1]), methods(size.timesteps)
    steps = size.epochs * -(-n // size.batch)
    asked = size.made + size.traced
    threads = "1 thread" if size.threads == 1 else f"{size.threads} threads"
    return (
        f"Plan: train {steps:,} steps on {n} emoji ({device()}, {threads}), generate {size.made} pictures in {size.steps} steps each, and trace "
        f"{asked} pictures by {len(tried)} methods at {size.checkpoints} checkpoints; all of it kept in {out}. Started again, it goes on where it was: a trace in the "
        "middle, a training from its beginning."
    )


def measure(size: Size, out: Path, telling: Teller, progress: bool = True) -> Study:
    """Do all of it, or what of it is not in ``out`` yet. ``progress``: plans and bars of the training and the tracing, on stderr."""
    with settled(SEED, threads=size.threads):
        return _measured(size, out, telling, progress)


def _measured(size: Size, out: Path, telling: Teller, progress: bool) -> Study:
    held = experiment(size)
    _claim(out, held)
    run = _recorded(held, size, out / "run")
    kept_at = out / "scores"
    with telling(f"Generating {size.made} pictures"):
        made = _made(size, run, kept_at)
    traced = np.linspace(0, run.size - 1, size.traced).astype(int)
    asked = tuple(torch.cat([generated, own[traced]]) for generated, own in zip(made, held.train, strict=True))
    tried = methods(size.timesteps)
    facts = ([repr(m) for m in tried.values()], [run.weights_hash(step) for step in run.checkpoints], fingerprint(asked))
    scores = kept(kept_at, "traces", facts, lambda: trace(run, asked, list(tried.values()), memory=MEMORY, progress=progress))
    with telling("Measuring gradients along timesteps, and distances in pixels"):
        sizes = norms(run, size.probed, size.along, kept_at)
        near = _near(made[0], held.train[0])
    return Study(
        size=size,
        train=held.train,
        made=made,
        traced=traced,
        scores={name: s.at(np.arange(size.made)) for name, s in zip(tried, scores, strict=True)},
        own={name: s.at(np.arange(size.made, size.made + size.traced)) for name, s in zip(tried, scores, strict=True)},
        near=near,
        norms=sizes,
        run=run,
    )


def _claim(out: Path, plan: Experiment) -> None:
    """Make the directory this experiment's; refuse one that belongs to another (other data, other code)."""
    facts, file = identity(plan), out / "experiment.json"
    if file.exists() and (reasons := list(differences(read_json(file), facts))):
        raise RunError(
            f"{out} holds another demo: {'; '.join(reasons[:3])}", "an empty directory, or one begun by this very demo", "choose another with --out, or delete that one"
        )
    write_json(file, facts)


def _recorded(plan: Experiment, size: Size, path: Path) -> Run:
    """The recorded training: as it lies there, or from the start where it was cut off."""
    if (path / "manifest.json").exists() and read_json(path / "manifest.json")["finished"]:
        return plan.open(path)
    return plan.record(path, seed=SEED, checkpoints=size.checkpoints, overwrite=path.exists())


def _made(size: Size, run: Run, place: Path) -> tuple[Tensor, Tensor]:
    """The generations by the last weights, and the categories they were asked for."""
    last = run.checkpoints[-1]
    categories = torch.arange(len(CATEGORIES)).repeat_interleave(size.each)
    file = place / f"made-{content_hash(run.weights_hash(last), size.each, size.steps, size.guidance, NOISE)[:12]}.safetensors"
    if not file.exists():
        model = run.load(run.model(), last).eval()
        write_tensors(file, {"images": ddim(model, categories, seed=NOISE, steps=size.steps, guidance=size.guidance)})
    return read_tensors(file)["images"], categories


def _near(made: Tensor, train: Tensor) -> Near:
    made, train = (images.flatten(1) / 2 for images in (made, train))
    scale = made.shape[1] ** -0.5
    to_train, among = torch.cdist(made, train) * scale, torch.cdist(train, train) * scale
    among[among < 1e-3] = torch.inf  # itself, and exact copies
    return Near(to_train.argmin(1).numpy(), to_train.min(1).values.numpy(), among.min(1).values.numpy())
