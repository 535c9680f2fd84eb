"""Exact unrolling by reverse mode through every step of a training: the first-order truth of one training run, for small models.

Written apart from the library, with torch.func alone, so that it can judge it. For SGD with momentum ``v' = mu v + g + wd theta``,
``theta' = theta - lr v'``, with ``upon`` the adjoint of theta and ``held`` that of v: ``w = held - lr upon`` is the effect of a push at
this step, each example of the batch contributed ``<w, its gradient> / B``, and one step back ``upon += H w + wd w``, ``held = mu w``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from evidence_trainings import Training, objective, part
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from headwater.training import settled

MOMENTUM = 0.9
Parameters = dict[str, Tensor]


def path(training: Training, seed: int) -> tuple[torch.nn.Module, list[tuple[Parameters, Tensor, float, float, bool]]]:
    """The same training again (see :func:`evidence_trainings.fit`): the model, and for each step the weights before it, the columns
    of its batch, learning rate, weight decay, and whether it begins a stage (the momentum buffer is empty)."""
    train = training.data()[0]
    steps = []
    with settled(seed):
        model = training.build()
        for stage, phase in enumerate(training.phases):
            inputs, targets = part(train, stage)
            optimizer = torch.optim.SGD(model.parameters(), lr=phase["rate"], momentum=MOMENTUM, weight_decay=phase["decay"])
            total, first = phase["epochs"] * math.ceil(len(targets) / phase["batch"]), int((train[2] < stage).sum())
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if phase["cosine"] else None
            begins = True
            for _ in range(phase["epochs"]):
                for ids in torch.randperm(len(targets)).split(phase["batch"]):
                    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
                    steps.append((weights, ids + first, optimizer.param_groups[0]["lr"], phase["decay"], begins))
                    begins = False
                    optimizer.zero_grad()
                    objective(model(inputs[ids]), targets[ids]).backward()
                    optimizer.step()
                    if schedule is not None:
                        schedule.step()
    return model, steps


def unrolled(training: Training, seed: int) -> np.ndarray:
    """Change of each query's measurement that each example caused, to first order in its weight: (queries, examples), Headwater's sign."""
    model, steps = path(training, seed)
    train, (queries, labels) = training.data()

    def measure(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return training.task.measure(lambda inputs: functional_call(model, p, (inputs,)), (x[None], y[None]))[0]

    def loss(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return objective(functional_call(model, p, (x,)), y)

    def each(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return vmap(lambda a, b: loss(p, a[None], b[None]))(x, y)

    scores = np.zeros((len(queries), len(train[0])))
    final = {n: p.detach() for n, p in model.named_parameters()}
    upon = vmap(grad(measure), in_dims=(None, 0, 0))(final, queries, labels)
    held = {k: torch.zeros_like(v) for k, v in upon.items()}
    for p, ids, rate, decay, begins in reversed(steps):
        x, y = train[0][ids], train[1][ids]
        w = {k: held[k] - rate * upon[k] for k in upon}
        scores[:, ids] += vmap(lambda v, p=p, x=x, y=y: jvp(lambda q: each(q, x, y), (p,), (v,))[1])(w).numpy() / len(ids)
        bent = vmap(lambda v, p=p, x=x, y=y: jvp(lambda q: grad(loss)(q, x, y), (p,), (v,))[1])(w)
        upon = {k: upon[k] + bent[k] + decay * w[k] for k in upon}
        held = {k: torch.zeros_like(v) if begins else MOMENTUM * v for k, v in w.items()}
    return scores
