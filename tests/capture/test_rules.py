"""Every layer rule against plain autograd, one example at a time, in float64."""

import pytest
import torch
from torch import nn

from headwater.capture import Capture
from headwater.capture.capture import columns
from headwater.capture.fallback import by_loop

torch.set_num_threads(1)


def conv(kind, x, **settings):
    return lambda: nn.Sequential(kind(4, 6, 3, **settings), nn.Tanh()), lambda n: torch.randn(n, 4, *x)


SPACES = {1: (nn.Conv1d, nn.ConvTranspose1d, (9,)), 2: (nn.Conv2d, nn.ConvTranspose2d, (7, 6)), 3: (nn.Conv3d, nn.ConvTranspose3d, (5, 6, 5))}
CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), lambda n: torch.randn(n, 5)),
    "linear on a sequence": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)), lambda n: torch.randn(n, 7, 5)),
    "linear, rank 4": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh()), lambda n: torch.randn(n, 2, 3, 5)),
    "in-place successor": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), lambda n: torch.randn(n, 5)),
    "embedding, norm": (
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=1), nn.LayerNorm(4), nn.Linear(4, 2)),
        lambda n: torch.arange(n * 6).reshape(n, 6) % 7,
    ),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6)), lambda n: torch.randn(n, 3, 4)),
    "GroupNorm, BatchNorm in eval": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.BatchNorm2d(6), nn.Tanh()), lambda n: torch.randn(n, 4, 6, 6)),
    "InstanceNorm": (lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), lambda n: torch.randn(n, 4, 6, 6)),
    "attention (fallback)": (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), lambda n: torch.randn(n, 5, 8)),
}
for dims, (kind, transposed, space) in SPACES.items():
    for mode in ("zeros", "reflect", "replicate", "circular"):
        CASES[f"Conv{dims}d {mode}"] = conv(kind, space, stride=2, padding=2, groups=2, padding_mode=mode)
    CASES[f"Conv{dims}d same, dilated"] = conv(kind, space, padding="same", dilation=2)
    CASES[f"ConvTranspose{dims}d"] = conv(transposed, space, stride=2, padding=1, output_padding=1, groups=2)


def loss(model, batch):
    return (model(batch[0]).flatten(1) ** 3).sum(1)


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_rule_equals_autograd(case):
    build, inputs = CASES[case]
    net, batch = build().eval(), (inputs(5),)
    capture = Capture(net, loss, batch)
    truth = by_loop(net, capture.trained, columns(loss), batch, 0)
    found = capture.gradients(loss, batch)
    for name, block in capture.blocks.items():
        shapes = {p: truth[p].shape[1:] for p in block.parameters}
        for parameter, rows in block.unpack(found[name].dense(), shapes).items():
            scale = max(float(t.abs().max()) for t in truth.values())
            assert float((rows - truth[parameter]).abs().max()) <= 1e-10 * scale, parameter
