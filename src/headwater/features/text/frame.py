"""What a text is compared with: embeddings in place of its tokens. Special tokens and padding keep themselves, so that they carry nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.features.baselines import Average, References, references, token
from headwater.features.text.reading import weight_of

WHOLE = 8192  # rows of the embedding looked at together


@dataclass(frozen=True, eq=False)
class Framed:
    """A baseline of texts in the output of their embedding, (n, positions, size).

    Args:
        given: what ``baseline=`` was: None, one of hw.baselines, a token's id, ids of the shape of the texts, points in the embedding.
        kept: (n, positions) bool, tokens that keep themselves.
        embedding: the module that ids go into. tokenizer: or None. pad: the model's padding id, or None.
    """

    given: Any
    kept: Tensor
    embedding: nn.Module
    tokenizer: Any
    pad: int | None

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """Points (K, n, positions, size)."""
        x = inputs[0]
        found = references(self._resolved(self.given), (x,), seed)
        points = torch.where(self.kept[None, :, :, None], x[None], found.points[0])
        return References((points,), found.weights, found.name)

    def _resolved(self, given: Any) -> Any:
        """A baseline in the embedding. Raises InputError."""
        if given is None:
            given = self._usual()
        if isinstance(given, token):
            return self._token(given.which)
        if isinstance(given, Average):
            return dataclasses.replace(given, members=tuple(map(self._resolved, given.members)))
        if isinstance(given, int | np.integer) and not isinstance(given, bool):
            return self._token(int(given))
        if isinstance(given, str):
            raise InputError(f"baseline={given!r}", "a token, or one of hw.baselines", f"baseline=hw.baselines.token({given!r})")
        if _whole(given):
            return self._ids(torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given)))
        return given

    def _usual(self) -> token:
        """Padding where it is a token of its own, else the mean embedding."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return token("mean") if self.pad is None or self.pad == end else token(int(self.pad))

    def _token(self, which: str | int) -> Everywhere:
        weight = weight_of(self.embedding)
        if which == "zero":
            return Everywhere(torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device), "the zero embedding")
        if which == "mean":
            return Everywhere(self._mean(weight), "the mean embedding")
        number = self._number(which)
        if not 0 <= number < len(weight):
            raise InputError(f"the token {number}", f"an id from 0 to {len(weight) - 1}", "hw.baselines.token('pad'), say")
        name = self.tokenizer.convert_ids_to_tokens(number) if self.tokenizer is not None else number
        return Everywhere(self._embed(torch.tensor([number], device=weight.device))[0], f"the token {name}")

    def _number(self, which: str | int) -> int:
        """The id of "pad", "mask", "unk", or of any token by its text."""
        if not isinstance(which, str):
            return int(which)
        if which == "pad" and self.pad is not None:
            return self.pad
        if self.tokenizer is None:
            raise InputError(f"the token {which!r} without a tokenizer", "its id", "hw.baselines.token(0), or explain(..., tokenizer=tokenizer)")
        named = getattr(self.tokenizer, f"{which}_token_id", None) if which in ("pad", "mask", "unk", "eos", "bos", "sep", "cls") else None
        found = self.tokenizer.get_vocab().get(which) if named is None else named
        if found is None:
            raise InputError(
                f"the token {which!r}, which the tokenizer does not have", "a token of its vocabulary", "hw.baselines.token('zero') or token('mean') need none"
            )
        return int(found)

    def _mean(self, weight: Tensor) -> Tensor:
        parts = torch.arange(len(weight), device=weight.device).split(WHOLE)
        return (torch.stack([self._embed(ids).double().sum(0) for ids in parts]).sum(0) / len(weight)).to(weight.dtype)

    def _embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.embedding(ids[None])[0].detach()

    def _ids(self, ids: Tensor) -> Tensor:
        """Ids (positions,) or (n, positions) as points."""
        n, width = self.kept.shape
        if ids.shape not in ((width,), (n, width)):
            raise InputError(
                f"baseline ids of shape {tuple(ids.shape)} for texts of shape {(n, width)}", "one id for each token", "hw.baselines.token(id) puts one everywhere"
            )
        most = len(weight_of(self.embedding)) - 1
        if int(ids.min()) < 0 or int(ids.max()) > most:
            raise InputError(f"baseline ids from {int(ids.min())} to {int(ids.max())}", f"ids from 0 to {most}", "check them")
        with torch.no_grad():
            return self.embedding(ids.to(self.kept.device).expand(n, width)).detach()


@dataclass(frozen=True, eq=False)
class Everywhere:
    """One vector (size,) at every position."""

    vector: Tensor
    name: str

    def references(self, inputs: tuple[Tensor, ...], seed: int) -> References:
        """One point, shared by all texts."""
        x = inputs[0]
        return References((self.vector.to(x).expand(1, 1, *x.shape[1:]),), torch.ones(1, dtype=torch.float64), self.name)


def _whole(given: Any) -> bool:
    if isinstance(given, Tensor):
        return not given.is_floating_point()
    return isinstance(given, np.ndarray | list) and np.asarray(given).dtype.kind in "iu"
