"""Retraining as the judge of diffusion methods: LDS over half-subsets, and generations of models that never saw an image's top examples."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_methods import BASE, PAIRS, RANDOM, Method, methods, sweeps
from diffusion_trainings import Training, digits, generate, slug
from torch import Tensor

import headwater as hw
from headwater.store import content_hash
from headwater.training import settled

RECORDED = 100  # seeds of recorded models begin here: none of them is among the retrained ones
JUDGING = 77  # the seed of the noise that measures: another than any method's
REDRAWN = 1000


@dataclass(frozen=True)
class Trial:
    """What is retrained and how often.

    ``subsets`` judge, ``choosing`` further ones only choose a damping, by ``aside`` held-out images that are judged by nothing. ``models``:
    recorded ones, for ensembles. ``out``: how many top examples a removal leaves out, for the first ``traced`` generated images;
    ``random``: how many removals of as many random examples.
    """

    training: Training = field(default_factory=Training)
    subsets: int = 32
    choosing: int = 16
    seeds: int = 2
    models: int = 4
    generated: int = 32
    held_out: int = 32
    aside: int = 16
    out: int = 36
    traced: int = 10
    random: int = 16
    measured: int = 50

    @property
    def groups(self) -> dict[str, range]:
        """The queries, by what they are."""
        ends = np.cumsum([0, self.generated, self.held_out, self.aside])
        return {name: range(int(a), int(b)) for name, a, b in zip(("generated", "held-out", "aside"), ends[:-1], ends[1:], strict=True)}


@dataclass(frozen=True)
class Court:
    """A trial at a place on the disk: runs, queries, bank, scores, removals; each made where it is missing."""

    trial: Trial
    place: Path

    def run(self, number: int = 0) -> hw.Run:
        if number not in self._runs:
            self.place.mkdir(parents=True, exist_ok=True)
            self._runs[number] = self.trial.training.record(self.place / f"run-{number}", RECORDED + number)
        return self._runs[number]

    @cached_property
    def _runs(self) -> dict[int, hw.Run]:
        return {}

    @cached_property
    def queries(self) -> Tensor:
        """Generations of the first model, then held-out zeros and ones: (queries, 64)."""
        file = self.place / "queries.npy"
        if not file.exists():
            t, run = self.trial, self.run()
            made = generate(final(run), t.training.process, range(t.generated))
            rest = digits(t.training.common, t.training.foreign).rest[: t.held_out + t.aside]
            write_array(file, torch.cat([made, rest]).numpy())
        return torch.from_numpy(np.load(file))

    @cached_property
    def journeys(self) -> hw.tasks.Trajectory:
        """The generated images with what each was taken to be on the way, at 20 timesteps."""
        t, run = self.trial, self.run()
        steps, seen = t.training.process.strata(20), {}
        made = generate(final(run), t.training.process, range(t.generated), lambda step, clean: seen.update({step: clean}))
        return hw.tasks.Trajectory(made, torch.stack([seen[step] for step in reversed(steps)], 1), tuple(reversed(steps)))

    @cached_property
    def judging(self) -> hw.tasks.Diffusion:
        """The loss at many events: what models are measured by."""
        return self.trial.training.task(self.trial.measured, 2, seed=JUDGING)

    @cached_property
    def bank(self) -> hw.evaluate.Bank:
        t = self.trial
        subsets = hw.evaluate.halves(t.training.size, t.subsets + t.choosing, seed=0)
        experiment = t.training.experiment(self.queries, self.judging)
        return hw.evaluate.retrain(experiment, subsets, t.seeds, workers=1, directory=self.place / "bank", progress=False)

    # -- scores -----------------------------------------------------------------------------------------------------------------

    def scores(self, name: str, method: Method) -> tuple[np.ndarray, dict[str, Any]]:
        """(queries, train) of a method, and what it took."""
        file = self.place / "scores" / f"{slug(name)}.npz"
        if not file.exists():
            runs = [self.run(k) for k in range(self.trial.models)] if method.ensemble else [self.run()]
            asked = hw.Ensemble(method.of(runs[0]), runs) if method.ensemble else method.of(runs[0])
            started = time.process_time()
            found = hw.trace(runs[0], self.journeys if method.journey else self.queries, asked, progress=False)
            groups = ["generated"] if method.journey else ["generated", "held-out"]
            facts = {"seconds": time.process_time() - started, "unit": found.unit, "repr": repr(asked), "groups": groups}
            values = np.zeros((len(self.queries), self.trial.training.size))  # what is not asked about is not judged
            values[: len(found.values)] = found.values
            write_scores(file, values, facts)
        with np.load(file) as held:
            return held["values"], json.loads(str(held["facts"]))

    def all_scores(self) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
        """Every method's, sweeps cut down to the value that was chosen aside."""
        found = {name: self.scores(name, method) for name, method in methods(self.trial.training).items()}
        for name, sweep in self.sweeps.items():
            found[name] = self.scores(f"{name} {sweep['chosen']:g}", sweeps()[name][sweep["chosen"]])
        return found

    @cached_property
    def sweeps(self) -> dict[str, dict[str, Any]]:
        """LDS of every value of each sweep: aside (by which the best is chosen), and on what is judged, in hindsight."""
        t, out = self.trial, {}
        aside = self.cut("aside", range(t.subsets, t.subsets + t.choosing))
        for name, tried in sweeps().items():
            rows = []
            for value, method in tried.items():
                values = self.scores(f"{name} {value:g}", method)[0]
                lds = {g: hw.evaluate.lds(values[list(t.groups[g])], self.cut(g), bootstrap=1).mean for g in ("generated", "held-out")}
                rows.append({"value": value, "aside": hw.evaluate.lds(values[list(t.groups["aside"])], aside, bootstrap=1).mean, **lds})
            out[name] = {"chosen": max(rows, key=lambda row: row["aside"])["value"], "tried": rows}
        return out

    def cut(self, group: str, subsets: range | None = None) -> hw.evaluate.Bank:
        """The bank of one group of queries and of the judging subsets (or those given)."""
        return self.bank.at(list(self.trial.groups[group])).take(list(range(self.trial.subsets) if subsets is None else subsets))

    def judged(self) -> dict[str, Any]:
        """LDS of all methods with intervals, for generated and held-out queries apart; and differences from the plainest."""
        found, out = self.all_scores(), {}
        for name, (values, facts) in found.items():
            cell = dict(facts)
            for group in facts.get("groups", ("generated", "held-out")):
                rows, bank = list(self.trial.groups[group]), self.cut(group)
                lds = hw.evaluate.lds(values[rows], bank, bootstrap=REDRAWN)
                cell[group] = {"lds": lds.mean, "low": lds.low, "high": lds.high}
                difference = hw.evaluate.paired(values[rows], found[BASE][0][rows], bank, bootstrap=REDRAWN)
                cell[group] |= {"minus base": difference.difference, "from": difference.low, "to": difference.high}
            out[name] = cell
        return out

    def pairs(self) -> list[dict[str, Any]]:
        """Differences of LDS between methods that one would choose between."""
        found, out = self.all_scores(), []
        for a, b in PAIRS:
            row: dict[str, Any] = {"of": a, "minus": b}
            for group in ("generated", "held-out"):
                rows = list(self.trial.groups[group])
                d = hw.evaluate.paired(found[a][0][rows], found[b][0][rows], self.cut(group), bootstrap=REDRAWN)
                row[group] = [d.difference, d.low, d.high]
            out.append(row)
        return out

    def facts(self) -> dict[str, Any]:
        """What was trained, and how much of the truth is noise."""
        t, run = self.trial, self.run()
        nothing = np.zeros((len(self.queries), t.training.size))
        ceilings = {g: hw.evaluate.lds(nothing[list(t.groups[g])], self.cut(g), bootstrap=1).ceiling for g in ("generated", "held-out")}
        losses = {g: float(-self.bank.base[:, list(rows)].mean()) for g, rows in t.groups.items()}
        halves = {g: float(-self.bank.values[:, :, list(rows)].mean()) for g, rows in t.groups.items()}
        train = digits(t.training.common, t.training.foreign).train
        with torch.no_grad():
            losses["train"] = float(self.judging.loss(final(run), train).mean())
        return {
            "examples": t.training.size, "epochs": t.training.epochs, "parameters": sum(p.numel() for p in run.model().parameters()),
            "checkpoints": len(run.checkpoints) - 1, "subsets": t.subsets, "choosing": t.choosing, "seeds": t.seeds, "queries": {g: len(r) for g, r in t.groups.items()},
            "events": self.judging.events.count, "models": t.models, "ceiling": ceilings, "loss": losses, "loss of halves": halves, "retraining": self.bank.seconds,
        }  # fmt: skip

    # -- removals -----------------------------------------------------------------------------------------------------------------

    def removals(self) -> dict[str, Any]:
        """Retrained without the top examples of each generated image, from the recorded model's own seed: how far the image that the same
        noise becomes has moved, and by how much the loss of the old image has grown; beside removals of random examples."""
        t, found = self.trial, {}
        table = {**methods(t.training), **{name: next(iter(tried.values())) for name, tried in sweeps().items()}}
        for name, (values, _) in self.all_scores().items():
            if not table[name].removed:
                continue
            top = np.argsort(-values[: t.traced], axis=1, kind="stable")[:, : t.out]
            found[name] = [self.without(ids, q) for q, ids in enumerate(top)]
        drawn = [np.random.default_rng([0, k]).choice(t.training.size, t.out, replace=False) for k in range(t.random)]
        found[RANDOM] = [tuple(np.mean([self.without(ids, q) for ids in drawn], axis=0)) for q in range(t.traced)]
        return {"out": t.out, "random": t.random, "moved": {name: np.array(rows).T.tolist() for name, rows in found.items()}}

    def without(self, ids: np.ndarray, query: int) -> tuple[float, float]:
        """Distance and loss of generated image ``query`` for the model trained without ``ids``; see :meth:`removals`."""
        file = self.place / "removals" / f"{content_hash(sorted(map(int, ids)))[:16]}.npy"
        if not file.exists():
            t = self.trial
            kept = np.setdiff1d(np.arange(t.training.size), ids)
            experiment = t.training.experiment()
            with settled(RECORDED, threads=1):
                model = experiment.build()
                experiment.fit(model, experiment.train[torch.from_numpy(kept)], RECORDED)
            asked = self.queries[: t.traced]
            with torch.no_grad():
                loss = self.judging.loss(model, asked) - self.judging.loss(final(self.run()), asked)
            moved = (generate(model, t.training.process, range(t.traced)) - asked).norm(dim=1)
            write_array(file, torch.stack([moved, loss]).double().numpy())
        moved_by, grown_by = np.load(file)[:, query]
        return float(moved_by), float(grown_by)


def final(run: hw.Run) -> torch.nn.Module:
    """The trained model."""
    return run.load(run.model(), run.checkpoints[-1])


def write_array(file: Path, values: np.ndarray) -> None:
    """Whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file.with_suffix(".part.npy"), values)
    file.with_suffix(".part.npy").rename(file)


def write_scores(file: Path, values: np.ndarray, facts: dict[str, Any]) -> None:
    """Whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file.with_suffix(".part.npz"), values=values, facts=json.dumps(facts))
    file.with_suffix(".part.npz").rename(file)


def lean(trial: Trial) -> Trial:
    """In miniature: a few epochs on few images."""
    small = replace(trial.training, common=40, foreign=4, epochs=20, batch=11, width=8, checkpoints=3, window=5)
    return replace(trial, training=small, subsets=4, choosing=3, models=2, generated=3, held_out=3, aside=2, out=6, traced=1, random=1, measured=5)


def parts(court: Court) -> Iterator[tuple[str, Any]]:
    """Results as they come."""
    yield "facts", court.facts()
    yield "sweeps", court.sweeps
    yield "lds", court.judged()
    yield "pairs", court.pairs()
    yield "removals", court.removals()
