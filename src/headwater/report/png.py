"""A PNG from an array, with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def png(image: np.ndarray) -> bytes:
    """The PNG file of a uint8 image, (height, width) grey or (height, width, 3) colour.

    Format: PNG specification, third edition (W3C 2025), sections 5 and 11: signature, IHDR, one IDAT of unfiltered rows, IEND.
    """
    height, width = image.shape[:2]
    colour = 0 if image.ndim == 2 else 2
    rows = np.ascontiguousarray(image).reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def shrink(image: np.ndarray, longest: int = 256) -> np.ndarray:
    """The image with neither side above ``longest`` pixels: means of whole blocks (a page of photographs stays small)."""
    step = -(-max(image.shape[:2]) // longest)
    if step == 1:
        return image
    # a side shorter than a block is one block
    down, across = min(step, image.shape[0]), min(step, image.shape[1])
    height, width = image.shape[0] // down, image.shape[1] // across
    blocks = image[: height * down, : width * across].reshape(height, down, width, across, *image.shape[2:])
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    """The image as a ``data:`` address, to stand in a page by itself."""
    return "data:image/png;base64," + base64.b64encode(png(shrink(image))).decode("ascii")
