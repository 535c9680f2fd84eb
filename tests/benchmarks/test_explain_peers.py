"""What captum's own tests expect of Integrated Gradients holds here, and a row that misses its bound is told."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import explain_peers


def test_published_expectations_hold():
    rows = explain_peers.published()
    assert len(rows) == 27
    assert not [row.what for row in rows if not row.holds]


def test_a_row_that_misses_its_bound_is_counted(monkeypatch, capsys):
    rows = [explain_peers.Row("kept", 0.1, 0.2), explain_peers.Row("missed", 0.3, 0.2), explain_peers.Row("not a number", float("nan"), 0.2)]
    monkeypatch.setitem(explain_peers.COMPARED, "published", ("what", lambda: rows))
    assert explain_peers.main(["published"]) == 2
    assert capsys.readouterr().out.count("| NO |") == 2


@pytest.mark.parametrize(("runs", "ours", "bound"), [([[1.0, 2.0], [3.0, 2.5]], [2.0, 2.25], 0.0), ([[1.0, 1.0], [3.0, 3.0]], [4.0, 4.0], 2.0)])
def test_differences_are_measured_in_standard_errors(runs, ours, bound):
    assert explain_peers.standardised(runs, ours) == pytest.approx(bound)
