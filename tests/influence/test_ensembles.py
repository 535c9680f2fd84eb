"""Ensembles of independent models: the mean by each method's own rule, errors, what is kept, and what is refused."""

import shutil

import numpy as np
import pytest

import headwater as hw
from headwater.errors import DamagedFile, DataMismatch, InputError, NotFinite
from headwater.influence.ensembles import carrying
from headwater.influence.ensembles.combining import combine
from headwater.influence.request import mean_of_scores
from headwater.result.spread import Gain, Spread
from tests.influence.brute import Brute
from tests.influence.members import METHODS, Kernel, close, fresh, network, recorded, scores, values
from tests.influence.test_laws import ASKED, TASK, TRAIN, data, record, sgd


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensembles")
    return [recorded(folder / f"run{k}", seed=k) for k in range(3)]


@pytest.fixture
def copies(runs, tmp_path):
    return [fresh(run, tmp_path / f"copy{k}") for k, run in enumerate(runs)]


def bits(found):
    return found.values.tobytes(), found.stderr.tobytes()


# -------------------------------------------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_scores_are_the_mean_of_the_members_scores_with_its_standard_error(method, runs):
    each = np.stack([values(run, method) for run in runs])
    found = scores(runs[1], hw.Ensemble(method, runs))
    assert close(found.values, each.mean(0)) and close(found.stderr, each.std(0, ddof=1) / 3**0.5)
    assert found.unit == scores(runs[0], method).unit and found.spread.models == 3 and found.spread.per_model == 1
    assert found.spread.between == pytest.approx(each.var(0, ddof=1).mean()) and found.spread.within is None


def test_the_mean_of_cosines_is_not_the_cosine_of_means(runs):
    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    pairs = [[Brute(run).gradients(f, run.weights(30), batch) for f, batch in ((TASK.measure, ASKED), (TASK.loss, TRAIN))] for run in runs]
    found = values(runs[0], hw.Ensemble(hw.GradCos(), runs))
    assert close(found, -np.mean([unit(u) @ unit(g).T for u, g in pairs], axis=0))
    assert not close(found, -unit(np.mean([u for u, _ in pairs], axis=0)) @ unit(np.mean([g for _, g in pairs], axis=0)).T, 0.1)


@pytest.mark.parametrize("method", [Kernel(), hw.Trak()], ids=repr)
def test_kernels_and_weights_are_averaged_apart_with_the_jackknifes_error(method, runs):
    """``mean(K) * mean(Q)``; its error from the three values that leave one model out, written out."""
    found = scores(runs[0], hw.Ensemble(method, runs))
    parts = [carrying.parts_of(method, _request(run)).arrays for run in runs]
    k, q = np.stack([p["kernel"] for p in parts]), np.stack([p["weight"] for p in parts])
    assert close(found.values, k.mean(0) * q.mean(0)) and not close(found.values, (k * q[:, None]).mean(0), 1e-2)
    without = np.stack([k[keep].mean(0) * q[keep].mean(0) for keep in ([1, 2], [0, 2], [0, 1])])
    assert close(found.stderr, np.sqrt((2 / 3) * ((without - without.mean(0)) ** 2).sum(0)))


def _request(run):
    from headwater.influence.queries import ask
    from headwater.influence.request import Request

    return Request(run, ask(ASKED, TASK, None), progress=False)


def test_one_model_is_itself_and_has_no_error(runs):
    for method in (*METHODS, Kernel(), hw.Trak()):
        found = scores(runs[2], hw.Ensemble(method, [runs[2]]))
        assert np.array_equal(found.values, values(runs[2], method)) and found.stderr is None and found.spread.members == 1


def test_many_methods_and_named_queries_go_through_ensembles_as_through_methods(runs):
    named = [hw.Query("first", tuple(t[:2] for t in ASKED)), hw.Query("rest", tuple(t[2:] for t in ASKED))]
    ensemble, alone = scores(runs[0], [hw.Ensemble(hw.TracIn(), runs), hw.TracIn()], named)
    assert ensemble.query_names == alone.query_names == ("first", "rest")
    assert close(ensemble.values, np.mean([values(run, hw.TracIn(), named) for run in runs], axis=0))


def test_the_measure_is_that_of_the_call(runs):
    def minus(model, batch):
        return -TASK.measure(model, batch)

    plain, turned = (values(runs[0], hw.Ensemble(hw.GradDot(), runs), **more) for more in ({}, {"measure": minus}))
    assert np.array_equal(plain, -turned)


# ------------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("method", [*METHODS, Kernel(dim=8), hw.Trak(dim=8)], ids=lambda m: type(m).__name__)
def test_one_by_one_is_together_in_any_order(method, runs, copies):
    """Bit by bit, and each call computes only the members that it adds."""
    together = scores(runs[0], hw.Ensemble(method, runs))
    for count in (1, 2, 3):
        found = scores(copies[0], hw.Ensemble(method, copies[:count]))
        assert found.provenance["cost"]["computed_now"] == 1
    again = scores(copies[1], hw.Ensemble(method, copies[::-1]))
    assert bits(found) == bits(together) == bits(again) and again.provenance["cost"]["computed_now"] == 0
    assert again.spread == together.spread


def test_what_is_kept_is_for_one_question_method_and_model(copies):
    def computed(method=None, queries=ASKED, **settings):
        return scores(copies[0], hw.Ensemble(method or hw.GradDot(), copies[:2]), queries, **settings).provenance["cost"]["computed_now"]

    assert [computed(), computed(), computed(batch_size=7)] == [2, 0, 0]
    assert computed(hw.GradCos()) == computed(queries=data(6, 9)) == computed(tolerance=0.01) == 2
    assert computed(measure=lambda model, batch: model(batch[0])[:, 0]) == 2


def test_a_killed_call_goes_on_where_it_was(runs, copies, monkeypatch):
    ensemble, work, calls = hw.Ensemble(hw.Source(segments=2), copies), carrying.parts_of, []

    def dies_at_the_second(method, request):
        calls.append(request.run.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(method, request)

    monkeypatch.setattr(carrying, "parts_of", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        scores(copies[0], ensemble)
    found = scores(copies[0], ensemble)
    assert len(calls) == 4 and calls[0] not in calls[1:], "the member that was finished was computed again"
    assert bits(found) == bits(scores(runs[0], hw.Ensemble(hw.Source(segments=2), runs)))


def test_a_member_that_fails_is_named_and_the_others_are_kept(copies, monkeypatch):
    work = carrying.parts_of

    def fails_at_the_last(method, request):
        if len(done) == 2:
            raise NotFinite("a loss of nan")
        done.append(request.run.path)
        return work(method, request)

    done = []
    monkeypatch.setattr(carrying, "parts_of", fails_at_the_last)
    with pytest.raises(NotFinite) as caught:
        scores(copies[0], hw.Ensemble(hw.GradDot(), copies))
    left = next(run for run in copies if run.path not in done)
    assert str(left.path) in caught.value.__notes__[0] and "3 of 3" in caught.value.__notes__[0]
    monkeypatch.setattr(carrying, "parts_of", work)
    assert scores(copies[0], hw.Ensemble(hw.GradDot(), copies)).provenance["cost"]["computed_now"] == 1


def test_a_damaged_contribution_is_named_and_made_again_once_deleted(copies):
    found = scores(copies[0], hw.Ensemble(hw.GradDot(), copies))
    (tensors,) = (copies[1].path / "members").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedFile, match="made again"):
        scores(copies[0], hw.Ensemble(hw.GradDot(), copies))
    shutil.rmtree(copies[1].path / "members")
    assert bits(scores(copies[0], hw.Ensemble(hw.GradDot(), copies))) == bits(found)


def test_each_model_has_a_projection_of_its_own_that_others_do_not_change(runs, copies):
    """Seeds come from the models' weights: the same in any company, another for each model."""
    seeds = {m["run"]: m["seed"] for m in scores(runs[0], hw.Ensemble(Kernel(dim=8), runs)).provenance["members"]}
    assert len(set(seeds.values())) == 3 and min(seeds.values()) > 0
    alone = scores(copies[1], hw.Ensemble(Kernel(dim=8), [copies[1]])).provenance["members"][0]["seed"]
    assert alone == seeds[str(runs[1].path)]
    explicit = values(runs[1], Kernel(dim=8, seed=alone))
    assert np.array_equal(values(copies[1], hw.Ensemble(Kernel(dim=8), [copies[1]])), explicit)
    assert np.array_equal(values(copies[1], hw.Ensemble(hw.Trak(dim=8), [copies[1]])), values(runs[1], hw.Trak(dim=8).member(alone)))


# ----------------------------------------------------------------------------------------------------- errors and variances


def readers(s):
    """Members with the scores ``s (models, variants, queries, train)``."""
    return [[lambda row=row: {"scores": row} for row in model] for model in s]


def synthetic(models, variants, between, within, queries=20, train=50, seed=0):
    rng = np.random.default_rng(seed)
    shape = (queries, train)
    return rng.normal(size=(models, 1, *shape)) * between**0.5 + rng.normal(size=(models, variants, *shape)) * within**0.5


def test_variance_components_are_recovered():
    s = synthetic(40, 10, between=4.0, within=9.0)
    found, error, spread = combine(mean_of_scores, readers(s))
    assert spread.between == pytest.approx(4.0, rel=0.05) and spread.within == pytest.approx(9.0, rel=0.05)
    assert close(found, s.mean((0, 1))) and close(error, s.mean(1).std(0, ddof=1) / 40**0.5)
    assert spread.error(40, 10) == pytest.approx((error**2).mean(), rel=1e-6)


def test_variance_between_models_is_never_negative():
    spread = combine(mean_of_scores, readers(synthetic(2, 3, between=0.0, within=1.0, queries=1, train=3, seed=1)))[2]
    clamped = [combine(mean_of_scores, readers(synthetic(2, 3, 0.0, 1.0, 1, 3, seed)))[2].between for seed in range(20)]
    assert min(clamped) == 0 and spread.error(2, 3) >= 0


@pytest.mark.parametrize(("models", "variants"), [(6, 1), (1, 6), (5, 3)])
def test_standard_errors_are_the_spread_of_repeated_ensembles(models, variants):
    """Many ensembles of the same law: their scores vary by what each of them says its error is."""
    found = [combine(mean_of_scores, readers(synthetic(models, variants, 2.0, 1.0, seed=seed))) for seed in range(60)]
    if models == 1:  # one model's masks say nothing about another model
        found = [combine(mean_of_scores, readers(synthetic(1, variants, 0.0, 1.0, seed=seed))) for seed in range(60)]
    actual = np.var([f[0] for f in found], axis=0, ddof=1).mean()
    assert np.mean([np.mean(f[1] ** 2) for f in found]) == pytest.approx(actual, rel=0.05)


def test_gains_of_one_more_member():
    assert Spread(3, 4, 4.0, 9.0).gain() == Gain(*(v**0.5 for v in (4 / 3 + 9 / 12, 4 / 3 + 9 / 15, 4 / 4 + 9 / 16)))
    assert Spread(1, 4, None, 9.0).gain() == Gain(1.5, (9 / 5) ** 0.5, None)
    assert Spread(4, 1, 9.0, None).gain() == Gain(1.5, None, (9 / 5) ** 0.5)
    assert Spread(1, 1, None, None).gain() == Gain(None, None, None)
    assert [Spread(3, 4, 1.0, 1.0).degrees, Spread(1, 4, None, 1.0).degrees, Spread(1, 1, None, None).degrees] == [2, 3, 0]
    assert "one more model by" in str(Spread(3, 4, 4.0, 9.0)) and "another training" in str(Spread(1, 4, None, 9.0))
    assert str(Spread(3, 4, 0.0, 0.0)).endswith("all of them equal") and "3 independent models" in str(Spread(3, 1, 1.0, None))


def test_the_precision_of_the_members_is_that_of_the_answer():
    s = synthetic(3, 2, 1.0, 1.0).astype(np.float32)
    found, error, _ = combine(mean_of_scores, readers(s))
    assert found.dtype == error.dtype == np.float32 and close(found, s.astype(float).mean((0, 1)), 1e-6)
    equal = combine(mean_of_scores, readers(np.broadcast_to(s[:1, :1], (3, 2, *s.shape[2:]))))
    assert np.array_equal(equal[0], s[0, 0]) and not equal[1].any()


# --------------------------------------------------------------------------------------------------------- reliable scores


def made(signal, members=5, noise=1.0, seed=0, shape=(40, 250)):
    """Scores of an ensemble whose members are ``signal`` and noise."""
    rng = np.random.default_rng(seed)
    s = signal + noise * rng.normal(size=(members, 1, *shape))
    found, error, spread = combine(mean_of_scores, readers(s))
    return hw.TrainingScores(found, error, "by hand", "measurement", provenance={"spread": vars(spread)})


@pytest.mark.parametrize("members", [2, 3, 10])
def test_of_noise_as_much_passes_as_the_level_allows(members):
    s = made(0.0, members)
    assert s.reliable(0.95).mean() == pytest.approx(0.05, abs=0.01) and s.reliable(0.8).mean() == pytest.approx(0.2, abs=0.02)


def test_the_test_is_students(runs):
    from scipy.stats import ttest_1samp

    each = np.stack([values(run, hw.GradDot()) for run in runs])
    p = ttest_1samp(each, 0.0, axis=0).pvalue
    s = scores(runs[0], hw.Ensemble(hw.GradDot(), runs))
    for level in (0.5, 0.9, 0.95):
        assert np.array_equal(s.reliable(level), p <= 1 - level) and s.reliable(level).any()


def test_the_false_discovery_rate_is_held():
    """A tenth of the scores are real; of those that pass about a twentieth are not, where single tests let a third be noise."""
    truth = np.random.default_rng(1).random((40, 250)) < 0.1
    s = made(4.0 * truth, members=6)
    plain, held = s.reliable(), s.reliable(correction="benjamini-hochberg")
    assert (~truth[plain]).mean() > 0.2 > 0.08 > (~truth[held]).mean() and held[truth].mean() > 0.8
    assert not made(0.0).reliable(correction="benjamini-hochberg").any()


def test_scores_without_errors_pass_unless_they_are_zero():
    s = hw.TrainingScores(np.array([[1.0, 0.0]]), np.zeros((1, 2)), "x", "cosine", provenance={"spread": vars(Spread(3, 1, 0.0, None))})
    assert s.reliable().tolist() == [[True, False]]


def test_what_cannot_be_judged_is_refused(runs):
    with pytest.raises(InputError, match="single member"):
        scores(runs[0], hw.GradDot()).reliable()
    s = made(0.0)
    for bad in ({"level": 1.0}, {"level": 0}, {"correction": "bonferroni"}, {"degrees": 0}):
        with pytest.raises(InputError):
            s.reliable(**bad)
    with pytest.raises(InputError, match="degrees"):
        hw.TrainingScores(np.ones((1, 1)), np.ones((1, 1)), "by hand", "measurement").reliable()


def test_spread_and_reliability_survive_the_disk_and_picking(runs, tmp_path):
    s = scores(runs[0], hw.Ensemble(hw.TracIn(), runs))
    back = hw.load(s.save(tmp_path / "s"))
    assert back.spread == s.spread and np.array_equal(back.reliable(), s.reliable())
    assert np.array_equal(s.at([4, 1]).reliable(), s.reliable()[[4, 1]])
    text = s.to_html(tmp_path / "s.html").read_text()
    assert "3 independent models" in text and f"{s.reliable().mean():.0%}" in text


# ------------------------------------------------------------------------------------------------------------- bad input


def test_the_same_model_twice_is_refused(runs, copies):
    sparser = recorded(copies[0].path.parent / "sparser", seed=0, checkpoints=2)  # the training of runs[0] again, with fewer checkpoints
    assert sparser.checkpoints != runs[0].checkpoints
    for twins in ([runs[0], runs[1], runs[0]], [runs[0], copies[0]], [sparser, runs[0]]):
        with pytest.raises(InputError, match="one member twice"):
            scores(runs[0], hw.Ensemble(hw.GradDot(), twins))


def test_runs_of_other_data_or_another_task_are_refused(runs, tmp_path):
    import tests.influence.test_laws as laws

    other = record(tmp_path / "task", sgd(), model=network(7), task=hw.tasks.Classification(label_smoothing=0.1), steps=10)
    with pytest.raises(DataMismatch, match="task of stage"):
        scores(runs[0], hw.Ensemble(hw.GradDot(), [runs[0], other]))
    train, laws.TRAIN = laws.TRAIN, data(40, 99)
    try:
        strange = record(tmp_path / "data", sgd(), model=network(8), steps=10)
    finally:
        laws.TRAIN = train
    with pytest.raises(DataMismatch, match="fingerprint"):
        scores(runs[0], hw.Ensemble(hw.GradDot(), [runs[0], strange]))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda runs: hw.Ensemble(hw.GradDot(), []), "no runs"),
        (lambda runs: hw.Ensemble(hw.GradDot(), ["runs/1"]), "a str among the runs"),
        (lambda runs: hw.Ensemble(hw.GradDot, runs), "construct it"),
        (lambda runs: hw.Ensemble(hw.DropoutEnsemble, runs), "construct it"),
        (lambda runs: hw.Ensemble("GradDot", runs), "where an ensemble's method belongs"),
        (lambda runs: hw.Ensemble(hw.Ensemble(hw.GradDot(), runs), runs), "Ensemble inside Ensemble"),
        (lambda runs: hw.Ensemble(hw.Influence(damping=[0.1, 1.0]), runs), "a sweep of 2 dampings"),
    ],
)
def test_what_is_no_ensemble_is_refused_before_any_work(make, told, runs):
    with pytest.raises(InputError, match=told):
        make(runs)


def test_a_single_run_need_not_be_in_a_list(runs):
    assert np.array_equal(values(runs[0], hw.Ensemble(hw.GradDot(), runs[0])), values(runs[0], hw.GradDot()))


def test_the_plan_is_told_before_and_nothing_at_all_without_progress(copies, capsys):
    scores(copies[0], hw.Ensemble(hw.GradDot(), copies[:2]))
    assert capsys.readouterr().err == ""
    hw.trace(copies[0], ASKED, hw.Ensemble(hw.GradDot(), copies), progress=True)
    told = capsys.readouterr().err
    assert "3 members of 3 model(s); 2 of 3 contributions are kept" in told and "MB" in told and "example gradients" in told
