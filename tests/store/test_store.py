"""The store: whole or absent, checked on every read, readable without Headwater."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from headwater.errors import DamagedFile, StorageError
from headwater.store import Log, Store, content_hash, read_array, read_json, read_log, write_array, write_json


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_an_entry_reads_back_as_it_was(store):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2, dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}
    store.write("x/y", tensors, {"n": 1})
    assert store.has("x/y") and not store.has("x") and store.meta("x/y") == {"n": 1}
    for name, tensor in store.read("x/y").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    store.write("x/y", {"a": torch.zeros(1)})
    assert list(store.read("x/y")) == ["a"]
    store.delete("x/y")
    assert not store.has("x/y") and not list(store.path.glob("x/*"))


def test_tensors_that_share_memory_are_kept_apart(store):
    whole = torch.arange(4.0)
    store.write("v", {"whole": whole, "part": whole[1:3], "again": whole})
    read = store.read("v")
    assert read["part"].tolist() == [1, 2] and torch.equal(read["again"], whole)


def test_files_are_readable_without_headwater(store, tmp_path):
    store.write("x", {"a": torch.arange(3.0)}, {"why": "law"})
    assert np.array_equal(load_file(store.file("x"))["a"], np.arange(3.0))
    assert json.loads((store.path / "x.json").read_text())["meta"] == {"why": "law"}
    log = Log(tmp_path / "log.npy", np.dtype([("a", "<u4"), ("b", "<f8")]))
    log.append(np.array([(1, 2.0), (3, 4.0)], log.dtype))
    log.flush()
    assert np.load(tmp_path / "log.npy", allow_pickle=False)["b"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize("place", [0, 8, -1])
def test_damage_is_named(store, place):
    store.write("x", {"a": torch.arange(3.0)})
    flip(store.file("x"), place)
    with pytest.raises(DamagedFile, match=r"x-\w{12}\.safetensors does not match") as caught:
        store.read("x")
    assert "x.json" in caught.value.mend
    store.file("x").unlink()
    with pytest.raises(DamagedFile, match="is missing"):
        store.read("x")


@pytest.mark.parametrize("stops_at", ["os.fsync", "headwater.store.write_json", "headwater.store.Store._tidy"])
def test_an_entry_that_is_replaced_is_the_old_or_the_new_one_at_any_moment(store, monkeypatch, stops_at):
    store.write("x", {"a": torch.zeros(1)}, {"n": 0})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stops_at, killed)
    with pytest.raises(KeyboardInterrupt):
        store.write("x", {"a": torch.ones(1)}, {"n": 1})
    monkeypatch.undo()
    assert store.read("x")["a"].tolist() == [store.meta("x")["n"]]
    store.write("x", {"a": torch.full((1,), 2.0)}, {"n": 2})
    assert store.read("x")["a"].tolist() == [2] and len(list(store.path.glob("x*"))) == 2  # what was left over is gone


def test_names_that_begin_alike_are_left_alone(store):
    for name in ("x", "x-0", "x-000000000000"):
        store.write(name, {"a": torch.zeros(1)}, {"name": name})
    store.write("x", {"a": torch.ones(1)})
    assert store.read("x-0")["a"].tolist() == store.read("x-000000000000")["a"].tolist() == [0]


def test_an_entry_without_its_facts_is_not_there(store):
    store.write("x", {"a": torch.arange(3.0)})
    (store.path / "x.json").unlink()
    assert not store.has("x")
    with pytest.raises(DamagedFile, match=r"x\.json is missing"):
        store.read("x")


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota"), (errno.EIO, "permissions")])
def test_what_the_disk_refuses_is_one_clear_error_and_leaves_the_old_entry(store, monkeypatch, number, words):
    store.write("x", {"a": torch.zeros(1)})

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=words):
        store.write("x", {"a": torch.ones(1)})
    with pytest.raises(StorageError, match=words):
        write_json(store.path / "x.json", {})
    with pytest.raises(StorageError, match=words):
        write_array(store.path / "y.npy", np.zeros(3))
    monkeypatch.undo()
    assert store.read("x")["a"].tolist() == [0] and not list(store.path.glob("*.part"))


def test_a_place_that_cannot_be_a_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("here I am")
    with pytest.raises(StorageError, match=r"could not be written.*\n.*\n.*give another path"):
        Store(tmp_path / "file").write("x", {"a": torch.zeros(1)})


def test_a_log_speaks_of_flushed_rows_only(tmp_path):
    log = Log(tmp_path / "log.npy", np.dtype("<u4"))
    log.append(np.arange(5))
    first = log.flush()
    log.append(np.arange(5, 1000))
    assert read_log(tmp_path / "log.npy", first).tolist() == list(range(5))
    second = log.flush()
    assert read_log(tmp_path / "log.npy", first).tolist() == list(range(5))  # an older manifest stays true
    assert read_log(tmp_path / "log.npy", second).tolist() == list(range(1000)) and second["rows"] == 1000
    flip(tmp_path / "log.npy")
    assert read_log(tmp_path / "log.npy", first).tolist() == list(range(5))
    with pytest.raises(DamagedFile):
        read_log(tmp_path / "log.npy", second)
    flip(tmp_path / "log.npy", 128)
    with pytest.raises(DamagedFile):
        read_log(tmp_path / "log.npy", first)


def test_broken_json_and_arrays_are_damage(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.npy").write_bytes(b"not an array")
    for read, name in ((read_json, "a.json"), (read_array, "a.npy"), (read_json, "b.json")):
        with pytest.raises(DamagedFile, match=name):
            read(tmp_path / name)


def test_content_hashes_are_stable_and_tell_apart():
    assert content_hash(1, "a", [2]) == content_hash(1, "a", (2,)) and content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert len({content_hash(x) for x in (1, "1", [1], {"a": 1}, {"a": 2}, None)}) == 6
