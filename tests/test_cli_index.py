"""``headwater index`` and ``headwater trace --index``: what they print and save is what the door computes."""

import numpy as np

import headwater as hw
from tests.test_cli import call, file, recorded

__all__ = ["file", "recorded"]  # fixtures


def test_an_index_is_built_reported_and_asked(recorded, file, tmp_path):
    refused = call("trace", recorded, "--index")
    assert refused.exit_code == 2 and f"headwater index {recorded}" in refused.output
    built = call("index", recorded, "--segments", 2)
    assert built.exit_code == 0, built.output
    run = hw.Experiment.load(file).open(recorded)
    kept = hw.index(run, 2, progress=False)
    assert kept.report() in built.output and f"headwater trace {recorded} --index" in built.output
    for words, method in ((("--method", "source", "--segments", 2), hw.Source(segments=2)), (("--method", "influence", "--damping", 0.1), hw.Influence(damping=0.1))):
        done = call("trace", recorded, "--index", "--queries", "3,0", "--out", tmp_path / "s.safetensors", *words)
        assert done.exit_code == 0, done.output
        found = hw.load(tmp_path / "s.safetensors")
        asked = tuple(column[[3, 0]] for column in hw.Experiment.load(file).test)
        np.testing.assert_array_equal(found.values, hw.trace(kept, asked, method, progress=False).values)
        assert found.provenance["index"] == kept.path.name


def test_the_index_that_was_built_last_is_asked(recorded, tmp_path):
    for words in (("--dtype", "int8"), ("--segments", 1)):
        assert call("index", recorded, *words).exit_code == 0
        assert call("trace", recorded, "--index", "--method", "graddot", "--out", tmp_path / "s").exit_code == 0
        assert hw.load(tmp_path / "s").provenance["dtype"] == (None if "--segments" in words else "int8")


def test_what_cannot_be_kept_or_answered_is_refused(recorded):
    for words, said in (((recorded, "--dtype", "int3"), "int3"), ((recorded, "--segments", 99), "99 segments"), ((recorded / "nowhere",), "holds no run")):
        done = call("index", *words)
        assert done.exit_code == 2 and said in done.output
    assert call("index", recorded).exit_code == 0
    done = call("trace", recorded, "--index", "--method", "source", "--segments", 1)
    assert done.exit_code == 2 and "was not estimated when the index was built" in done.output
