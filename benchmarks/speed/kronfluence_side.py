"""kronfluence as a contestant."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional as F

from speed.meter import Meter
from speed.problem import read

warnings.filterwarnings("ignore", category=FutureWarning)


class Digits(Task):
    """Summed cross-entropy, and a query's loss as its measurement."""

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        if sample:
            raise NotImplementedError("all contestants take the true labels, so that their factors are equal")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)


def influence(place: Path, dampings: list[float], labels: list[str], batches: tuple[int, int, int]) -> dict[str, Any]:
    """Factors once, then scores for each damping. ``batches``: examples at once for factors, for queries, and scored."""
    problem = read(place)
    model = problem.model()
    meter = Meter()
    with meter.stage("set-up"):
        model = prepare_model(model, Digits())
        analyzer = Analyzer("bench", model, Digits(), cpu=True, output_dir=tempfile.mkdtemp(), disable_tqdm=True, log_level=logging.ERROR)
        train, queries = (torch.utils.data.TensorDataset(*data) for data in (problem.train, problem.queries))
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
    given: dict[str, Any] = {"factors_name": "factors", "factor_args": arguments}
    with meter.stage("covariance"):
        analyzer.fit_covariance_matrices(dataset=train, per_device_batch_size=batches[0], **given)
    with meter.stage("eigendecomposition"):
        analyzer.perform_eigendecomposition(**given)
    with meter.stage("eigenvalue correction"):
        analyzer.fit_lambda_matrices(dataset=train, per_device_batch_size=batches[0], **given)
    for damping, label in zip(dampings, labels, strict=True):
        with meter.stage(f"scores {label}"):
            analyzer.compute_pairwise_scores(
                label, "factors", queries, train, per_device_query_batch_size=batches[1], per_device_train_batch_size=batches[2],
                score_args=ScoreArguments(damping_factor=damping),
            )  # fmt: skip
    report = meter.report()
    for label in labels:  # Headwater's unit: divided by the number of training examples
        np.save(place / f"scores-{label}.npy", analyzer.load_pairwise_scores(label)["all_modules"].numpy() / len(train))
    return report
