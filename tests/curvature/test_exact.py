"""EK-FAC and the dense curvatures where they must agree: one linear layer under squared loss."""

import torch
from torch import nn

from headwater import curvature, tasks
from headwater.capture import Capture


def fitted(estimate, net, task, data):
    capture = Capture(net, task.loss, data)
    point = curvature.Point(lambda: None, tasks.Examples(data), task, "")
    return estimate.fit([point], curvature.Setting(capture, 7, torch.device("cpu")))


def test_ekfac_equals_dense_gauss_newton_and_hessian_on_a_linear_layer():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, k, generator=generator, dtype=torch.float64) for k in (5, 3))
    net, task = nn.Linear(5, 3).double(), tasks.Regression(outputs="sum")
    kronecker = fitted(curvature.EKFAC(), net, task, (x, y)).operators["weight"].dense((1, 3, 6))
    one = torch.cat([x, torch.ones(50, 1, dtype=torch.float64)], 1)
    truth = torch.kron(torch.eye(3, dtype=torch.float64), 2 * one.T @ one / 50)
    assert torch.allclose(kronecker, truth, atol=1e-12)
    for matrix in ("gauss_newton", "hessian"):
        dense = fitted(curvature.Dense(matrix), net, task, (x, y)).operator.dense((18,))
        assert torch.allclose(dense, truth, atol=1e-12)
