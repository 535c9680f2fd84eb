"""The examples that explain tables: each runs in miniature, says what it computed, and writes its page."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, capsys):
    """``run(name)``: what the example's ``main`` returns, what it printed, and its page."""

    def run(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        page = tmp_path / f"{name}.html"
        answer = module.main(["--quick", "--html", str(page)])
        return answer, capsys.readouterr().out, page.read_text()

    return run


def test_selection_prints_the_areas_and_the_verdict_of_its_own_numbers(run):
    (alone, together), said, page = run("explain_selection")
    for found in (alone, together):
        for mean in found.advantage.values():
            assert repr(mean) in said
            assert "better" in said or mean.low <= 0
        assert all(len(set(order)) == len(found.groups) for order in found.orders["attribution"])
    assert len(together.groups) < len(alone.groups) == 30
    assert "Which columns are worth keeping?" in page


def test_fairness_prints_a_gap_whose_parts_sum(run):
    (found, treatment), said, page = run("explain_fairness")
    for name, part in found.parts.items():
        np.testing.assert_allclose(part.values.sum() + part.before - part.residual, found.gap.mean, atol=1e-10)
        assert name in said
    assert not {"sex", "relationship"} & set(found.names)
    assert f"AUC {treatment.auc:.3f}" in said
    assert re.search(r"0\.8: ranked first in 100%", said)  # the control that must succeed
    assert "no certificate" in said
    assert "Which columns carry the gap?" in page


def test_spam_prints_reasons_of_both_models(run):
    found, said, page = run("explain_spam")
    assert set(found) == {"linear", "network"}
    for one in found.values():
        assert len(one) == 10
        assert one.sentences(0) in said
        np.testing.assert_allclose(one.scores.values.sum(1), one.scores.output - one.scores.baseline_output + one.scores.residual, atol=1e-9)
    assert "planted word" in said
    assert "Alerts by their first reason" in page


def test_medicine_prints_how_far_the_models_agree_and_no_diagnosis(run):
    (found, accord), said, page = run("explain_medical")
    assert len(found) == 4
    for pair, mean in accord.means["spearman"].items():
        assert all(name in said for name in pair)
        assert repr(mean) in said
    assert "No diagnosis" in said
    assert "Do they agree?" in page
