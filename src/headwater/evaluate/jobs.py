"""One retraining: a subset and a seed in, the measurements of one model out. The same code runs in every process and engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from headwater.errors import NotFinite
from headwater.tasks.batches import Examples, take, to
from headwater.tasks.task import per_example
from headwater.training import settled

MEASURED_AT_ONCE = 256  # queries per forward pass


@dataclass(frozen=True, eq=False)
class Job:
    """Train on the examples ``kept`` (None: all of them) with ``seed``. ``subset``: the number of the subset, None for the full set."""

    subset: int | None
    seed: int
    kept: np.ndarray | None

    @property
    def name(self) -> str:
        """How the bank files it: ``00012-1``, ``full-0``."""
        return f"{'full' if self.subset is None else f'{self.subset:05d}'}-{self.seed}"

    def __str__(self) -> str:
        return f"{'the full set' if self.subset is None else f'subset {self.subset}'}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Work:
    """What every job shares. ``measure``: ``(model, batch) -> (n,)`` in place of the task's own, or None."""

    experiment: Any
    measure: Callable[..., Any] | None = None

    def __call__(self, job: Job) -> np.ndarray:
        """Train one model and measure every query: float64, shape (queries,).

        Chance, one thread and eval mode are fixed here, so that the answer does not depend on which process asks.
        """
        with settled(job.seed, threads=1):  # sums in another order are other sums
            fresh = self.experiment.build()
            trained = self.experiment.fit(fresh, select(self.experiment.train, job.kept), job.seed)
            values = measurements(trained if trained is not None else fresh, self.experiment, self.measure)
        if not np.isfinite(values).all():
            raise NotFinite(
                f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} measurements of the model trained on {job} are NaN or infinite",
                "finite measurements",
                "the training probably diverged: lower the learning rate, or clip the gradients",
            )
        return values


def select(data: Any, kept: np.ndarray | None) -> Any:
    """The dataset that ``fit`` gets: the same kind of thing as ``data``, holding the examples ``kept`` (None: ``data`` itself).

    Tensors (tuples, dicts, dataclasses of tensors, TensorDataset) are cut; any other map-style dataset becomes a ``torch.utils.data.Subset``.
    """
    if kept is None:
        return data
    if isinstance(data, Examples):
        return Examples(select(data.data, kept), data.collate)
    columns = Examples(data).columns
    if columns is None:
        return Subset(data, [int(i) for i in kept])
    cut = take(columns, torch.tensor(kept, dtype=torch.long))
    return TensorDataset(*cut) if isinstance(data, TensorDataset) else cut


def measurements(model: nn.Module, experiment: Any, measure: Callable[..., Any] | None = None) -> np.ndarray:
    """f(z_q; theta) of every query of ``experiment.test``: float64, shape (queries,), in eval mode, on the model's own device."""
    queries = experiment.task.examples(experiment.test)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ask = measure or experiment.task.measure
    model.eval()
    with torch.no_grad():
        spans = [range(i, min(i + MEASURED_AT_ONCE, len(queries))) for i in range(0, len(queries), MEASURED_AT_ONCE)]
        batches = (to(queries.batch(span), device) for span in spans)
        found = [per_example(ask(model, batch), batch, "measure").double().cpu() for batch in batches]
    return torch.cat(found).numpy()

