"""Small modules that use their parameters in every way that a layer rule could get wrong."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Repeated(nn.Module):
    """One layer applied three times, one of them to another number of positions."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))) + self.layer(x[:, :1]))


class Tied(nn.Module):
    """A language model whose head is its embedding, with a bias of its own."""

    def __init__(self, bias=True):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embedding(tokens)).cumsum(1)))


class TiedByHand(nn.Module):
    """The same without a module for the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return F.linear(torch.tanh(self.mix(self.embedding(tokens)).cumsum(1)), self.embedding.weight)


class Positions(nn.Module):
    """Token and position embeddings, the latter the same for all examples; ``leading``: with a first axis of length 1."""

    def __init__(self, leading=False, time_major=False, project=False):
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 2)
        self.project = nn.Linear(4, 4) if project else nn.Identity()
        self.leading, self.time_major = leading, time_major

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        if self.time_major:
            x = self.token(tokens.T) + self.position(places).unsqueeze(1)
            return self.head(torch.tanh(x)).transpose(0, 1)
        position = self.project(self.position(places.unsqueeze(0) if self.leading else places))
        return self.head(torch.tanh(self.token(tokens) + position))


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.token(tokens.T))).cumsum(0)).transpose(0, 1)


class Flat(nn.Module):
    """Positions folded into the batch axis; ``swapped``: with the position as the slower axis."""

    def __init__(self, swapped=False):
        super().__init__()
        self.token, self.norm, self.head, self.swapped = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3), swapped

    def forward(self, tokens):
        n, length = tokens.shape
        folded = (tokens.T if self.swapped else tokens).reshape(-1)
        out = self.head(torch.tanh(self.norm(self.token(folded))))
        return out.reshape(length, n, 3).transpose(0, 1) if self.swapped else out.reshape(n, length, 3)


class PerHead(nn.Module):
    """Norms over the last axis of (n, positions, heads, width), as for queries and keys."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer, self.rms = nn.Linear(6, 6), nn.LayerNorm(3), nn.RMSNorm(3)

    def forward(self, x):
        heads = self.inner(x).unflatten(-1, (2, 3))
        return self.rms(torch.tanh(self.layer(heads))).flatten(-2)


class Sorted(nn.Module):
    """Runs its examples in the order of their sums, as packed sequences do."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        order = x.flatten(1).sum(1).argsort()
        hidden = torch.tanh(self.layer(x[order]))
        return self.head(hidden[order.argsort()])


class Experts(nn.Module):
    """Each position goes to one of two experts: how many rows an expert sees, and whose they are, depends on the data."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        flat = x.reshape(-1, 4)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            rows = (flat[:, 0] > 0) == bool(k)
            out[rows] = torch.tanh(expert(flat[rows]))
        return out.reshape(x.shape)


class Adaptive(nn.Module):
    """The number of times a layer is applied depends on the batch; a layer that is applied to some examples only."""

    def __init__(self):
        super().__init__()
        self.layer, self.rare, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        steps = (x[:, 0].detach().abs() * 3).long() + 1
        for step in range(int(steps.max())):
            x = torch.where((step < steps)[:, None], torch.tanh(self.layer(x) + x), x)
        chosen = (x.sum(1) > 0).nonzero().flatten()
        return x.index_add(0, chosen, self.rare(x[chosen])) if len(chosen) else x


class OneByOne(nn.Module):
    """A loop over the examples inside the model."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([torch.tanh(self.layer(row)) for row in x])


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4)) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Bare(nn.Module):
    """Parameters of no module, one of them a single number; a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.matrix = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(3, 3))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return torch.tanh(self.layer(x) @ self.matrix) * self.scale


class Detached(nn.Module):
    """A branch whose parameters get no gradient, and a module that is never called."""

    def __init__(self):
        super().__init__()
        self.layer, self.branch, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.branch(x).detach()


class Keywords(nn.Module):
    """Dict inputs, layers called by keyword, and a module that returns a tuple."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            hidden = torch.tanh(self.layer(input=x))
            return hidden, {"sum": hidden.sum(-1, keepdim=True)}

    def __init__(self):
        super().__init__()
        self.pair, self.head = self.Pair(), nn.Linear(4, 2)

    def forward(self, x, gate):
        hidden, extra = self.pair(x)
        return self.head(input=hidden * gate) + extra["sum"]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


def bags():
    return nn.Sequential(nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 2))


def frozen(build, *names):
    """A builder with these parameters frozen."""

    def built():
        net = build()
        for name in names:
            net.get_parameter(name).requires_grad_(False)
        return net

    return built


def hooked():
    """A layer whose user changes its output in a hook."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    net[0].register_forward_hook(lambda module, args, out: out * 3 + args[0][:, :3])
    return net
