"""Random numbers from a counter, not from a state: the number at (row, column) depends on the key, the row and the column alone.

So a matrix of them needs no storage, its parts can be made in any order and on any device, a smaller one is the corner of a larger
one, and nothing depends on what else was drawn. Philox4x32-10 of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3",
SC11, sections 3.3 and 5), in int64 arithmetic that wraps alike on every device. :func:`signs`, :func:`uniforms` and :func:`integers`
are equal bit by bit everywhere; :func:`normals` up to the last bits of log, sin and cos.

Rows are a range, or ids of any order (an int64 tensor): give examples their own rows and their numbers are theirs in any batch.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from headwater.errors import InputError

Key = tuple[int, int]
"""Two 32-bit words, from :func:`key_of`."""
Rows = range | Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_CHUNK = 2**16  # counters at once: their words stay in a CPU's cache
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")
_LEADING = ("module.", "base_model.model.")


def key_of(*parts: object) -> Key:
    """The key of a stream, from what names it: the first 8 bytes of a hash of ``part|part|...``.

    >>> key_of("fc.weight", "right", 0) == key_of("fc.weight", "right", 0) != key_of("fc.weight", "left", 0)
    True
    """
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def plain_name(parameter: str) -> str:
    """A parameter's name without what torch.compile, FSDP, DataParallel and peft put around it, so that wrapping a model changes no key.

    >>> plain_name("module._orig_mod.fc.weight"), plain_name("base_model.model.fc.lora_A.default.weight")
    ('fc.weight', 'fc.lora_A.default.weight')
    """
    name = ".".join(part for part in parameter.split(".") if part not in _WRAPPERS)
    for prefix in _LEADING:
        name = name.removeprefix(prefix)
    return name


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter of four (int64 tensors of one shape, values below 2**32)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # 64-bit products: they wrap, and the bits are right
        x0, x1, x2, x3 = (p1 >> 32).bitwise_and_(_WORD) ^ x1 ^ k0, p1 & _WORD, (p0 >> 32).bitwise_and_(_WORD) ^ x3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def _in_place(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`philox`, in a third of the time: within six tensors. For one key, and not inside vmap."""
    x0, x1, x2, x3 = (word.clone() for word in counter)
    p0, p1 = torch.empty_like(x0), torch.empty_like(x0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        torch.mul(x0, _MULTIPLIERS[0], out=p0)
        torch.mul(x2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=x0).bitwise_and_(_WORD).bitwise_xor_(x1).bitwise_xor_(k0)
        torch.bitwise_right_shift(p0, 32, out=x2).bitwise_and_(_WORD).bitwise_xor_(x3).bitwise_xor_(k1)
        torch.bitwise_and(p1, _WORD, out=x1)
        torch.bitwise_and(p0, _WORD, out=x3)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def words(key: Key, rows: Rows, blocks: range, device: torch.device | str | None = None) -> Tensor:
    """The random words (rows, 4 * blocks) of counters (block, row), int64 below 2**32."""
    ids = _ids(rows, device)
    block = torch.arange(blocks.start, blocks.stop, device=ids.device)
    out = torch.empty(len(ids), len(block), 4, dtype=torch.int64, device=ids.device)
    room = _CHUNK if ids.device.type == "cpu" else _CHUNK * 2**8
    wide = max(1, min(len(block), room))
    for r in range(0, len(ids), room // wide or 1):
        row = ids[r : r + (room // wide or 1), None]
        for b in range(0, len(block), wide):
            column = block[None, b : b + wide]
            shape = (len(row), column.shape[1])
            counter = ((column & _WORD).expand(shape), (row & _WORD).expand(shape), (row >> 32).expand(shape), (column >> 32).expand(shape))
            torch.stack(_in_place(counter, key), -1, out=out[r : r + len(row), b : b + wide])
    return out.flatten(1)


def signs(key: Key, rows: Rows, columns: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Random signs, +1 or -1, (rows, columns): bit ``c % 32`` of word ``c // 32 % 4`` of block ``c // 128``."""
    blocks = _blocks(columns, 128)
    found = words(key, rows, blocks, device)
    octets = torch.stack([(found >> shift) & 255 for shift in (0, 8, 16, 24)], -1)
    spread = _octet_signs(dtype, found.device)[octets.flatten()].view(len(found), 128 * len(blocks))
    return _cut(spread, columns, blocks, 128)


def uniforms(key: Key, rows: Rows, columns: range, *, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in the open interval (0, 1), (rows, columns), float64 with 52 random bits."""
    blocks = _blocks(columns, 2)
    pairs = words(key, rows, blocks, device).unflatten(1, (-1, 2))
    whole = ((pairs[..., 0] >> 6) << 26) + (pairs[..., 1] >> 6)
    return _cut((whole.double() + 0.5) * 2.0**-52, columns, blocks, 2)


def normals(key: Key, rows: Rows, columns: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Standard normal numbers, (rows, columns): Box and Muller's two of each pair of :func:`uniforms`, computed in float64."""
    blocks = _blocks(columns, 2)
    pairs = uniforms(key, rows, range(2 * blocks.start, 2 * blocks.stop), device=device).unflatten(1, (-1, 2))
    radius, angle = (-2 * pairs[..., 0].log()).sqrt(), 2 * math.pi * pairs[..., 1]
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).to(dtype).flatten(1)
    return _cut(both, columns, blocks, 2)


def integers(key: Key, rows: Rows, columns: range, below: int, *, device: torch.device | str | None = None) -> Tensor:
    """Integers 0..below-1, (rows, columns), int64. One in 2**32 / below is drawn too often or too rarely by 2**-32: nothing."""
    if not 1 <= below <= 2**31:
        raise InputError(f"integers below {below}", "a bound from 1 to 2**31", "draw uniforms instead")
    blocks = _blocks(columns, 4)
    return _cut((words(key, rows, blocks, device) * below) >> 32, columns, blocks, 4)


def _ids(rows: Rows, device: torch.device | str | None) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.to(device=device or rows.device, dtype=torch.int64)
    return torch.arange(rows.start, rows.stop, rows.step, device=device)


def _blocks(columns: range, width: int) -> range:
    if columns.step != 1 or columns.start < 0:
        raise InputError(f"columns {columns}", "a range of columns without gaps, from 0 on", "range(start, stop)")
    return range(columns.start // width, max(columns.start // width, -(-columns.stop // width)))


def _cut(spread: Tensor, columns: range, blocks: range, width: int) -> Tensor:
    start = columns.start - blocks.start * width
    return spread[:, start : start + len(columns)]


@lru_cache(maxsize=16)
def _octet_signs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte, lowest bit first, (256, 8)."""
    bits = (torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device)) & 1
    return (2 * bits - 1).to(dtype)
