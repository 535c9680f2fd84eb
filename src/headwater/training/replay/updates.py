"""One optimizer step of one parameter as a function, and the transpose of its derivative.

``forward`` repeats torch.optim's single-tensor formulas in their order of operations, so that its values are theirs to the last bit.
``backward`` is written by hand: all steps are elementwise, so several cotangents (with a leading axis) pass at once by broadcasting.

SGD (torch.optim.SGD):    g' = g + wd θ;  b' = μ b + (1-d) g' (b' = g' at first);  θ' = θ - lr (b', or g' + μ b' for Nesterov)
Adam (Kingma & Ba 2015):  m' = β1 m + (1-β1) g';  v' = β2 v + (1-β2) g'²;  θ' = θ - lr/(1-β1^t) m' / (sqrt(v'/(1-β2^t)) + eps),
with g' = g + wd θ, or (AdamW, Loshchilov & Hutter 2019) θ first shrunk by 1 - lr wd; AMSGrad (Reddi et al. 2018) divides by max(x, v').
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Moments = dict[str, Tensor]
BUFFER, FIRST, SECOND, LARGEST = "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


@dataclass(frozen=True)
class Sgd:
    """The settings of one group at one step. ``begins`` in the methods below: the buffer is still empty."""

    rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    decay: float = 0.0

    def empty(self, weight: Tensor) -> Moments:
        """What the optimizer remembers of a parameter that it never moved."""
        return {BUFFER: torch.zeros_like(weight)}

    def forward(self, weight: Tensor, moments: Moments, count: int, gradient: Tensor) -> tuple[Tensor, Moments]:
        """The step number ``count`` (from 1) of this parameter: (weight, moments) after it."""
        g = gradient.add(weight, alpha=self.decay) if self.decay else gradient
        if self.momentum:
            buffer = g.clone() if count == 1 else moments[BUFFER].mul(self.momentum).add_(g, alpha=1 - self.dampening)
            g = g.add(buffer, alpha=self.momentum) if self.nesterov else buffer
            moments = {BUFFER: buffer}
        return weight.add(g, alpha=-self.rate), moments

    def backward(self, weight: Tensor, moments: Moments, count: int, gradient: Tensor | None, upon: Tensor, held: Moments) -> tuple[Tensor, Moments, Tensor]:
        """Cotangents (queries, ...) of weight, moments and gradient before the step, from ``upon`` (of the weight) and ``held`` (of the
        moments) after it. The step is linear: values are not needed."""
        pull = -self.rate * upon
        if self.momentum:
            push, pull = (self.momentum * pull, pull) if self.nesterov else (pull, torch.zeros_like(pull))
            buffer = held[BUFFER] + push
            pull = pull + (buffer if count == 1 else (1 - self.dampening) * buffer)
            held = {BUFFER: torch.zeros_like(buffer) if count == 1 else self.momentum * buffer}
        return upon + self.decay * pull if self.decay else upon, held, pull

    @property
    def linear(self) -> bool:
        """Whether ``backward`` can do without the gradient's value."""
        return True


@dataclass(frozen=True)
class Adam:
    """The settings of one group at one step."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False

    def empty(self, weight: Tensor) -> Moments:
        """What the optimizer remembers of a parameter that it never moved."""
        return {key: torch.zeros_like(weight) for key in (FIRST, SECOND, *((LARGEST,) if self.amsgrad else ()))}

    def _decayed(self, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if not self.decay:
            return weight, gradient
        if self.decoupled:
            return weight.mul(1 - self.rate * self.decay), gradient
        return weight, gradient.add(weight, alpha=self.decay)

    def _moved(self, moments: Moments, g: Tensor) -> Moments:
        first = moments[FIRST].lerp(g, 1 - self.beta1)
        second = moments[SECOND].mul(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return {FIRST: first, SECOND: second, **({LARGEST: torch.maximum(moments[LARGEST], second)} if self.amsgrad else {})}

    def _root(self, moments: Moments, count: int) -> Tensor:
        """``sqrt(v / (1 - β2^t))``: what eps is added to."""
        return moments[LARGEST if self.amsgrad else SECOND].sqrt() / (1 - self.beta2**count) ** 0.5

    def forward(self, weight: Tensor, moments: Moments, count: int, gradient: Tensor) -> tuple[Tensor, Moments]:
        """The step number ``count`` (from 1) of this parameter: (weight, moments) after it."""
        weight, g = self._decayed(weight, gradient)
        moments = self._moved(moments, g)
        size = self.rate / (1 - self.beta1**count)
        return weight.addcdiv(moments[FIRST], self._root(moments, count).add_(self.eps), value=-size), moments

    def backward(self, weight: Tensor, moments: Moments, count: int, gradient: Tensor | None, upon: Tensor, held: Moments) -> tuple[Tensor, Moments, Tensor]:
        """Cotangents (queries, ...) of weight, moments and gradient before the step. Where v' is 0, so that its root has no derivative,
        g' is 0 too and v' moves with g'² only: that path counts 0."""
        assert gradient is not None
        _, g = self._decayed(weight, gradient)
        after = self._moved(moments, g)
        root, size = self._root(after, count), self.rate / (1 - self.beta1**count)
        below = root + self.eps
        first = held[FIRST] - size / below * upon
        # dθ'/dv' = size m' / below² * d root / d v', and d root / d v' = 1 / (2 root (1 - β2^t))
        slope = torch.where(root > 0, size * after[FIRST] / (below * below * 2 * (1 - self.beta2**count) * root), 0.0)
        second, out = held[SECOND], {}
        if self.amsgrad:
            largest = held[LARGEST] + slope * upon
            share = _share(after[SECOND], moments[LARGEST])
            second, out[LARGEST] = second + share * largest, (1 - share) * largest
        else:
            second = second + slope * upon
        pull = (1 - self.beta1) * first + 2 * (1 - self.beta2) * g * second
        out |= {FIRST: self.beta1 * first, SECOND: self.beta2 * second}
        if self.decay:
            upon = (1 - self.rate * self.decay) * upon if self.decoupled else upon + self.decay * pull
        return upon, out, pull

    @property
    def linear(self) -> bool:
        """Whether ``backward`` can do without the gradient's value."""
        return False


Rule = Sgd | Adam


def _share(new: Tensor, old: Tensor) -> Tensor:
    """The derivative of ``max(new, old)`` in ``new``: a tie is shared."""
    return (new > old).to(new.dtype) + 0.5 * (new == old).to(new.dtype)


SMALL = 2**16  # numbers: below, what a kernel costs is its start


class Bundle:
    """Parameters that one rule moves at one count, end to end as one vector: elementwise steps then take one kernel for all of them. The
    numbers are the same. Tensors may have further axes in front (queries).

    >>> bundle = Bundle({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    >>> {n: tuple(t.shape) for n, t in bundle.split(torch.zeros(5, 10)).items()}
    {'a': (5, 2, 3), 'b': (5, 4)}
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.shapes = {n: t.shape for n, t in like.items()}
        self.sizes = [t.numel() for t in like.values()]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(..., numbers)."""
        first, shape = next(iter(self.shapes.items()))
        lead = tensors[first].shape[: tensors[first].ndim - len(shape)]
        found = [tensors[n].reshape((*lead, size)) for n, size in zip(self.shapes, self.sizes, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def split(self, joined: Tensor) -> dict[str, Tensor]:
        """The inverse: by name, each (..., *shape)."""
        lead = joined.shape[:-1]
        parts = joined.split_with_sizes(self.sizes, -1) if len(self.sizes) > 1 else (joined,)
        return {n: part.reshape((*lead, *shape)) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}


def bundles(names: Iterable[str], key: Callable[[str], object], like: Mapping[str, Tensor]) -> Iterator[Bundle]:
    """The names shared out: large parameters alone, small ones with all of equal ``key``, dtype and device."""
    shared: dict[object, dict[str, Tensor]] = {}
    for name in names:
        t = like[name]
        shared.setdefault((key(name), t.dtype, t.device) if t.numel() < SMALL else name, {})[name] = t
    return (Bundle(group) for group in shared.values())
