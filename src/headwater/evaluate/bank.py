"""A bank: what retrained models answer, on disk and in memory.

A bank directory holds ``bank.json`` (what was retrained, and on what), ``subsets.safetensors`` (which examples each subset keeps)
and ``measurements/SUBSET-SEED.safetensors`` (one model's measurements, written as its training ends). Numpy and safetensors read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.errors import InputError, RunError
from headwater.evaluate.identity import differences
from headwater.evaluate.jobs import Job
from headwater.evaluate.subsets import Subsets
from headwater.store import Store, content_hash, read_json, write_json

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Bank:
    """The measurements of models retrained on subsets.

    Args:
        subsets: which examples each model was trained on.
        seeds: the seeds that each subset was trained with.
        values: ``f(z_q; theta)``, float64 (subsets, seeds, queries); NaN where a training is missing.
        base: the same for models trained on every example, (seeds, queries).
        directory: where it lies on disk, or None.
        seconds: training and measuring time of all models together.
        name: of the experiment.
        facts: what the experiment is (see :func:`headwater.evaluate.identity.identity`), where it is known.
        picked: which of the experiment's queries these are (:meth:`at`); None: all of them.

    Build one from your own retrained models with ``Bank(subsets, seeds, values, base)``.
    """

    subsets: Subsets
    seeds: tuple[int, ...]
    values: np.ndarray
    base: np.ndarray
    directory: Path | None = None
    seconds: float = 0.0
    name: str | None = None
    facts: dict[str, Any] | None = None
    picked: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.subsets), len(self.seeds))
        if self.values.ndim != 3 or self.values.shape[:2] != shape or self.base.shape != self.values.shape[1:]:
            raise InputError(
                f"values of shape {self.values.shape} and base of shape {self.base.shape}",
                f"values ({shape[0]} subsets, {shape[1]} seeds, queries) and base ({shape[1]} seeds, queries)",
                "stack the measurements in that order",
            )

    @classmethod
    def open(cls, directory: str | Path) -> Bank:
        """Read a bank, complete or not: trainings that are missing are NaN.

        Raises:
            RunError: the directory holds no bank. DamagedFile: a file does not match its checksum.
        """
        shelf = Shelf.open(directory)
        return shelf.bank(shelf.subsets(), tuple(shelf.manifest["seeds"]))

    @property
    def queries(self) -> int:
        """How many queries were measured."""
        return self.values.shape[2]

    @property
    def finished(self) -> np.ndarray:
        """Booleans, (subsets, seeds): True where the training is there."""
        return np.isfinite(self.values).all(axis=2)

    def complete(self) -> Bank:
        """Only the subsets that every seed was trained on. Raises InputError where fewer than two are left."""
        whole = np.flatnonzero(self.finished.all(axis=1))
        if len(whole) == len(self.subsets):
            return self
        if len(whole) < 2:
            raise InputError(
                f"a bank with {len(whole)} complete subsets", "at least two", "call retrain again with the same arguments and directory: it continues"
            )
        return self.take(whole)

    def at(self, queries: Sequence[int] | np.ndarray) -> Bank:
        """The bank of some of the queries, in the order given."""
        ids = np.asarray(queries)
        picked = np.arange(self.queries) if self.picked is None else np.array(self.picked)
        return replace(self, values=self.values[:, :, ids], base=self.base[:, ids], picked=tuple(int(i) for i in picked[ids]))

    def take(self, subsets: Sequence[int] | np.ndarray) -> Bank:
        """The bank of some of the subsets, in the order given."""
        ids = np.asarray(subsets)
        return replace(self, subsets=self.subsets.take(ids), values=self.values[ids])

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Bank, Bank]:
        """Two banks without a subset in common, the first with ``fraction`` of them: what is fitted on one is judged by the other.

        Raises InputError where a part would hold fewer than two subsets.
        """
        first = round(fraction * len(self.subsets))
        if not 2 <= first <= len(self.subsets) - 2:
            raise InputError(f"fraction={fraction} of {len(self.subsets)} subsets", "two subsets or more in each part", "retrain on more subsets, or use fraction=0.5")
        order = np.random.default_rng(seed).permutation(len(self.subsets))
        return self.take(np.sort(order[:first])), self.take(np.sort(order[first:]))

    def marks(self) -> list[str]:
        """A name for each subset, of the examples that it keeps and the experiment where that is known: equal ones are the same trainings."""
        about = None if self.facts is None else {key: self.facts.get(key) for key in ("train", "task", "model", "code")}
        return [content_hash(about, self.subsets.n, kept.tolist())[:16] for kept in map(np.asarray, self.subsets)]

    def __repr__(self) -> str:
        missing = int(self.finished.size - self.finished.sum())
        note = f", {missing} trainings missing" if missing else ""
        return f"Bank({len(self.subsets)} subsets ({self.subsets.kind}) x {len(self.seeds)} seeds, {self.queries} queries{note})"


@dataclass(frozen=True, eq=False)
class Shelf:
    """A bank directory: its manifest and its files."""

    path: Path
    store: Store
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path) -> Shelf:
        """The shelf at a directory that holds one."""
        path = Path(directory)
        if not (path / "bank.json").exists():
            raise RunError(f"{path} holds no bank (no bank.json)", "a directory written by hw.evaluate.retrain", "check the path")
        manifest = read_json(path / "bank.json")
        if manifest.get("schema") != SCHEMA:
            raise RunError(
                f"the bank {path} has schema {manifest.get('schema')}",
                f"schema {SCHEMA}",
                "retrain into a new directory, or use the version that wrote it",
            )
        return cls(path, Store(path), manifest)

    @classmethod
    def prepare(cls, directory: str | Path, name: str | None, facts: dict[str, Any], subsets: Subsets, seeds: Sequence[int]) -> Shelf:
        """A new shelf, or the one that is there, made wide enough for ``subsets`` and ``seeds``.

        Raises:
            RunError: the directory belongs to another experiment or other subsets; the message names the difference.
        """
        path = Path(directory)
        if not (path / "bank.json").exists():
            shelf = cls(
                path, Store(path), {"schema": SCHEMA, "name": name, "experiment": facts, "n": subsets.n, "kind": subsets.kind, "seed": subsets.seed}
            )
            return shelf._with(subsets, seeds)
        shelf = cls.open(path)
        held = shelf.subsets()
        _refuse(path, [*differences(shelf.manifest["experiment"], facts), *_other_subsets(held, subsets)])
        wider = subsets if len(subsets) > len(held) else held
        return shelf._with(wider, [*shelf.manifest["seeds"], *(s for s in seeds if s not in shelf.manifest["seeds"])])

    def _with(self, subsets: Subsets, seeds: Sequence[int]) -> Shelf:
        self.path.mkdir(parents=True, exist_ok=True)
        self.store.write("subsets", {"kept": torch.from_numpy(np.packbits(subsets.mask(), axis=1))})
        manifest = {**self.manifest, "subsets": len(subsets), "seeds": list(seeds)}
        write_json(self.path / "bank.json", manifest)
        return Shelf(self.path, self.store, manifest)

    def subsets(self) -> Subsets:
        """The subsets as written."""
        m = self.manifest
        mask = np.unpackbits(self.store.read("subsets")["kept"].numpy(), axis=1, count=m["n"]).astype(bool)
        return Subsets(m["n"], tuple(np.flatnonzero(row) for row in mask), m["kind"], m["seed"])

    def has(self, job: Job) -> bool:
        """Whether this training has ended and been written."""
        return self.store.has(f"measurements/{job.name}")

    def keep(self, job: Job, values: np.ndarray, seconds: float) -> None:
        """Write one model's measurements."""
        self.store.write(f"measurements/{job.name}", {"values": torch.tensor(values)}, meta={"seconds": seconds})

    def bank(self, subsets: Subsets, seeds: Sequence[int]) -> Bank:
        """The measurements of these subsets and seeds."""
        jobs = all_jobs(subsets, seeds)
        found = {job.name: self.store.read(f"measurements/{job.name}")["values"].numpy() for job in jobs if self.has(job)}
        seconds = sum(self.store.meta(f"measurements/{name}").get("seconds", 0.0) for name in found)
        nothing = np.full(self.manifest["experiment"]["test"]["examples"], np.nan)
        table = np.stack([found.get(job.name, nothing) for job in jobs]).reshape(len(subsets) + 1, len(seeds), -1)
        return Bank(subsets, tuple(seeds), table[1:], table[0], self.path, seconds, self.manifest["name"], self.manifest["experiment"])


def all_jobs(subsets: Subsets, seeds: Iterable[int]) -> list[Job]:
    """The full set first, then subset by subset: what an interruption leaves is as many complete subsets as possible."""
    sets: list[tuple[int | None, np.ndarray | None]] = [(None, None), *enumerate(subsets)]
    seeds = list(seeds)
    return [Job(number, seed, kept) for number, kept in sets for seed in seeds]


def _other_subsets(held: Subsets, asked: Subsets) -> list[str]:
    """Where two lists of subsets disagree; one may be longer than the other."""
    if held.n == asked.n and all(np.array_equal(a, b) for a, b in zip(held, asked, strict=False)):
        return []
    return [f"subsets: {held!r} drawn with seed {held.seed} there, {asked!r} with seed {asked.seed} here"]


def _refuse(path: Path, reasons: list[str]) -> None:
    if reasons:
        raise RunError(
            f"{path} holds the bank of another experiment: {'; '.join(reasons[:5])}",
            "the experiment that the bank was begun with, and the same subsets or more of them",
            "give another directory=, or delete this one if you no longer need it",
        )
