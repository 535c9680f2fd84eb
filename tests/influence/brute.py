"""SOURCE and influence written out in parameter space with torch.func: every matrix whole, every gradient explicit. Small models only."""

import numpy as np
import torch
from torch.func import functional_call, grad, jacrev, vmap


def names_of(model):
    return [n for n, p in model.named_parameters() if p.requires_grad]


class Brute:
    """Everything about a run's model as flat float64 arrays, parameters in the order of ``named_parameters``."""

    def __init__(self, run):
        self.run, self.model = run, run.model()
        self.names = names_of(self.model)
        self.sizes = [self.model.get_parameter(n).numel() for n in self.names]

    def flat(self, tensors, fill=0.0):
        return np.concatenate([tensors[n].double().flatten().numpy() if n in tensors else np.full(s, fill) for n, s in zip(self.names, self.sizes, strict=True)])

    def each(self, values):
        """One number per parameter name, spread over its entries."""
        return np.concatenate([np.full(s, values.get(n, 0.0)) for n, s in zip(self.names, self.sizes, strict=True)])

    def at(self, steps):
        """Mean weights of some checkpoints."""
        states = [self.run.weights(s) for s in steps]
        return {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}

    def gradients(self, function, state, batch):
        """Gradients (n, parameters) of a function that returns (n,), one example at a time."""
        free = {n: state[n] for n in self.names}

        def single(p, row):
            return function(_Bound(self.model, {**state, **p}), tuple(t.unsqueeze(0) for t in row))[0]

        rows = vmap(grad(single), (None, 0))(free, batch)
        return torch.cat([rows[n].flatten(1) for n in self.names], 1).detach().numpy()

    def gauss_newton(self, state, x, hessian):
        """Mean over examples of J^T A J, with A = hessian(outputs) (n, k, k)."""
        free = {n: state[n] for n in self.names}

        def out(p, row):
            return functional_call(self.model, {**state, **p}, (row.unsqueeze(0),))[0]

        jac = vmap(jacrev(out), (None, 0))(free, x)
        j = torch.cat([jac[n].flatten(2) for n in self.names], 2)
        a = hessian(vmap(out, (None, 0))(free, x))
        return (torch.einsum("nkp,nkl,nlq->pq", j, a, j) / len(x)).detach().numpy()


class _Bound:
    """A model with its parameters filled in, callable like one."""

    def __init__(self, model, state):
        self.model, self.state = model, state

    def __call__(self, *args):
        return functional_call(self.model, self.state, args)


def spectral(matrix, f):
    s, v = np.linalg.eigh((matrix + matrix.T) / 2)
    return (v * f(np.clip(s, 0, None))) @ v.T


def response(t):
    def f(s):
        safe = np.where(s * t < 1e-12, 1.0, s)
        return np.where(s * t < 1e-12, t, -np.expm1(-t * safe) / safe)

    return f


def source(brute, measure, queries, segments, curvature, average="gradients"):
    """SOURCE, Eqs. 15-24 and (Adam) 43, with explicit matrices. ``curvature(state, stage)`` gives H without decay."""
    run = brute.run
    u = brute.gradients(measure, run.weights(run.checkpoints[-1]), queries)
    out = np.zeros((len(u), run.size))
    for segment in reversed(segments):
        stage = run.stages[segment.stage]
        rates = run.rates(segment.start, segment.stop)
        t = max(rates.values())
        states = [brute.at([c]) for c in segment.checkpoints] if average == "gradients" else [brute.at(segment.checkpoints)]
        h = np.mean([curvature(state, stage) for state in states], 0)
        p = brute.each({n: r / t for n, r in rates.items()})
        if stage.optimizer.kind == "adam":
            v = np.mean([brute.flat(run.second_moments(c)) for c in segment.checkpoints], 0)
            eps = brute.each({n: g.eps for g in stage.optimizer.groups for n in g.names})
            p = p / (np.sqrt(v) + eps)
        decay = brute.each({n: g.weight_decay for g in stage.optimizer.groups for n in g.names if not g.decoupled})
        apart = brute.each({n: g.weight_decay * rates[n] / t for g in stage.optimizer.groups for n in g.names if g.decoupled})
        root = np.sqrt(p)
        m = root[:, None] * (h + np.diag(decay)) * root + np.diag(apart)
        g = np.mean([brute.gradients(stage.task.loss, state, stage.data.data) for state in states], 0)
        psi = ((u * root) @ spectral(m, response(t))) * root
        out[:, stage.columns.start : stage.columns.stop] -= psi @ g.T / stage.size
        held = root == 0
        u = np.where(held, u, ((u * root) @ spectral(m, lambda s, t=t: np.exp(-t * s))) / np.where(held, 1, root))
    return out
