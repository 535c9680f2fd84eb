"""Ensembles of one training's checkpoints: each is the model of a training that ended there."""

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import InputError, MissingCheckpoint
from tests.influence.members import Kernel, close, fresh, network, scores, values
from tests.influence.test_laws import record, sgd


def trained(path, steps, **settings):
    torch.manual_seed(5)
    return record(path, sgd(), model=network(5).eval(), steps=steps, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("checkpoints") / "run", 30, checkpoints=[10, 20, 30])


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """The same training, really ended after 10, 20 and 30 steps."""
    folder = tmp_path_factory.mktemp("shorter")
    return [trained(folder / f"run{steps}", steps, checkpoints=1) for steps in (10, 20, 30)]


@pytest.mark.parametrize("method", [hw.GradDot(), hw.GradCos(), hw.Influence(damping=0.1), hw.Influence(), hw.Representations()], ids=repr)
def test_members_are_the_models_of_trainings_that_ended_there(run, shorter, method):
    each = np.stack([values(r, method) for r in shorter])
    found = scores(run, hw.CheckpointEnsemble(method))
    assert close(found.values, each.mean(0)) and close(found.stderr, each.std(0, ddof=1) / 3**0.5)
    assert close(values(run, hw.CheckpointEnsemble(method, members=2)), each[1:].mean(0))
    assert found.spread.models == 1 and found.spread.per_model == 3


@pytest.mark.parametrize("method", [Kernel(), hw.Trak(), hw.Trak(dim=4)], ids=repr)
def test_kernels_and_weights_of_checkpoints_are_averaged_apart_each_with_its_own_projection(run, shorter, method):
    own = [method.member(2), method.member(1), method]
    parts = [m.parts(_request(r)).arrays for m, r in zip(own, shorter, strict=True)]
    kernel, weight = (np.mean([p[name] for p in parts], axis=0) for name in ("kernel", "weight"))
    assert close(values(run, hw.CheckpointEnsemble(method)), kernel * weight)


def _request(run):
    from headwater.influence.queries import ask
    from headwater.influence.request import Request
    from tests.influence.test_laws import ASKED

    return Request(run, ask(ASKED, run.stages[-1].task, None), progress=False)


def test_one_checkpoint_is_the_model_itself_and_has_no_error(run):
    for method in (hw.GradDot(), hw.Trak(dim=4)):
        found = scores(run, hw.CheckpointEnsemble(method, members=1))
        assert close(found.values, values(run, method)) and found.stderr is None


def test_more_checkpoints_cost_only_themselves_and_change_no_bit(run, tmp_path):
    whole = scores(run, hw.CheckpointEnsemble(hw.Trak(dim=4)))
    copy = fresh(run, tmp_path / "copy")
    scores(copy, hw.CheckpointEnsemble(hw.Trak(dim=4), members=2))
    later = scores(copy, hw.CheckpointEnsemble(hw.Trak(dim=4)))
    assert later.values.tobytes() == whole.values.tobytes() and later.provenance["cost"]["computed_now"] == 1


def test_two_levels(run, tmp_path):
    torch.manual_seed(6)
    other = record(tmp_path / "other", sgd(), model=network(6).eval(), steps=30, checkpoints=[10, 20, 30])
    found = scores(run, hw.Ensemble(hw.CheckpointEnsemble(hw.GradDot(), members=2), [run, other]))
    each = [values(r, hw.CheckpointEnsemble(hw.GradDot(), members=2)) for r in (run, other)]
    assert close(found.values, np.mean(each, axis=0)) and (found.spread.models, found.spread.per_model) == (2, 2)


def test_a_run_until_a_checkpoint(run):
    cut = run.until(20)
    assert cut.checkpoints == (0, 10, 20) and cut.stages[-1].stop == 20 and cut.size == run.size
    assert run.checkpoints == (0, 10, 20, 30)
    with pytest.raises(MissingCheckpoint, match="no checkpoint of step 15"):
        run.until(15)
    with pytest.raises(InputError, match="before the last stage"):
        run.until(0)


def test_what_cannot_be_averaged_is_refused(run):
    for method in (hw.Source(), hw.TracIn(), hw.Unrolled()):
        with pytest.raises(InputError, match="follows training"):
            hw.CheckpointEnsemble(method)
    with pytest.raises(InputError, match="at least one checkpoint"):
        hw.CheckpointEnsemble(hw.Trak(), members=0)
    with pytest.raises(InputError, match="which has 3"):
        scores(run, hw.CheckpointEnsemble(hw.GradDot(), members=4))
    with pytest.raises(InputError, match="construct it"):
        hw.CheckpointEnsemble(hw.Trak)
