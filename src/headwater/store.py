"""Arrays on disk with a manifest: atomic, checksummed, readable with numpy and safetensors alone. No pickle.

A :class:`Store` is a folder. The entry ``factors/abc`` is two files: ``factors/abc.json`` (facts, and the name and checksum of the
other) and ``factors/abc-CHECKSUM.safetensors`` (the tensors). The first is written last and the tensors of an older entry are removed
after that, so an entry is there whole or not at all, and one that is replaced is the old or the new one at any moment. Every file is
written under a partial name, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
from torch import Tensor

from headwater.errors import DamagedFile, StorageError

_CHUNK = 2**22
_LOOSE = 256  # rows of a log that wait as tuples
_WAYS_OUT = {
    errno.ENOSPC: "free some space on that disk, or give another directory; then make the same call again: it continues",
    errno.EDQUOT: "your disk quota is used up: free some space, then make the same call again: it continues",
    errno.EROFS: "the file system is read-only: give a directory that can be written",
    errno.EACCES: "you may not write there: give a directory that can be written",
    errno.EEXIST: "a file stands where a directory belongs: give another path",
    errno.ENOTDIR: "a file stands where a directory belongs: give another path",
}


class Store:
    """Named sets of tensors in a folder (see the module's docstring).

    >>> import tempfile, torch
    >>> store = Store(tempfile.mkdtemp())
    >>> checksum = store.write("factors/a", {"spectrum": torch.ones(2)}, {"why": "example"})
    >>> store.has("factors/a"), store.read("factors/a")["spectrum"], store.meta("factors/a")
    (True, tensor([1., 1.]), {'why': 'example'})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _facts(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def file(self, name: str) -> Path:
        """Where an entry's tensors lie. Raises DamagedFile where there is no such entry."""
        facts = self._facts(name)
        return facts.with_name(read_json(facts).get("file", f"{facts.stem}.safetensors"))  # without a name: written before 2026-11-24

    def has(self, name: str) -> bool:
        """Whether the entry was written to its end."""
        return self._facts(name).exists()

    def write(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> str:
        """Write an entry, replacing one of the same name; returns its checksum. Raises StorageError."""
        facts, content = self._facts(name), serialized(tensors)
        checksum = bytes_hash(content)
        file = facts.with_name(f"{facts.stem}-{checksum[:12]}.safetensors")
        _replace(file, lambda f: f.write(content))
        write_json(facts, {"file": file.name, "checksum": checksum, "meta": dict(meta or {})})
        self._tidy(facts, keep=file)
        return checksum

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU. Raises DamagedFile where they are missing or do not match their checksum."""
        return read_tensors(self.file(name), read_json(self._facts(name))["checksum"], again=self._facts(name))

    def meta(self, name: str) -> dict[str, Any]:
        """The facts that were written with an entry."""
        return read_json(self._facts(name))["meta"]

    def delete(self, name: str) -> None:
        """Remove an entry; the facts first, so that half of one never looks whole."""
        self._facts(name).unlink(missing_ok=True)
        self._tidy(self._facts(name), keep=None)

    @staticmethod
    def _tidy(facts: Path, keep: Path | None) -> None:
        """Remove the tensors of older entries of this name."""
        for file in facts.parent.glob(f"{facts.stem}-{'?' * 12}.safetensors"):
            if file != keep:
                file.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- single files


def serialized(tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file. Tensors that share memory are written apart."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        held = tensor.detach().to("cpu").contiguous()
        place = held.untyped_storage().data_ptr()
        plain[name] = held.clone() if place in seen else held
        seen.add(place)
    return safetensors.torch.save(plain, dict(meta) if meta else None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file; returns its checksum. Raises StorageError."""
    content = serialized(tensors, meta)
    _replace(path, lambda file: file.write(content))
    return bytes_hash(content)


def read_tensors(path: Path, checksum: str | None = None, again: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises DamagedFile where it is missing, broken or does not match ``checksum``; where deleting
    the file ``again`` has it made again, the error says so."""
    verify(path, checksum, again)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own, undocumented types for a broken header
        raise damaged(path, f"cannot be read ({error})", again) from error


def verify(path: Path, checksum: str | None, again: Path | None = None) -> None:
    """Raise DamagedFile where a file is missing or does not match ``checksum`` (None: it only has to be there)."""
    if not path.exists():
        raise damaged(path, "is missing", again)
    if checksum is not None and file_hash(path) != checksum:
        raise damaged(path, "does not match its checksum", again)


def damaged(path: Path, what: str, again: Path | None = None) -> DamagedFile:
    """The error for a file that cannot be trusted. ``again``: what to delete to have it made again, if it can be."""
    mend = f"delete {again} and repeat the call: it is made again" if again is not None else "restore it from a copy, or make it again"
    return DamagedFile(f"{path} {what}", "the file as it was written", mend)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file. Raises StorageError."""
    _replace(path, lambda file: np.save(file, array, allow_pickle=False))


def read_array(path: Path) -> np.ndarray:
    """A ``.npy`` file. Raises DamagedFile."""
    verify(path, None)
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise damaged(path, f"cannot be read ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read too. Raises StorageError."""
    content = (json.dumps(value, indent=1) + "\n").encode()
    _replace(path, lambda file: file.write(content))


def read_json(path: Path) -> Any:
    """A JSON file. Raises DamagedFile."""
    verify(path, None)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, f"cannot be read ({error})") from error


def _replace(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a partial name, flush it to the disk, and rename it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        mend = _WAYS_OUT.get(error.errno or 0, "look at the disk and at the directory's permissions; then make the same call again: it continues")
        raise StorageError(f"{path} could not be written: {error.strerror or error}", "a disk that takes the file", mend) from error


class Log:
    """A ``.npy`` file that grows: rows are appended, never rewritten, so a killed process leaves all rows up to its last flush.

    What a flush returns (``rows`` and their ``checksum``) belongs into a manifest; :func:`read_log` then reads just those rows, even
    if more were appended after the manifest was written.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.rows = path, np.dtype(dtype), 0
        self.total = 0  # with those that wait for the next flush
        self._waiting: list[np.ndarray] = []
        self._loose: list[tuple[Any, ...]] = []
        self._hasher = hashlib.blake2b(digest_size=16)
        write_array(path, np.zeros(0, self.dtype))

    def append(self, rows: np.ndarray | list[tuple[Any, ...]]) -> None:
        """Rows to be written at the next flush: an array, or tuples (quicker where they come one by one)."""
        if isinstance(rows, list):
            self._loose += rows
            if len(self._loose) >= _LOOSE:
                self._gather()
        else:
            self._gather()
            self._waiting.append(np.asarray(rows, self.dtype))
        self.total += len(rows)

    def _gather(self) -> None:
        if self._loose:
            self._waiting.append(np.array(self._loose, self.dtype))
            self._loose = []

    def flush(self) -> dict[str, Any]:
        """Write what waits; returns the facts for a manifest. Raises StorageError."""
        self._gather()
        if not self._waiting:
            return {"rows": self.rows, "checksum": self._hasher.hexdigest()}
        content = b"".join(rows.tobytes() for rows in self._waiting)
        with disk(self.path), self.path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(content)
            self.rows += sum(len(rows) for rows in self._waiting)
            file.seek(0)  # numpy pads the header so that a longer length still fits
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.rows,)})
            file.flush()
            os.fsync(file.fileno())
        self._waiting.clear()
        self._hasher.update(content)
        return {"rows": self.rows, "checksum": self._hasher.hexdigest()}


def read_log(path: Path, facts: Mapping[str, Any]) -> np.ndarray:
    """The first ``facts["rows"]`` rows of a :class:`Log`. Raises DamagedFile."""
    rows = read_array(path)[: facts["rows"]]
    if len(rows) < facts["rows"] or bytes_hash(rows.tobytes()) != facts["checksum"]:
        raise damaged(path, "does not match its checksum")
    return rows


# -------------------------------------------------------------------------------------------------------------------- hashes


def file_hash(path: Path) -> str:
    """The checksum of a file's bytes."""
    with path.open("rb") as file:
        return _hash(iter(lambda: file.read(_CHUNK), b""))


def bytes_hash(content: bytes) -> str:
    """The checksum of some bytes."""
    return _hash([content])


def content_hash(*parts: Any) -> str:
    """A name made of what something depends on: equal facts (plain JSON values), equal string.

    >>> content_hash("a", [1, 2]) == content_hash("a", (1, 2)) != content_hash("a", [1, 3])
    True
    """
    return bytes_hash(json.dumps(parts, sort_keys=True, default=str).encode())


def _hash(chunks: Any) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()
