"""kronfluence on the GPT-2 shape."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence import analyzer as analyzers
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor import covariance, eigen
from kronfluence.score import pairwise
from kronfluence.task import Task

from speed import gpt2
from speed.gpt2_headwater import DAMPING
from speed.meter import Meter

warnings.filterwarnings("ignore", category=FutureWarning)


class Sequences(Task):
    def __init__(self, amp: bool, layers: list[str]) -> None:
        super().__init__()
        self.amp, self.layers = amp, layers

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        return gpt2.loss(model, batch[0], self.amp).sum()

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers


def passes(place: Path, tiny: bool, amp: bool) -> dict[str, Any]:
    shape = gpt2.start(tiny)
    train, queries = (torch.utils.data.TensorDataset(ids) for ids in gpt2.sequences(shape))
    model = gpt2.build(shape)
    meter = Meter(gpt2.wait)
    for module in (covariance, eigen, pairwise):
        meter.book(module, "save_file", "disk")
    kind = torch.bfloat16 if amp else None
    with meter.stage("set-up"):
        task = Sequences(amp, gpt2.layers(model))
        analyzer = analyzers.Analyzer(
            "bench", analyzers.prepare_model(model, task), task, cpu=not torch.cuda.is_available(),
            output_dir=tempfile.mkdtemp(), disable_tqdm=True, log_level=logging.ERROR,
        )  # fmt: skip
    given: dict[str, Any] = {"factors_name": "f", "factor_args": FactorArguments(strategy="ekfac", use_empirical_fisher=True, amp_dtype=kind)}
    with meter.stage("covariance"):
        analyzer.fit_covariance_matrices(dataset=train, per_device_batch_size=shape.batch, **given)
    with meter.stage("eigendecomposition"):
        analyzer.perform_eigendecomposition(**given)
    with meter.stage("eigenvalue correction"):
        analyzer.fit_lambda_matrices(dataset=train, per_device_batch_size=shape.batch, **given)
    with meter.stage("pairwise"):
        analyzer.compute_pairwise_scores(
            "s", "f", queries, train, per_device_query_batch_size=shape.queries, per_device_train_batch_size=shape.batch,
            score_args=ScoreArguments(damping_factor=DAMPING, amp_dtype=kind),
        )  # fmt: skip
    np.save(place / "scores-kronfluence.npy", analyzer.load_pairwise_scores("s")["all_modules"].float().numpy() / len(train))
    return gpt2.costs(meter)
