"""The members that a model trained with dropout already holds: one for each mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from headwater.errors import InputError
from headwater.influence.ensembles.carrying import carry_out
from headwater.influence.ensembles.ensemble import check_method, plain
from headwater.influence.ensembles.keyed import keyed_question, keyed_run
from headwater.influence.ensembles.masks import Ids, MaskedBuild
from headwater.influence.ensembles.members import Member, Weighing, weights_key
from headwater.influence.ensembles.survey import AFTER_ACTIVATIONS, Survey, survey, tell
from headwater.influence.queries import Asked
from headwater.influence.request import Request
from headwater.influence.shapley import KNNShapley
from headwater.influence.unrolled import Unrolled
from headwater.result import TrainingScores
from headwater.store import content_hash
from headwater.training import Run

MASKS = ("member", "example")


@dataclass(frozen=True, repr=False)
class DropoutEnsemble:
    """A method averaged over dropout masks of one model: more members without more training (Deng, Li, Zhang and Ma 2024,
    arXiv 2405.17293).

    Every dropout module is replaced by a mask that is the same at every call, so that a member is a fixed sub-network: it is what
    gradients of both sides, curvature and weights are taken of, at every checkpoint. Masks come from a counter-based generator,
    keyed by ``seed``, the model, the member's number, the module and the unit: member 3 of 4 is member 3 of 10.

    Args:
        method: what to score by. Scores are averaged, of TRAK kernel and weight apart.
        members: how many masks.
        forward_only: gradients, projection and kernel are those of the whole model, taken once; only the weights of training
            examples (TRAK's ``1 - p``) are taken under the masks, which costs forward passes alone. It re-weighs training examples: the
            order of queries for a given training example never changes.
        masks: "member": one mask for all examples; "example": each example has a mask of its own, keyed by its column, or by the
            content of a query. Neither depends on batch size or order.
        rate: in place of the rates that the model was trained with.
        insert: for models without dropout: ``{"name of a layer": rate}`` drops from that layer's output; "activations" drops, with
            ``rate``, after every activation module. A warning says that this is no longer the trained model.
        seed: of the masks.

    Handled are ``nn.Dropout``, ``Dropout1d/2d/3d``, ``AlphaDropout`` and ``FeatureAlphaDropout``. Dropout inside a function (attention's own,
    ``F.dropout``, ``nn.LSTM(dropout=)``) cannot be decided beforehand: it stays off, and a warning names it. A module that is called several times
    in a forward pass has a mask for each call.

    ``stderr`` says how much masks differ, for this model: what another training would give it cannot know. For that, ``hw.Ensemble(
    hw.DropoutEnsemble(method, members=4), runs)`` has masks of several models; its ``spread`` compares one more mask with one more model.

    Raises:
        InputError: a model without dropout, a rate outside 0 to 1, ``forward_only`` for a method without a part that needs only
            forward passes, an unknown layer. GradientError: masks that cannot be given to examples.

    >>> import headwater as hw
    >>> DropoutEnsemble(hw.GradDot(), members=4)
    DropoutEnsemble(GradDot(), members=4)
    """

    method: Any
    members: int = 10
    forward_only: bool = False
    masks: str = "member"
    rate: float | None = None
    insert: Mapping[str, float] | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_method(self.method, "DropoutEnsemble")
        if self.members < 1:
            raise InputError(f"members={self.members}", "at least one mask", "members=10")
        if self.masks not in MASKS:
            raise InputError(f"masks={self.masks!r}", f"one of {MASKS}", "see hw.DropoutEnsemble")
        if isinstance(self.insert, str) and self.insert != AFTER_ACTIVATIONS:
            raise InputError(f"insert={self.insert!r}", f"layers with their rates, or {AFTER_ACTIVATIONS!r}", "insert={'fc1': 0.1}")
        if isinstance(self.insert, str) and self.rate is None:
            raise InputError(f"insert={self.insert!r} without a rate", "how much to drop", f"insert={self.insert!r}, rate=0.1")
        layers = self.insert if isinstance(self.insert, Mapping) else {}
        for what, rate in {"rate": self.rate, **{f"insert[{name!r}]": value for name, value in layers.items()}}.items():
            if rate is not None and not 0 <= rate < 1:
                raise InputError(f"{what}={rate}", "a probability from 0 to below 1", "0.1, say")
        if self.forward_only and not isinstance(self.method, Weighing):
            raise InputError(
                f"forward_only for {self.method!r}: every part of its scores is made of gradients",
                "a method with a part that needs only forward passes: hw.Trak, whose weights are 1 - p of each training example",
                "leave forward_only out: each mask then has gradients of its own",
            )

        if isinstance(self.method, Unrolled):
            mend = "hw.Unrolled() by itself, or over independent models: hw.Ensemble(hw.Unrolled(), runs)"
            raise InputError("Unrolled under masks that training did not have", "a method that looks at recorded models: unrolling trains again", mend)
        if self.masks == "example" and (isinstance(self.method, KNNShapley) or getattr(self.method, "output", None) is not None):
            expected = "a method that sees examples by the run's own task: it knows nothing of ids where it looks at batches by itself"
            raise InputError(f"masks='example' for {self.method!r}", expected, "masks='member'")

    def __repr__(self) -> str:
        """The method, and what differs from the defaults."""
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if f.name == "members" or getattr(self, f.name) != f.default]
        return f"DropoutEnsemble({self.method!r}, {', '.join(said)})"

    def answer(self, request: Request) -> TrainingScores:
        """Scores averaged over the masks, with their standard errors (what :func:`headwater.trace` calls)."""
        return carry_out(repr(self), self.method, self.variants(request.run), request)

    def variants(self, run: Run) -> list[Member]:
        """One member for each mask of ``run``'s model."""
        found = survey(run, self.rate, self.insert)
        tell(found)
        whole = plain(run)
        return [self._member(run, found, number, whole) for number in range(self.members)]

    def _member(self, run: Run, found: Survey, number: int, whole: Member) -> Member:
        """The member of one mask: a view of the run, and, with masks of examples, of the question."""
        names = (self.seed, weights_key(run), number, self.masks)
        variant = content_hash("dropout-1", names, [asdict(site) for site in found.sites])
        ids = Ids() if self.masks == "example" else None

        def view() -> Run:
            seen = run if ids is None else keyed_run(run, ids)
            return replace(seen, build=MaskedBuild(run.build, found.sites, names, ids), variant=f"{run.variant}|dropout {number} {variant}")

        def ask(asked: Asked) -> Asked:
            return asked if ids is None else keyed_question(asked, ids)

        shares = whole if self.forward_only else None
        return Member(content_hash("dropout-member-1", whole.key, variant), run, f"mask {number}", view, number, ask, shares)
