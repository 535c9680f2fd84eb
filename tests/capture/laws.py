"""What every test of capture needs: a loss for any model, the reference by plain autograd, and the comparison."""

import torch

from headwater.capture import Capture

WORST: dict[str, float] = {}


def loss(model, batch):
    """Uneven over outputs, so that no two of them can be confused; any model, any batch."""
    out = model(**batch) if isinstance(batch, dict) else model(*batch)
    out = out.flatten(1).double() if out.dtype == torch.float64 else out.flatten(1).float()
    return (out**3 * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sum(1) + out.sum(1)


def truth(net, function, batch, column=None):
    """{name: (n, *shape)} by ``backward()`` on one example at a time: the definition, written without the package."""
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    items = batch.items() if isinstance(batch, dict) else enumerate(batch)
    n = len(next(iter(dict(items).values())))
    rows = {name: [] for name in parameters}
    for i in range(n):
        one = {k: t[i : i + 1] for k, t in batch.items()} if isinstance(batch, dict) else tuple(t[i : i + 1] for t in batch)
        out = function(net, one)
        value = out[0] if column is None else out[0, column]
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True) if value.requires_grad else [None] * len(parameters)
        for (name, p), g in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g.to_dense())
    return {name: torch.stack(g) for name, g in rows.items()}


def rows_of(capture, gradients):
    """Captured gradients by parameter, {name: (n, *shape)}."""
    found = {}
    for name, block in capture.blocks.items():
        shapes = {p: capture._parameters[p].shape for p in block.parameters}
        found.update(block.unpack(gradients[name].dense(), shapes))
    return found


def difference(found, expected):
    """Largest difference over all parameters, relative to the largest gradient of any; both must name the same parameters."""
    assert found.keys() == expected.keys()
    scale = max(float(t.abs().max()) for t in expected.values() if t.numel())
    return max(float((found[name].to(t.dtype) - t).abs().max()) for name, t in expected.items() if t.numel()) / scale


def captured(net, batch, function=loss):
    capture = Capture(net, function, batch)
    return capture, capture.gradients(function, batch)
