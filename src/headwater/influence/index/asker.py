"""An engine without training data: query gradients, and curvature that was estimated before."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.capture import Capture
from headwater.curvature import Curvature
from headwater.errors import InputError
from headwater.influence.engine import Engine, _batch_size, _finite, _group
from headwater.influence.methods import Fit
from headwater.influence.queries import Asked
from headwater.tasks.batches import to
from headwater.training import Run


@dataclass
class Asker(Engine):
    """As :class:`Engine`, but it never reads a training example: gradients are proved on the queries, and curvature is only loaded."""

    @classmethod
    def asking(cls, run: Run, asked: Asked, batch_size: int | None) -> Asker:
        """Build the model, load the final weights, and prove the gradients of the measure on the first two queries of each set."""
        model = run.model()
        model.load_state_dict(_finite(run.weights(run.checkpoints[-1]), run.checkpoints[-1]), strict=False)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        trained = tuple(n for n in names if any(n in stage.trainable for stage in run.stages))
        group = {n: tuple(_group(stage, n) for stage in run.stages) for n in trained}
        probes = [to(examples.batch(range(min(2, len(examples)))), run.device) for examples in asked.examples]
        capture = Capture(model, asked.measure, probes[0], trained, group_of=group.__getitem__)
        for probe in probes[1:]:
            capture.prove(asked.measure, probe)
        return cls(run, model, capture, batch_size or _batch_size(capture))

    def curvature(self, fit: Fit) -> Curvature:
        """The estimate from the run's store. Raises InputError where it was never made: that takes the training data."""
        if fit not in self._curvatures and not self.run.store.has("factors/" + self._key(fit)):
            at = ", ".join(map(str, sorted({step for _, weights in fit.at for step in weights})))
            raise InputError(
                f"a method whose curvature, {fit.estimate!r} at steps {at}, was not estimated when the index was built",
                "the index's own estimate and segments, or those of methods named then",
                "build it with hw.index(run, also=[that method]): what is kept already is not computed again",
            )
        return super().curvature(fit)
