"""What an ensemble is made of: members, each of them a model that the same question is put to.

An ensemble over variants of one model (dropout masks, adapters) is a frozen record with two things: ``method``, what it scores by, and
``variants(run)``, its members for a run. Everything else (keeping, resuming, combining, standard errors) is done in carrying.py for all
of them, and :class:`headwater.Ensemble` repeats it for every independent model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from headwater.influence.methods import Method
from headwater.influence.proving import prove
from headwater.influence.queries import Asked
from headwater.influence.request import Request, Scorer
from headwater.store import content_hash
from headwater.tasks.code import code_digest, task_identity
from headwater.training import Run

SEEDS = 2**31
"""How many seeds a member may have for its method's own chance."""


def as_asked(asked: Asked) -> Asked:
    """The question as it is."""
    return asked


@dataclass(frozen=True, eq=False)
class Member:
    """One member: a model and what chance it has of its own.

    Args:
        key: names it by content (weights, mask, adapter, seeds): two members of one key are the same member. Members are summed in
            the order of their keys, so that the order in which they are given changes nothing.
        home: the independent model that it belongs to: members of one home vary less than those of two. What a member contributes
            is kept in its home's store.
        name: for people: "mask 3".
        view: makes the run that the method is applied to: ``home`` itself, a view of it, or a run of its own. Called when the member
            is computed, and only if its contribution is not kept already, so it may take long (adapters are trained in it).
        seed: of the method's own chance, 0 to 2**31 - 1 (a projection): see :func:`seeded`. 0 leaves the method as it is.
        ask: what has to be done to a question before this model can be asked it (ids for masks that belong to examples).
        shares: the member whose gradients it shares: then only the method's ``weight`` is taken under this one's view.
        trial: makes what the method is tried on before any work is done: a model that computes what the home's does, with the member's own
            parameters in it, untrained, and alone free to move. None where a view costs nothing: it is tried itself.
    """

    key: str
    home: Run
    name: str
    view: Callable[[], Run]
    seed: int = 0
    ask: Callable[[Asked], Asked] = as_asked
    shares: Member | None = None
    trial: Callable[[], nn.Module] | None = None

    def request(self, request: Request) -> Request:
        """The question put to this member."""
        return replace(request, run=self.view(), asked=self.ask(request.asked))

    def prove(self, method: Any, request: Request) -> None:
        """Raise, before any work is done, what the method would raise where it cannot work on this member."""
        if self.trial is not None:
            model = self.trial()
            prove(method, request.of(self.home), model, sum(p.numel() for p in model.parameters() if p.requires_grad))
            return
        own = self.request(request)
        run, moved = own.run, frozenset[str]().union(*(stage.trainable for stage in own.run.stages))
        model = run.load(run.model(), run.checkpoints[-1])
        prove(method, own, model, sum(p.numel() for name, p in model.named_parameters() if name in moved))


@runtime_checkable
class Variants(Protocol):
    """Several members made of one model: dropout masks, adapters. A frozen record whose ``repr`` names its settings."""

    @property
    def method(self) -> Method | Scorer: ...

    def variants(self, run: Run) -> Sequence[Member]:
        """The members made of this run's model. Refuses, before work is done, a run or a method that it cannot be used with."""
        ...


@runtime_checkable
class Seeded(Protocol):
    """A method with chance of its own (a random projection), of which each member gets its own draw."""

    def member(self, k: int) -> Any: ...


@runtime_checkable
class Weighing(Protocol):
    """A method with a part that needs only forward passes: ``parts`` holds it under "weight", and ``weight`` gives it alone. (train,)"""

    def weight(self, request: Request) -> Any: ...


def seeded(method: Any, seed: int) -> Any:
    """The method as a member applies it: with a draw of its own where it draws anything."""
    return method.member(seed) if seed and isinstance(method, Seeded) else method


def model_key(run: Run) -> str:
    """Names a run's model by content: all of its recorded weights, and what a view changed about it.

    Two runs of one key are the same training, whatever their directories are called.
    """
    return content_hash("model-1", [run.weights_hash(step) for step in run.checkpoints], run.architecture)


def weights_key(run: Run) -> str:
    """Names a run's weights, whatever is computed with them: what masks are drawn by, so that the same network written in another way meets
    the same ones."""
    return content_hash("weights-1", [run.weights_hash(step) for step in run.checkpoints], run.variant)


def seed_of(key: str) -> int:
    """A seed from a content's name, at least 1."""
    return 1 + int(key[:12], 16) % (SEEDS - 1)


def surroundings(run: Run) -> list[Any]:
    """What a contribution depends on besides the member, the method and the question: data, tasks, steps and the code of the model."""
    data = [[s.fingerprint, task_identity(s.task)] for s in run.stages]
    return [data, run.manifest["steps"]["checksum"], code_digest(run.build)]
