"""The examples with diffusers' own loading code run, write their page, and find what they say."""

import importlib.util
import math
from pathlib import Path

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


def test_samples_of_a_pipeline_are_traced_and_training_pictures_to_themselves(tmp_path, capsys):
    found = ran("diffusion_pipeline", tmp_path)
    assert found["samples"] == 2 and found["largest"] > 0
    assert found["itself first"] == 1
    assert "queries at ema weights (EMAModel, decay 0.95)" in capsys.readouterr().out


def test_generations_of_an_adapted_model_are_owed_to_the_owner_whose_prompt_was_given(tmp_path):
    found = ran("diffusion_lora", tmp_path)
    assert found == {"TracIn": 1.0, "ReTrac": 1.0, "Source": 1.0}
