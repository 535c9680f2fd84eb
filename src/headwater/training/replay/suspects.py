"""Why a replay left the record: each suspect is put to the test on the steps that can be to blame.

A test repeats those steps with one thing changed (other modes, clipping, another reduction ...). A suspect whose change leads back to the
record explains the departure; one that can only be seen to be there (a random layer without recorded numbers) is named as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.errors import ReplayMismatch
from headwater.tasks.batches import hash_of
from headwater.training.replay.player import Gradient, Player
from headwater.training.replay.script import Move, Script, split_parts
from headwater.training.replay.state import State
from headwater.training.replay.witness import Departure, distance

MAX_NORMS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
CASTS = (("cpu", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16"))


@dataclass(frozen=True)
class Suspect:
    """``name``: a word for programs; ``said``: what happened; ``mend``: what to do."""

    name: str
    said: str
    mend: str


@dataclass
class Scene:
    """The steps in question, the state before the first of them, and how near a trial must come to the record."""

    player: Player
    script: Script
    departed: Departure
    before: State
    tolerance: float

    @property
    def last(self) -> Move:
        return self.script.move(self.departed.steps[1])

    def leads_back(self, change: Callable[[Move], Move] = lambda move: move, then: Callable[[Gradient], Gradient] = lambda gradient: gradient) -> bool:
        """Whether the steps, with each move and gradient changed, meet the record."""
        first, last = self.departed.steps
        state, gradient = self.before, None
        for step in range(first, last + 1):
            move = change(self.script.move(step))
            begun = self.player.begin(state, move)
            gradient = then(self.player.gradient(begun, move))
            state = self.player.step(begun, move, gradient)
        assert gradient is not None
        if self.departed.what == "norm":
            return bool(abs(gradient.norm - self.departed.recorded) <= self.tolerance * max(gradient.norm, self.departed.recorded))
        held, then_ = self.player.run.weights(last), self.player.run.weights(0)
        return bool(distance(state.weights, held) <= self.tolerance * distance(held, then_, state.weights))


def mismatch(player: Player, script: Script, departed: Departure, before: State, tolerance: float) -> ReplayMismatch:
    """The error that names the step and what escaped. ``before``: the state before the last step in question."""
    first, last = departed.steps
    if before.step != first - 1:
        before = _again(player, script, first - 1)
    found = list(dict.fromkeys(_suspects(Scene(player, script, departed, before, tolerance))))
    where = f"at step {last}" if first == last else f"between steps {first} and {last}"
    if departed.what == "norm":
        how = f"the gradient's norm is {departed.found:.6g}, recorded {departed.recorded:.6g}"
    else:
        how = f"the weights after step {last} are off by {departed.found:.2g} of the way that training had moved them"
    why = "; ".join(s.said for s in found) or "none of these explains it: " + _TESTED
    mend = "; ".join(s.mend for s in found) or "look for what changes gradients or weights besides the task's loss and the optimizer, and record without it"
    given = f"training the run {player.run.path} again departs from its record {where} ({how}): {why}"
    return ReplayMismatch(given, "the training that was recorded, to rounding", mend, steps=departed.steps, escaped=tuple(s.name for s in found))


_TESTED = (
    "random layers, modes of layers, micro-batches, clipping, reduction, autocast, order of examples, optimizer state, changes of the weights outside of the "
    "optimizer, data that changes, kernels that differ from call to call. What is left is a gradient that is not the task's loss alone (a penalty, noise, a hook)"
)


def _again(player: Player, script: Script, step: int) -> State:
    """The replayed state after a step."""
    state = player.start()
    for k in range(1, step + 1):
        move = script.move(k)
        state = player.begin(state, move)
        state = player.step(state, move, player.gradient(state, move))
    return state


def _suspects(scene: Scene) -> Iterator[Suspect]:
    """All that explain it, or that are seen to be there; the tests that change least come first."""
    for search in (_touched, _data, _random, _kernels, _modes, _micro_batches, _clipping, _reduction, _autocast, _order, _remembered):
        found = list(search(scene))
        yield from found
        if found and search in (_touched, _data, _random, _modes, _micro_batches, _clipping, _reduction, _autocast):
            return
    yield from _loss(scene)
    yield from _machine(scene)


# ---- what can be seen


def _touched(scene: Scene) -> Iterator[Suspect]:
    first, last = scene.departed.steps
    after = last + 1 if scene.departed.what == "weights" else last
    at = [step for step in range(first, min(after, len(scene.script)) + 1) if scene.script.move(step).touched]
    if at:
        yield Suspect(
            "weights",
            f"weights were written to outside of the optimizer before step {at[0]} (set anew, clipped, averaged or loaded)",
            "record a training in which only the optimizer moves weights; begin a stage after loading weights",
        )


def _data(scene: Scene) -> Iterator[Suspect]:
    move, part = scene.last, scene.last.parts[0]
    if hash_of(scene.player.batch(move, part)) != hash_of(scene.player.batch(move, part)):
        yield Suspect("augmentation", "the dataset gives other values when it is read twice (random augmentation)", "augment before training and keep the result")


def _random(scene: Scene) -> Iterator[Suspect]:
    """Random numbers that the replay drew without a record of where the generator stood."""
    move = scene.last
    for part in (p for p in move.parts if p.random is None):
        before = torch.get_rng_state(), _cuda(scene)
        scene.player.gradient(scene.player.begin(scene.before, move), replace(move, parts=(part,)))
        if not torch.equal(before[0], torch.get_rng_state()) or not torch.equal(before[1], _cuda(scene)):
            layers = [n for n, m in scene.player.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p]
            what = f"dropout in {', '.join(layers[:3])}" if layers else "the model or the loss"
            yield Suspect(
                "dropout" if layers else "random",
                f"{what} draws random numbers whose generator's state was not recorded",
                "record with a model that is called as model(batch) and is not compiled, and draw nothing random in the loss",
            )
            return


def _cuda(scene: Scene) -> torch.Tensor:
    return torch.cuda.get_rng_state(scene.player.device) if scene.player.device.type == "cuda" else torch.zeros(0, dtype=torch.uint8)


def _kernels(scene: Scene) -> Iterator[Suspect]:
    """The same step twice, and not the same gradient."""
    move = scene.last
    begun = scene.player.begin(scene.before, move)
    one, two = (scene.player.gradient(begun, move).values for _ in range(2))
    apart, size = distance(one, two), distance(one, {n: torch.zeros_like(t) for n, t in one.items()})
    if apart > scene.tolerance * size:
        yield Suspect(
            "kernels",
            f"kernels that give another result at every call: the same step twice differs by {apart / size:.2g}",
            "train with torch.use_deterministic_algorithms(True) and record that",
        )


# ---- what a trial can tell


def _modes(scene: Scene) -> Iterator[Suspect]:
    modules = dict(scene.player.model.named_modules())
    everything = frozenset(modules)
    norms = frozenset(scene.player.norms)
    trials = {"in eval mode": frozenset(), "in training mode": everything, "in training mode, BatchNorm in eval mode": everything - norms}
    for words, mode in trials.items():
        if mode != scene.last.parts[0].mode and scene.leads_back(partial(_parts_with, mode=mode)):
            kinds = "BatchNorm" if norms else "its layers"
            yield Suspect(
                "mode",
                f"the model was {words} when gradients were computed, which the record does not say ({kinds})",
                "call the model as model(batch), so that its mode is noted",
            )
            return


def _micro_batches(scene: Scene) -> Iterator[Suspect]:
    """BatchNorm met other batches than the whole one."""
    move = scene.last
    if len(move.parts) > 1 or not any(move.parts[0].mode is None or n in move.parts[0].mode for n in scene.player.norms):
        return
    for count in range(2, min(len(move.ids), 64) + 1):
        width = math.ceil(len(move.ids) / count)
        if scene.leads_back(partial(_in_micro_batches, width=width)):
            what = f"BatchNorm saw micro-batches of {width} examples, which the record does not say"
            yield Suspect("batchnorm", what, "call the model as model(batch) for each of them")
            return


def _clipping(scene: Scene) -> Iterator[Suspect]:
    mend = "record the factor: recorder.step(indices, clip=max_norm / (total_norm + 1e-6))"
    if scene.departed.what == "norm":
        found, recorded = scene.departed.found, scene.departed.recorded
        norms = np.array([scene.script.move(k).norm for k in range(1, len(scene.script) + 1)])
        capped = abs(recorded - np.nanmax(norms)) <= 1e-3 * recorded and (abs(norms - recorded) <= 1e-3 * recorded).sum() > 1
        if recorded < found and (capped or _loss_agrees(scene)):
            cap = f" (to a norm of {recorded:.4g}, it seems)" if capped else ""
            yield Suspect("clipping", f"the gradient was clipped{cap}, by a factor of {recorded / found:.4g} that was not recorded", mend)
        return
    for most in MAX_NORMS:
        if scene.leads_back(then=partial(_clipped, most=most)):
            yield Suspect("clipping", f"gradients were clipped to a norm of {most}, by factors that were not recorded", mend)
            return


def _clipped(gradient: Gradient, most: float) -> Gradient:
    factor = min(1.0, most / (gradient.norm + 1e-6))
    return replace(gradient, values={n: g * factor for n, g in gradient.values.items()})


def _reduction(scene: Scene) -> Iterator[Suspect]:
    """A constant factor between the loop's loss and the record's: the other reduction, or micro-batches that were added up."""
    other = "sum" if scene.last.stage.reduction == "mean" else "mean"
    if scene.leads_back(partial(_reduced_by, other=other)):
        yield Suspect("reduction", f"the loop reduced losses by {other!r}; the recorder was told {scene.last.stage.reduction!r}", f'hw.Recorder(reduction="{other}")')
        return
    for times in range(2, 65):
        for factor, words in ((float(times), f"{times} micro-batches were added up, not averaged"), (1 / times, f"the loss was divided by {times} once too often")):
            if scene.leads_back(partial(_scaled, factor=factor)):
                what = f"the gradient is {factor:.4g} times that of the batch's mean loss: {words}"
                yield Suspect("scale", what, "make the loop minimise the mean over the whole batch")
                return


def _autocast(scene: Scene) -> Iterator[Suspect]:
    for cast in ((), *(c for c in CASTS if c[0] == scene.player.device.type)):
        if cast != scene.last.parts[0].cast and scene.leads_back(partial(_parts_with, cast=cast)):
            how = f"under autocast to {cast[1]}" if cast else "without autocast"
            yield Suspect("autocast", f"gradients were computed {how}, which the record does not say", "call the model inside the autocast, as model(batch)")
            return


def _parts_with(move: Move, **changes: Any) -> Move:
    return replace(move, parts=tuple(replace(part, **changes) for part in move.parts))


def _in_micro_batches(move: Move, width: int) -> Move:
    return split_parts(_parts_with(move, random=None), width)


def _reduced_by(move: Move, other: str) -> Move:
    return replace(move, stage=replace(move.stage, reduction=other))


def _scaled(move: Move, factor: float) -> Move:
    return replace(move, clip=move.clip * factor)


def _order(scene: Scene) -> Iterator[Suspect]:
    """Ids that count 0, 1, 2, ... from step to step are rather places in a shuffled loader than examples."""
    stage = scene.last.stage
    ids = np.concatenate([scene.script.move(k).ids for k in range(stage.start + 1, min(stage.stop, stage.start + 8) + 1)])
    if len(ids) > 1 and (ids[1:] == (ids[:-1] + 1) % stage.size).all() and not _loss_agrees(scene):
        yield Suspect(
            "order",
            "the recorded ids count 0, 1, 2, ... through the data: places in a shuffled loader, it seems, and not the examples' numbers",
            "let the dataset return each example's own number, and record those",
        )


def _remembered(scene: Scene) -> Iterator[Suspect]:
    stage = scene.last.stage
    if "remembered" not in scene.script.run.manifest["stages"][stage.index]:
        yield Suspect(
            "optimizer",
            f"the state that the optimizer of stage {stage.name!r} may have had when recording began was not recorded",
            "record again: this version keeps it, or begin with a new optimizer",
        )


def _loss_agrees(scene: Scene) -> bool:
    move = scene.last
    if np.isnan(move.loss):
        return False
    found = scene.player.gradient(scene.player.begin(scene.before, move), move).loss if scene.departed.steps[0] == scene.departed.steps[1] else np.nan
    return bool(abs(found - move.loss) <= scene.tolerance * max(abs(found), abs(move.loss)))


def _loss(scene: Scene) -> Iterator[Suspect]:
    move = scene.last
    if np.isnan(move.loss) or scene.departed.steps[0] != scene.departed.steps[1]:
        return
    found = scene.player.gradient(scene.player.begin(scene.before, move), move).loss
    if not _loss_agrees(scene):
        yield Suspect(
            "loss",
            f"the loss of that step is {found:.6g} by the task and was {move.loss:.6g} in the loop: another loss, or other examples",
            "give the recorder the task whose mean loss the loop minimises, and the ids of the examples it took",
        )
    elif scene.departed.what == "norm":
        yield Suspect(
            "penalty",
            f"the loss agrees ({found:.6g}) and the gradient does not: a penalty, noise or a gradient hook",
            "put the penalty into the task's loss, or weight decay into the optimizer",
        )


def _machine(scene: Scene) -> Iterator[Suspect]:
    from headwater.training.journal import machine

    manifest = scene.script.run.manifest
    then, now = manifest.get("replay", {}).get("machine", {}), machine()
    differ = [f"{key} {then[key]!r} then, {now[key]!r} now" for key in ("device", "processor") if key in then and then[key] != now[key]]
    if manifest["versions"].get("torch") != torch.__version__:
        differ.append(f"torch {manifest['versions'].get('torch')} then, {torch.__version__} now")
    if differ:
        yield Suspect("machine", f"another machine than the recording's ({'; '.join(differ)}), whose kernels round differently", "replay where the run was recorded")
