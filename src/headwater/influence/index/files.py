"""An index on disk: plain ``.npy`` files beside a manifest that is written last, filled block of rows by block of rows.

    index/KEY/manifest.json       what is held, and each file's checksum; there once everything is there
    index/KEY/layout.json         the same before the rows are written: an interrupted build continues by it
    index/KEY/done.npy            one byte for each block of rows: 1 once all its files hold it
    index/KEY/P/B.FIELD.npy       panel P, block B (numbers as in the manifest): rows in the order of the stage's data set

FIELD: ``g`` (examples, groups, positions, out) and ``a`` (examples, groups, positions, in), factors whose outer products sum to a gradient;
``index`` and ``a``, the rows of an embedding; ``rows`` (examples, numbers), coordinates; ``keep`` (numbers,), which coordinates those are;
``norms`` (examples,), lengths before anything was left out; ``FIELD.scale`` (examples,), by which a row of FIELD is to be multiplied.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import DamagedFile, InputError
from headwater.store import disk, file_hash, read_array, read_json, verify, write_array, write_json

REDUCED = {"float16": np.float16, "int8": np.int8}
DTYPES = (None, "float32", "float64", *REDUCED)


def check_dtype(dtype: str | None) -> str | None:
    """Raise InputError for a dtype in which no index is kept."""
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}", "None (the model's own), 'float32', 'float64', 'float16' or 'int8'", "leave it out for exact rows")
    return dtype


class Files:
    """The files of one index in ``path`` (see the module's docstring)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, np.ndarray] = {}
        self._verified: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether the build came to its end."""
        return (self.path / "manifest.json").exists()

    def start(self, layout: dict[str, Any], blocks: list[int]) -> list[np.ndarray]:
        """Begin or continue a build: which blocks of rows are done, one array for each stage (``blocks`` of them)."""
        if not self._begun(layout):
            self.clear()
            write_array(self.path / "done.npy", np.zeros(sum(blocks), np.uint8))
            write_json(self.path / "layout.json", layout)
        return self.done(layout, blocks)

    def done(self, layout: dict[str, Any], blocks: list[int]) -> list[np.ndarray]:
        """As :meth:`start`, which changes nothing yet."""
        done = read_array(self.path / "done.npy") if self._begun(layout) else np.zeros(sum(blocks), np.uint8)
        return np.split(done, np.cumsum(blocks)[:-1])

    def _begun(self, layout: dict[str, Any]) -> bool:
        file = self.path / "layout.json"
        return file.exists() and read_json(file) == layout

    def clear(self) -> None:
        """Remove everything."""
        self._open.clear()
        with disk(self.path):
            shutil.rmtree(self.path, ignore_errors=True)

    def mark(self, done: list[np.ndarray]) -> None:
        """The rows written so far are on the disk: note it."""
        with disk(self.path):
            for array in self._open.values():
                if isinstance(array, np.memmap):
                    array.flush()
        write_array(self.path / "done.npy", np.concatenate(done))

    def put(self, name: str, rows: slice, values: Tensor, count: int, dtype: str | None) -> None:
        """Write rows of a field of ``count`` examples, in a reduced dtype with one scale for each row."""
        array = values.detach().cpu().numpy()
        if dtype in REDUCED and array.dtype.kind == "f" and array.ndim > 1:
            array, scale = reduced(array, dtype)
            self._field(name + ".scale", (count,), scale.dtype)[rows] = scale
        elif dtype is not None and dtype not in REDUCED and array.dtype.kind == "f":
            array = array.astype(dtype)
        place = self._field(name, (count, *array.shape[1:]), array.dtype)
        inner = tuple(map(max, place.shape[1:], array.shape[1:]))
        if place.shape[1:] != inner:
            place = self._widened(name, inner)
        with disk(self.path):
            place[(rows, *(slice(0, k) for k in array.shape[1:]))] = array

    def _field(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        file = self.path / f"{name}.npy"
        if name not in self._open:
            with disk(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.exists():
                    self._open[name] = np.lib.format.open_memmap(file, "r+")
                else:  # made under another name: a process killed right then leaves no file that is shorter than it says
                    self._open[name] = np.lib.format.open_memmap(part := file.with_suffix(".part"), "w+", dtype, shape)
                    part.replace(file)
        return self._open[name]

    def _widened(self, name: str, inner: tuple[int, ...]) -> np.ndarray:
        """The field with longer axes (a batch came with more positions); what is new is zero, and adds nothing to a gradient."""
        old, file = self._open.pop(name), self.path / f"{name}.npy"
        part = file.with_suffix(".part")
        with disk(file):
            new = np.lib.format.open_memmap(part, "w+", old.dtype, (len(old), *inner))
            new[(slice(None), *(slice(0, k) for k in old.shape[1:]))] = old
            new.flush()
            part.replace(file)
        self._open[name] = np.lib.format.open_memmap(file, "r+")
        return self._open[name]

    def seal(self) -> dict[str, str]:
        """The checksum of every file that was written."""
        self._open.clear()
        files = sorted(str(file.relative_to(self.path)) for file in self if file.name != "done.npy")
        return {name: file_hash(self.path / name) for name in files}

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest: the index is there from now on."""
        write_json(self.path / "manifest.json", manifest)

    def manifest(self) -> dict[str, Any]:
        """What is held. Raises DamagedFile."""
        return read_json(self.path / "manifest.json")

    def has(self, name: str, manifest: dict[str, Any]) -> bool:
        """Whether a finished index has this field."""
        return f"{name}.npy" in manifest["files"]

    def get(self, name: str, manifest: dict[str, Any]) -> np.ndarray:
        """A field of a finished index, read through the memory map; its checksum is compared the first time. Raises DamagedFile."""
        file = self.path / f"{name}.npy"
        if name not in self._verified:
            verify(file, manifest["files"][f"{name}.npy"], self.path)
            self._verified.add(name)
        if name not in self._open:
            try:
                self._open[name] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise DamagedFile(f"{file} cannot be read ({error})", "the file as it was written", f"delete {self.path} and build the index again") from error
        return self._open[name]

    def rows(self, name: str, part: slice, manifest: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """Rows of a field as a tensor, multiplied by their scales."""
        held = torch.from_numpy(np.array(self.get(name, manifest)[part]))
        if not held.is_floating_point() and not self.has(name + ".scale", manifest):
            return held.long()
        values = held.to(dtype)
        if not self.has(name + ".scale", manifest):
            return values
        scale = torch.from_numpy(np.array(self.get(name + ".scale", manifest)[part])).to(dtype)
        return values * scale.reshape(-1, *(1,) * (values.ndim - 1))

    def __iter__(self) -> Iterator[Path]:
        return iter(sorted(self.path.rglob("*.npy")))


def reduced(array: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a reduced dtype and the scale of each: ``row ~ scale * reduced``; of int8 the largest number becomes 127.

    >>> reduced(np.array([[0.5, -1.0], [0.0, 0.0]], np.float32), "int8")[0].tolist()
    [[64, -127], [0, 0]]
    """
    largest = np.abs(array).reshape(len(array), -1).max(1)
    scale = np.where(largest > 0, largest / (127 if dtype == "int8" else 1), 1).astype(np.float32)
    values = array / scale.reshape(-1, *(1,) * (array.ndim - 1))
    return (np.rint(values).clip(-127, 127) if dtype == "int8" else values).astype(REDUCED[dtype]), scale
