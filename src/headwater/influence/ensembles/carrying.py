"""Carrying out an ensemble: what each member contributes is computed once, kept, and combined.

A contribution (:class:`~headwater.influence.request.Parts`) is kept in the store of the member's home run as ``members/KEY``, where KEY
is made of everything that it depends on. So more members can be added later at the cost of the new ones, a killed call goes on with
the member that it was at, and members added one by one give the same bits as all of them at once. The folder may be deleted: it is
only computed again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from headwater.errors import HeadwaterError, InputError
from headwater.influence.ensembles.combining import Arrays, combine
from headwater.influence.ensembles.members import Member, model_key, seeded, surroundings
from headwater.influence.methods import Method
from headwater.influence.request import Parts, Request, Scorer, column_names, mean_of_scores
from headwater.influence.tabled import parts_of
from headwater.influence.timing import Pieces
from headwater.report.numbers import duration
from headwater.result import TrainingScores
from headwater.store import content_hash
from headwater.tasks.code import code_digest

LONG = 60.0
"""Seconds: members that take longer show a plan and a bar each."""
WEIGHT = "weight"
"""The part of a contribution that needs only forward passes."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One entry of the store: what a member contributes, or only its weight."""

    name: str
    member: Member
    method: Any
    only_weight: bool = False

    def kept(self) -> bool:
        return self.member.home.store.has(self.name)

    def make(self, request: Request) -> None:
        """Compute it, and keep it."""
        started, own = time.perf_counter(), self.member.request(request)
        parts = _weight(self.method, own) if self.only_weight else parts_of(self.method, own)
        facts = {"name": parts.name, "unit": parts.unit, "provenance": parts.provenance, "seconds": round(time.perf_counter() - started, 3)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.arrays.items()}
        self.member.home.store.write(self.name, tensors, json.loads(json.dumps(facts, default=str)))

    def read(self) -> Arrays:
        return {name: tensor.numpy() for name, tensor in self.member.home.store.read(self.name).items()}

    @property
    def facts(self) -> dict[str, Any]:
        return self.member.home.store.meta(self.name)


@dataclass(frozen=True, eq=False)
class Contribution:
    """All that a member contributes: one piece, or the shared pieces of another member and a weight of its own."""

    member: Member
    pieces: tuple[Piece, ...]

    def read(self) -> Arrays:
        return {name: array for piece in self.pieces for name, array in piece.read().items()}


def _weight(method: Any, request: Request) -> Parts:
    return Parts({WEIGHT: np.asarray(method.weight(request))}, repr(method), "")


def contributions_of(method: Any, members: Sequence[Member], request: Request) -> list[Contribution]:
    """The pieces of each member's contribution to the answer, with the names that they are kept under."""
    homes = {id(member.home): surroundings(member.home) for member in {id(m.home): m for m in members}.values()}
    whole, light = ("parts", _question(request)), (WEIGHT, code_digest(request.asked.measure, held=True))  # a weight knows no queries

    def named(member: Member, only_weight: bool) -> Piece:
        own = method if only_weight else seeded(method, member.seed)
        name = content_hash("member-1", light if only_weight else whole, member.key, repr(own), homes[id(member.home)])
        return Piece(f"members/{name}", member, own, only_weight)

    return [
        Contribution(member, (named(member, False),) if member.shares is None else (named(member.shares, False), named(member, True))) for member in members
    ]


def carry_out(name: str, method: Method | Scorer, members: Sequence[Member], request: Request) -> TrainingScores:
    """The answer of an ensemble: its members' contributions, from the store or computed now, by the method's own rule.

    ``name``: of the ensemble. Raises InputError where a member comes twice: it would be counted twice, and fake a smaller error.
    """
    homes = {member.key: model_key(member.home) for member in members}
    ordered = sorted(members, key=lambda m: (homes[m.key], m.key))
    _refuse_twins(ordered, homes)
    contributions = contributions_of(method, ordered, request)
    seconds, fresh = _make(name, contributions, request)
    models = [[c.read for c in contributions if homes[c.member.key] == home] for home in dict.fromkeys(homes[m.key] for m in ordered)]
    values, stderr, spread = combine(method.combine if isinstance(method, Scorer) else mean_of_scores, models)
    first = contributions[0].pieces[0].facts
    provenance = {
        **first["provenance"],
        "run": str(request.run.path),
        "method": name,
        "averaged": first["name"] if len({c.pieces[0].facts["name"] for c in contributions}) == 1 else repr(method),
        "weights": sorted({c.member.home.weights_hash(c.member.home.checkpoints[-1]) for c in contributions}),
        "members": [_told(c) for c in contributions],
        "spread": asdict(spread),
        "cost": {"seconds": round(seconds, 3), "computed_now": fresh, "kept_bytes": _size(contributions)},
    }
    return TrainingScores(values, stderr, name, first["unit"], request.asked.names, column_names(provenance), provenance)


def _refuse_twins(members: Sequence[Member], homes: dict[str, str]) -> None:
    """Refuse a member that comes twice, and a training that was recorded twice (with other checkpoints, say)."""
    seen: dict[str, Member] = {}
    for member in members:
        final = content_hash(member.home.weights_hash(member.home.checkpoints[-1]), member.home.architecture)
        for twin in (seen.get(member.key), seen.get(final)):
            if twin is not None and (twin.key == member.key or homes[twin.key] != homes[member.key]):
                raise InputError(
                    f"one member twice: {_where(twin)}, and {_where(member)}",
                    "members that differ in their weights, masks, adapters or seeds: one that is counted twice fakes a smaller standard error",
                    "leave it out; of one training repeated with one seed every run is the same model",
                )
        seen[member.key] = member
        seen.setdefault(final, member)


def _where(member: Member) -> str:
    return f"{member.name} of {member.home.path}"


def _question(request: Request) -> list[Any]:
    """What contributions depend on besides the model and the method: the queries, how they make rows, the measure, the tolerance."""
    return [*request.asked.identity, request.tolerance]


def _make(name: str, contributions: Sequence[Contribution], request: Request) -> tuple[float, int]:
    """Compute the pieces that are not kept yet; how long all of them took, whenever that was, and how many were made now."""
    pieces = {piece.name: piece for c in contributions for piece in c.pieces}
    todo = [piece for piece in pieces.values() if not piece.kept()]
    if request.progress:
        tqdm.write(_plan(name, contributions, len(pieces) - len(todo), len(pieces), request), file=sys.stderr)
    for piece in {id(piece.member.home): piece for piece in reversed(todo)}.values():  # the first of each model
        try:
            piece.member.prove(piece.method, request)
        except HeadwaterError as error:
            error.add_note(f"Of {piece.member.home.path}; tried before any of its members was computed.")
            raise
    bar = tqdm(todo, desc="members", unit=" members", disable=not request.progress or len(todo) < 2, leave=False, file=sys.stderr)
    took = LONG  # the first member tells its plan, which is that of the others
    pace = Pieces(piece.only_weight for piece in todo)
    for k, piece in enumerate(bar):
        bar.set_postfix_str(f"{piece.member.name} of {piece.member.home.path.name}")
        started = time.perf_counter()
        try:
            piece.make(replace(request, progress=request.progress and took >= LONG))
        except HeadwaterError as error:
            error.add_note(f"In {_where(piece.member)} ({k + 1} of {len(todo)}); members finished before it are kept.")
            raise
        except KeyboardInterrupt:
            if request.progress:
                tqdm.write(f"headwater: stopped at {_where(piece.member)}; what was finished is kept, and the same call continues there", file=sys.stderr)
            raise
        took = time.perf_counter() - started
        if pace.ended(piece.only_weight, took) and request.progress:
            like = "those before them, of which the first is slower" if pace.warm else "the first, which is slower"
            tqdm.write(f"headwater: {len(todo) - 1 - k} more to compute, about {duration(pace.left)} if they are like {like}", file=sys.stderr)
    return sum(float(piece.facts["seconds"]) for piece in pieces.values()), len(todo)


def _plan(name: str, contributions: Sequence[Contribution], kept: int, pieces: int, request: Request) -> str:
    models = len({id(c.member.home) for c in contributions})
    size = 4 * request.asked.count * request.run.size
    lines = (
        f"{name}: {len(contributions)} members of {models} model(s); {kept} of {pieces} contributions are kept from before",
        f"memory: {size * 12 / 2**20:,.0f} MB while they are combined; disk: about {size * (pieces - kept) / 2**20:,.0f} MB more",
    )
    return "\n".join("headwater: " + line for line in lines)


def _told(contribution: Contribution) -> dict[str, Any]:
    member = contribution.member
    return {"name": member.name, "run": str(member.home.path), "key": member.key, "seed": (member.shares or member).seed, "shares_gradients": member.shares is not None}


def _size(contributions: Sequence[Contribution]) -> int:
    """Bytes of all contributions on disk."""
    return sum(piece.member.home.store.file(piece.name).stat().st_size for piece in {p.name: p for c in contributions for p in c.pieces}.values())
