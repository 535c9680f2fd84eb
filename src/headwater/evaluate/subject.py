"""What every metric of faithfulness judges, looked at before the work: scores, the model that they are of, and what replaces a part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.evaluate.parts import Parts, arrays_of, parts_of
from headwater.evaluate.probes import Points, Probe, measured, once, probe_of
from headwater.features import baselines
from headwater.result import FeatureScores


@dataclass(frozen=True, eq=False)
class Subject:
    """What a metric judges: a probe, the parts with their scores, what replaces them, f(x) and f at the fill, both (n,).

    ``contributions``: whether the scores are known to be in units of f (FeatureScores), rather than given numbers.
    """

    probe: Probe
    parts: Parts
    fill: baselines.References
    output: np.ndarray
    filled: np.ndarray
    method: str
    contributions: bool
    notes: tuple[str, ...]
    batch_size: int | None

    @property
    def n(self) -> int:
        """How many examples."""
        return len(self.output)

    def without(self, removed: np.ndarray) -> np.ndarray:
        """(n, s): the mean of f over the fills, with the parts of ``removed`` (n, s, count) replaced."""
        n, s, count = removed.shape
        device = self.probe.x[0].device
        masks, rows = torch.from_numpy(removed.reshape(n * s, count)).to(device), torch.arange(n, device=device).repeat_interleave(s)

        def change(places: Tensor, x: Points, b: Points) -> Points:
            out = self.parts.chosen(masks[places], rows[places])
            return tuple(torch.where(o, bb, xx) for o, xx, bb in zip(out, x, b, strict=True))

        return measured(self.probe, rows, change, self.fill, self.batch_size).cpu().numpy().reshape(n, s)


def subject_of(scores: Any, model: Any, inputs: Any, target: Any, fill: Any, parts: Any, extra: Any, output: str | None, batch_size: int | None, seed: int) -> Subject:
    """Everything is looked at here, before the work. Raises InputError, NotFinite."""
    mine = isinstance(scores, FeatureScores)
    function = callable(model) and not isinstance(model, nn.Module)  # of arrays or of tensors? its inputs tell
    inputs = scores.inputs if inputs is None and mine and not function else inputs
    if inputs is None and mine and function:
        raise InputError("a function, and no inputs", "the inputs that were explained, as it takes them", "pass inputs=")
    if inputs is None:
        raise InputError("scores that do not hold their inputs, and no inputs", "the inputs that were explained", "pass inputs=")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}", "at least 1", "leave it out")
    probe = probe_of(model, inputs, target, extra, output)
    cut, notes = parts_of(probe.own(arrays_of(scores)), probe.x, parts, words_of(scores, probe.x) if mine else None), []
    own = mine and fill is None and scores.reference is not None
    if own and scores.stderr is not None and "Smooth" not in scores.method:
        notes.append("Parts are replaced with the mean of several baselines; fill= takes the baselines themselves.")
    found = probe.fills(scores.reference if own else fill, seed)
    found = baselines.References(found.points, found.weights, scores.baseline) if own else found
    rows = torch.arange(len(probe.x[0]), device=probe.x[0].device)
    value = measured(probe, rows, lambda _, x, __: x, once(found), batch_size).cpu().numpy()
    if mine:
        notes += _same_question(scores, value)
    subject = Subject(probe, cut, found, value, value, scores.method if mine else "the given scores", mine, tuple(notes), batch_size)
    return replace(subject, filled=subject.without(np.ones((subject.n, 1, cut.count), bool))[:, 0])


def words_of(scores: FeatureScores, x: Points) -> Tensor | None:
    """(n, positions) which tokens of explained texts belong to words: special tokens and padding stay as they are. None where that is not known."""
    ids = scores.provenance.get("word_ids")
    if scores.kind != "text" or ids is None or len(x) != 1 or x[0].ndim != 2 or not all(any(w is not None for w in row) for row in ids):
        return None
    found = torch.zeros(x[0].shape, dtype=torch.bool)
    for k, row in enumerate(ids):
        found[k, : len(row)] = torch.tensor([w is not None for w in row])[: found.shape[1]]
    return found


def _same_question(scores: FeatureScores, value: np.ndarray) -> list[str]:
    """Raise InputError where f is not what the scores explain; a note where they explain a mean over noisy copies."""
    gap = float(np.abs(scores.output - value).max())
    if gap <= 1e-2 * max(float(np.abs(value).max()), float(np.abs(scores.output).max())) + 1e-9:
        return []
    if "Smooth" in scores.method:
        return [f"The scores explain a mean over noisy copies of the inputs, which differs from f(x) by up to {gap:.3g}."]
    raise InputError(
        f"outputs that differ from those explained by up to {gap:.3g}",
        f"the model and the target that the scores are of ({scores.target})",
        "pass the same model, inputs, target, extra and output as to explain",
    )
