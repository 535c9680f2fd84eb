"""Each example that explains images or series runs, quickly, writes its page, and finds what was planted and nothing else."""

import importlib.util
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def ran(name, tmp_path):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = tmp_path / "page.html"
    figures = module.main(["--quick", "--html", str(page)])
    assert page.stat().st_size > 2000
    assert figures and all(math.isfinite(value) for value in figures.values())
    return figures


def test_attacked_digits_are_told_from_clean_ones_and_someone_who_knows_the_detector_is_told_less_often(tmp_path, capsys):
    found = ran("explain_adversarial", tmp_path)
    assert found["AUC of PGD"] > 0.9 > found["AUC of PGD by softmax"]
    assert found["AUC of PGD against noise"] > 0.8
    assert found["flagged of the adaptive attack"] < found["flagged of PGD"]
    assert "honest errors" in capsys.readouterr().out


def test_the_planted_shortcut_is_found_and_nothing_without_it(tmp_path):
    found = ran("explain_shortcut", tmp_path)
    assert found["found"] == 1
    assert found["found without a patch"] == 0
    assert found["mass inside"] > 0.3  # of 2 % of the area
    assert found["drift"] > 0.55
    assert found["taught by the patch"] > 0.6  # of 10 % of the training examples


def test_sensors_that_are_switched_off_do_what_was_said(tmp_path):
    found = ran("explain_motion", tmp_path)
    assert found["accuracy"] > 0.85
    assert found["correlation of the strongest sensor"] > 0.9
    assert found["slope of the strongest sensor"] == pytest.approx(1, abs=0.3)
    assert found["fault sensor"] > 0.7  # by chance 0.17


def test_every_way_to_explain_a_digit_beats_random_orders(tmp_path):
    found = ran("explain_images", tmp_path)
    for name in ("black", "black and white", "32 digits", "blur path", "guided path"):
        assert found[f"deletion, {name}"] < found["deletion, random"] - 0.1
        assert found[f"insertion, {name}"] > found["insertion, random"] + 0.1
    assert found["randomisation passed"] == 1
