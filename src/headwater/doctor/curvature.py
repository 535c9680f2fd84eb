"""EK-FAC against matrices formed by brute force, where the two must agree."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from headwater.capture import Capture
from headwater.curvature import EKFAC, Blockwise, Dense, Point, Setting
from headwater.tasks import Examples, Regression, Task

Data = tuple[torch.Tensor, torch.Tensor]
EXAMPLES = 40


def _data(inputs: int, outputs: int) -> Data:
    return torch.randn(EXAMPLES, inputs, dtype=torch.float64), torch.randn(EXAMPLES, outputs, dtype=torch.float64)


def _fitted(estimate: Any, capture: Capture, task: Task, data: Data) -> Any:
    point = Point(lambda: None, Examples(data), task, "")
    return estimate.fit([point], Setting(capture, EXAMPLES // 3, torch.device("cpu")))


def linear_layer() -> float:
    """Under squared error a linear layer's Gauss-Newton matrix is a Kronecker product, so nothing is approximated."""
    data, net, task = _data(5, 3), nn.Linear(5, 3).double(), Regression(outputs="sum")
    capture = Capture(net, task.loss, data)
    found: Blockwise = _fitted(EKFAC(), capture, task, data)
    dense = _fitted(Dense(), capture, task, data).operator.dense((18,))
    (name, block), *_ = capture.blocks.items()
    return float((found.operators[name].dense(block.shape) - dense).abs().max() / dense.abs().max())


def eigenvalues() -> float:
    """The spectrum of each layer of a network is the mean square of the gradients in EK-FAC's own basis, output by output."""
    data, task = _data(5, 2), Regression(outputs="sum")
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    capture = Capture(net, task.loss, data)
    found: Blockwise = _fitted(EKFAC(), capture, task, data)
    worst = 0.0
    for name in capture.blocks:
        operator: Any = found.operators[name]
        squares = torch.zeros(())
        for k in range(2):
            column = capture.gradients(partial(_output, task, k), data)[name].dense()
            squares = squares + operator.rotate(column).square().mean(0)
        worst = max(worst, float((squares - operator.spectrum).abs().max() / squares.abs().max()))
    return worst


def _output(task: Task, k: int, model: nn.Module, batch: Data) -> torch.Tensor:
    return task.exact(model, batch)[:, k]
