"""Dropout ensembles: masks that belong to members or examples, the masked model used throughout, and what masks cannot do."""

import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import headwater as hw
from headwater.capture.capture import Layout
from headwater.errors import GradientError, InputError
from headwater.influence.ensembles.bits import kept
from headwater.influence.ensembles.masks import Ids, Mask, Site
from headwater.influence.ensembles.survey import survey
from headwater.philox import key_of
from headwater.training import segments
from tests.influence.brute import Brute, source
from tests.influence.members import METHODS, RATE, Kernel, close, fresh, network, recorded, scores, values
from tests.influence.test_laws import ASKED, TASK, TRAIN, data, softmax_hessian

ANY = pytest.mark.parametrize("masks", ["member", "example"])
EACH_AND_TRAK = pytest.mark.parametrize("method", [*METHODS, hw.Trak()], ids=lambda m: type(m).__name__)
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("dropout") / "run")


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    return [run, recorded(tmp_path_factory.mktemp("dropout") / "other", seed=1)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def recorded_on(path, model, train, task=TASK, steps=6, checkpoints=2):
    """Any model, trained for a few steps on all of its data."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=train, steps=steps, checkpoints=checkpoints)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model, train).mean().backward()
        optimizer.step()
        recorder.step(range(len(train[0])))
    return recorder.finish()


def views(run, ensemble):
    """Each member's view of the run."""
    return [member.view() for member in ensemble.variants(run)]


def model_of(view):
    return view.load(view.model(), view.checkpoints[-1])


# --------------------------------------------------------------------------------- the masked model, throughout, by brute force


@EACH
def test_members_are_the_masked_model_at_every_checkpoint_in_gradients_and_curvature(method, run):
    """Each formula written out with torch.func for a network whose hidden units are multiplied by the member's mask."""
    method = method if not hasattr(method, "curvature") else type(method)(**{**vars(method), "curvature": hw.Dense()})
    ensemble, each = hw.DropoutEnsemble(method, members=3), []
    for view in views(run, ensemble):
        hidden = model_of(view)[2](torch.ones(1, 6, dtype=torch.float64))[0]
        assert set(hidden.tolist()) <= {0.0, 1 / (1 - RATE)}
        brute = Brute(run)
        brute.model = nn.Sequential(*list(run.model())[:2], _Times(hidden), run.model()[3])
        each.append(_by_hand(method, brute, run))
    found = scores(run, ensemble)
    assert close(found.values, np.mean(each, axis=0), 1e-8)
    assert close(found.stderr, np.std(each, axis=0, ddof=1) / 3**0.5, 1e-8)


class _Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def _by_hand(method, brute, run):
    def curvature(state, stage=None):
        return brute.gauss_newton(state, TRAIN[0], softmax_hessian)

    final, n = run.weights(30), len(TRAIN[0])
    u, g = brute.gradients(TASK.measure, final, ASKED), brute.gradients(TASK.loss, final, TRAIN)
    if isinstance(method, hw.Source):
        return source(brute, TASK.measure, ASKED, segments(run, 2), curvature)
    if isinstance(method, hw.Influence):
        h = curvature(final) + 0.1 * np.eye(u.shape[1])
        return -u @ np.linalg.solve(h, g.T) / n
    if isinstance(method, hw.TracIn):
        steps = run.checkpoints[1:]
        pairs = [(brute.gradients(TASK.measure, run.weights(s), ASKED), brute.gradients(TASK.loss, run.weights(s), TRAIN)) for s in steps]
        return -sum(0.1 * (b - a) * u @ g.T for (u, g), a, b in zip(pairs, run.checkpoints, steps, strict=False)) / n
    if isinstance(method, hw.GradCos):
        return -(u @ g.T) / np.linalg.norm(u, axis=1)[:, None] / np.linalg.norm(g, axis=1)
    return -u @ g.T / n


@EACH_AND_TRAK
@ANY
def test_masks_that_drop_nothing_leave_the_single_model(method, masks, run):
    found = scores(run, hw.DropoutEnsemble(method, members=3, masks=masks, rate=0.0))
    assert close(found.values, values(run, method), 1e-14) and float(found.stderr.max()) < 1e-15


@EACH_AND_TRAK
@ANY
def test_scores_do_not_depend_on_batches(method, masks, run, tmp_path):
    ensemble = hw.DropoutEnsemble(method, members=1, masks=masks)
    found = [values(fresh(run, tmp_path / str(size)), ensemble, batch_size=size) for size in (7, 40)]
    assert close(*found, 1e-10) and not close(found[0], values(run, method), 1e-2)


@ANY
def test_a_query_is_scored_alike_in_any_company(masks, run, tmp_path):
    ensemble, order = hw.DropoutEnsemble(hw.GradDot(), members=2, masks=masks), [4, 1, 1, 3]
    whole = values(run, ensemble)
    assert close(values(run, ensemble, tuple(t[order] for t in ASKED), batch_size=3), whole[order])
    assert close(values(run, ensemble, tuple(t[2:3] for t in ASKED)), whole[2:3])
    named = values(run, ensemble, [hw.Query("some", tuple(t[:4] for t in ASKED)), hw.Query("rest", tuple(t[4:] for t in ASKED))])
    assert close(named, np.stack([whole[:4].sum(0), whole[4:].sum(0)])), "and a named set is the sum of its members"


def test_an_example_has_another_mask_as_a_query_than_in_training(run):
    """The same examples on both sides: with masks of examples their gradients differ, with those of members they are the same."""
    for masks, symmetric in (("member", True), ("example", False)):
        ensemble = hw.DropoutEnsemble(hw.GradDot(), members=1, masks=masks)
        found = values(run, ensemble, TRAIN, measure=lambda model, batch: -TASK.loss(model, batch))
        assert close(found, found.T, 1e-9) == symmetric


def test_masks_of_examples_are_drawn_for_each_one(run):
    """A member by hand: each example's gradient under its own mask, as the masks show it when they are asked."""
    member = hw.DropoutEnsemble(hw.GradDot(), members=1, masks="example").variants(run)[0]
    view, seen = member.view(), []
    model = model_of(view)
    model[2].register_forward_hook(lambda module, args, out: seen.append((out / args[0]).detach()))
    view.stages[0].task.loss(model, view.stages[0].data.batch(range(40)))
    hidden = seen[0]
    assert len({tuple(row.tolist()) for row in hidden}) > 20 and float((hidden == 0).double().mean()) == pytest.approx(RATE, abs=0.06)
    brute, rows = Brute(run), []
    for i in range(40):
        brute.model = nn.Sequential(*list(run.model())[:2], _Times(hidden[i]), run.model()[3])
        rows.append(brute.gradients(TASK.loss, run.weights(30), tuple(t[i : i + 1] for t in TRAIN))[0])
    from headwater.influence.engine import Engine

    engine = Engine.of(view, None)
    found = engine.capture.gradients(view.stages[0].task.loss, view.stages[0].data.batch([3, 1, 39]))
    each = {}
    for name, block in engine.capture.blocks.items():
        each |= block.unpack(found[name].dense(), {p: engine.model.get_parameter(p).shape for p in block.parameters})
    assert close(torch.cat([each[name].flatten(1) for name in brute.names], 1), np.stack(rows)[[3, 1, 39]])


# --------------------------------------------------------------------------------------------------------------- members


def test_a_member_is_the_same_among_few_and_many_and_costs_only_itself(run, tmp_path):
    copy, method = fresh(run, tmp_path / "copy"), hw.TracIn()
    three, five = (scores(copy, hw.DropoutEnsemble(method, members=m)) for m in (3, 5))
    assert [s.provenance["cost"]["computed_now"] for s in (three, five)] == [3, 2]
    again = scores(fresh(run, tmp_path / "again"), hw.DropoutEnsemble(method, members=5))
    assert again.values.tobytes() == five.values.tobytes() and again.stderr.tobytes() == five.stderr.tobytes()


def test_seeds_modes_and_models_have_masks_of_their_own(two):
    def masks(run, **settings):
        return [tuple(model_of(v)[2](torch.ones(1, 6).double())[0].tolist()) for v in views(run, hw.DropoutEnsemble(hw.GradDot(), members=12, **settings))]

    plain = masks(two[0])
    assert plain == masks(two[0]) and len(set(plain)) > 6
    assert plain != masks(two[0], seed=1) and plain != masks(two[1])
    assert [sum(v == 0 for row in m for v in row) > 36 for m in (plain, masks(two[0], rate=0.8))] == [False, True]


def test_two_levels_are_models_with_masks_each(two):
    """The mean of all, errors between models, and variance components as the one-way layout has them."""
    method, inner = hw.TracIn(), hw.DropoutEnsemble(hw.TracIn(), members=3)
    s = np.stack([[values(view, method) for view in views(run, inner)] for run in two])
    found = scores(two[0], hw.Ensemble(inner, two))
    assert close(found.values, s.mean((0, 1))) and close(found.stderr, s.mean(1).std(0, ddof=1) / 2**0.5)
    within = s.var(1, ddof=1).mean()
    assert found.spread.within == pytest.approx(within) and found.spread.between == pytest.approx(s.mean(1).var(0, ddof=1).mean() - within / 3)
    assert found.spread.degrees == 1 and "one more variant of each" in str(found.spread)
    assert np.array_equal(found.values, values(two[0], hw.Ensemble(inner, two[::-1])))


def test_members_of_two_levels_are_those_that_a_single_model_has_kept(two, tmp_path):
    copies = [fresh(run, tmp_path / str(k)) for k, run in enumerate(two)]
    inner = hw.DropoutEnsemble(hw.GradDot(), members=2)
    scores(copies[0], inner)
    assert scores(copies[1], hw.Ensemble(inner, copies)).provenance["cost"]["computed_now"] == 2


# ----------------------------------------------------------------------------------------------------------- forward only


@pytest.mark.parametrize("method", [Kernel(), hw.Trak()], ids=repr)
def test_forward_only_reweighs_the_whole_models_scores(method, two):
    """Kernels are the whole model's; scores are its scores times mean masked weight over weight (both computed apart)."""
    for target, runs in ((two[0], two[:1]), (hw.Ensemble, two)):
        inner = hw.DropoutEnsemble(method, members=4, forward_only=True)
        found = values(two[0], hw.Ensemble(inner, two) if target is hw.Ensemble else inner)
        whole = [carried(run, method) for run in runs]
        masked = np.mean([method.weight(_asked_of(view)) for run in runs for view in views(run, hw.DropoutEnsemble(method, members=4))], axis=0)
        assert close(found, np.mean([w["kernel"] for w in whole], axis=0) * masked)
        naive = values(two[0], hw.Ensemble(method, runs))
        assert close(found, naive * masked / np.mean([w["weight"] for w in whole], axis=0)) and not close(found, naive, 1e-3)


def _asked_of(run):
    from headwater.influence.queries import ask
    from headwater.influence.request import Request

    return Request(run, ask(ASKED, TASK, None), progress=False)


def carried(run, method):
    return method.parts(_asked_of(run)).arrays


def test_forward_only_shares_what_the_whole_model_has_kept(two, tmp_path):
    copies = [fresh(run, tmp_path / str(k)) for k, run in enumerate(two)]
    method = Kernel(dim=8)
    scores(copies[0], hw.Ensemble(method, copies))
    inner = hw.DropoutEnsemble(method, members=3, forward_only=True)
    assert scores(copies[0], hw.Ensemble(inner, copies)).provenance["cost"]["computed_now"] == 6, "only weights are new"
    other = scores(copies[0], hw.Ensemble(inner, copies), data(3, 5))
    assert other.provenance["cost"]["computed_now"] == 2, "weights know no queries"
    assert scores(copies[0], inner).provenance["cost"]["computed_now"] == 1, "nor a projection: a single model's is another, its weights are the same"


def test_forward_only_with_masks_that_drop_nothing_is_the_whole_model(run):
    found = values(run, hw.DropoutEnsemble(Kernel(), members=3, forward_only=True, rate=0.0))
    assert close(found, values(run, Kernel()), 1e-14)


@pytest.mark.parametrize("method", [Kernel(), hw.Trak()], ids=repr)
def test_kernels_and_weights_of_full_masks_are_averaged_apart(method, run):
    parts = [carried(view, method) for view in views(run, hw.DropoutEnsemble(method, members=3))]
    found = values(run, hw.DropoutEnsemble(method, members=3))
    assert close(found, np.mean([p["kernel"] for p in parts], axis=0) * np.mean([p["weight"] for p in parts], axis=0))


# ------------------------------------------------------------------------------------------------------------------ masks


def test_bits_are_kept_at_their_rate_and_independently():
    bits = kept(key_of("a"), 0.3, (50, 40, 25)).double()
    assert float(bits.mean()) == pytest.approx(0.7, abs=0.01)
    flat = bits.reshape(50, -1)
    assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 0.15
    own = kept(key_of("a"), 0.5, (8,), torch.arange(4000)).double()
    assert float((torch.corrcoef(own.T) - torch.eye(8)).abs().max()) < 0.06
    assert kept(key_of("a"), 0.0, (100,)).all() and not kept(key_of("a"), 1.0, (100,)).any()


@pytest.mark.parametrize("shape", [(5,), (5, 3), (4, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3)])
def test_a_units_bit_depends_on_its_coordinates_alone(shape):
    larger = tuple(size + 3 * (k > 0 or len(shape) < 5) for k, size in enumerate(shape))
    ids = torch.tensor([7, -3, 2**40 + 1])
    corner = tuple(slice(0, size) for size in shape)
    if len(shape) <= 4:
        assert torch.equal(kept(key_of("b"), 0.5, shape), kept(key_of("b"), 0.5, larger)[corner])
        assert torch.equal(kept(key_of("b"), 0.5, shape, ids), kept(key_of("b"), 0.5, larger, ids)[(slice(None), *corner)])
    some = kept(key_of("b"), 0.5, shape, ids[[2, 0]])
    assert torch.equal(some, kept(key_of("b"), 0.5, shape, ids)[[2, 0]]) and some.shape == (2, *shape)
    assert torch.equal(torch.func.vmap(lambda i: kept(key_of("b"), 0.5, shape, i[None])[0])(ids), kept(key_of("b"), 0.5, shape, ids))


def mask(kind="", rate=0.4, layout="first", axes=3, ids=None, calls=1):
    site = Site("layer", rate, "channels" in kind, "alpha" in kind, layouts=(Layout(layout, axes),) * calls)
    return Mask(site, ("test",), ids)


@pytest.mark.parametrize(("kind", "module"), [("", nn.Dropout), ("channels", nn.Dropout2d), ("alpha", nn.AlphaDropout), ("channels alpha", nn.FeatureAlphaDropout)])
def test_masks_do_to_each_unit_what_torch_does(kind, module):
    """Every unit becomes one of the two things that torch makes of it, in the same proportion."""
    x = torch.randn(1, 40, 5, 5, dtype=torch.float64)
    theirs = torch.stack([module(0.4)(x) for _ in range(40)])
    low, high = theirs.min(0).values, theirs.max(0).values
    found = torch.stack([Mask(Site("layer", 0.4, "channels" in kind, "alpha" in kind), (k,))(x) for k in range(40)])
    assert torch.all(torch.isclose(found, low) | torch.isclose(found, high))
    dropped = torch.isclose(found, module(0.4)(torch.full_like(x, 1e9)).min())  # what torch makes of a dropped unit, whatever it was
    assert float(dropped.double().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.equal(dropped, dropped[..., :1, :1].expand_as(dropped)) == ("channels" in kind)


def test_masks_lie_along_everything_but_the_examples():
    x = torch.ones(2, 7, 6)
    first = mask()(x)
    assert torch.equal(first[0], first[1]) and len({tuple(row.tolist()) for row in first[0]}) > 3, "positions have bits of their own"
    assert torch.equal(mask()(torch.ones(2, 4, 6)), first[:, :4]), "whatever the length"
    assert torch.equal(mask(layout="second")(x.transpose(0, 1)).transpose(0, 1), first)
    assert torch.equal(mask(layout="absent", axes=2)(x[0]), first[0]) and torch.equal(mask(layout="absent", axes=2)(x), first)
    assert torch.equal(mask(layout="flat", axes=2)(torch.ones(14, 6))[0].expand(14, 6), mask(layout="flat", axes=2)(torch.ones(14, 6)))


def test_masks_of_examples_follow_them_in_every_layout():
    ids = Ids()
    x, own = torch.ones(3, 7, 6), torch.tensor([5, 9, -2])

    def through(layout, batch, who, axes=3):
        with ids.of(who):
            return mask(layout=layout, axes=axes, ids=ids)(batch)

    first = through("first", x, own)
    assert not torch.equal(first[0], first[1]) and torch.equal(through("first", x[:2], own[[2, 0]]), first[[2, 0]])
    assert torch.equal(through("second", x.transpose(0, 1), own).transpose(0, 1), first)
    assert torch.equal(through("flat", x.flatten(0, 1), own, 2).unflatten(0, (3, 7)), first)
    assert torch.equal(through("absent", x[0], own, 2), mask(layout="absent", axes=2)(x[0])), "without examples it is the member's"
    with pytest.raises(GradientError, match="rows that belong to examples"):
        through("flat", torch.ones(8, 6), own, 2)
    with pytest.raises(GradientError, match="no ids"):
        mask(ids=ids)(x)


class Twice(nn.Module):
    """One dropout module, called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 40), nn.Dropout(0.5), nn.Linear(40, 3)

    def forward(self, x):
        return self.last(self.drop(torch.ones(1, 40).double()) * self.drop(self.first(x)))


def test_a_module_that_is_called_twice_has_two_masks_the_same_in_every_pass(tmp_path):
    run = recorded_on(tmp_path / "run", Twice().double(), TRAIN)
    seen = []
    model = model_of(views(run, hw.DropoutEnsemble(hw.GradDot(), members=1))[0])
    model.drop.register_forward_hook(lambda module, args, out: seen.append((out != 0)[0].tolist()))
    for _ in range(2):
        model(TRAIN[0])
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


class Encoder(nn.Module):
    """A transformer's layer, whose fused form would know nothing of masks; its attention drops inside a function."""

    def __init__(self, attention=0.0, batch_first=True):
        super().__init__()
        self.embed, self.first = nn.Embedding(9, 8), batch_first
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first)
        layer.self_attn.dropout = attention
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        h = self.body(h) if self.first else self.body(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


def tokens(n, seed=0, length=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (n, length), generator=g), torch.randint(0, 3, (n,), generator=g)


def test_fused_transformer_layers_do_not_pass_masks_by(tmp_path):
    run = recorded_on(tmp_path / "run", Encoder().double(), tokens(12))
    found = survey(run, None, None)
    assert [s.path for s in found.sites] == ["body.layers.0.dropout", "body.layers.0.dropout1", "body.layers.0.dropout2"] and not found.silent
    masked, plain, x = model_of(views(run, hw.DropoutEnsemble(hw.GradDot(), members=1))[0]), model_of(run), tokens(4)[0]
    with torch.no_grad():
        fused = masked(x)
    assert torch.allclose(fused, masked(x)) and not torch.allclose(fused, plain(x), atol=1e-3)


@ANY
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_in_both_layouts_are_independent_of_batches(batch_first, masks, tmp_path):
    """Also what no rule covers (the attention's packed projection) and where examples lie on the second axis."""
    run = recorded_on(tmp_path / "run", Encoder(batch_first=batch_first).double(), tokens(12))
    ensemble = hw.DropoutEnsemble(hw.GradDot(), members=1, masks=masks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch's own, about a batching rule
        found = [values(fresh(run, tmp_path / str(size)), ensemble, tokens(3, 1), batch_size=size) for size in (5, 12)]
    assert close(*found, 1e-9)


@ANY
@pytest.mark.filterwarnings("ignore:build.. makes another model")  # the same by another way of computing, as its code cannot tell
def test_parts_that_the_backward_pass_runs_again_meet_the_same_masks(masks, tmp_path):
    class Checkpointed(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.inner, self.last, self.again = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4)), nn.Linear(6, 3), again

        def forward(self, x):
            return self.last(checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x))

    found = []
    for again in (True, False):
        torch.manual_seed(0)
        run = recorded_on(tmp_path / str(again), Checkpointed(again).double(), TRAIN, steps=2)
        run = hw.Run.open(run.path, build=lambda again=again: Checkpointed(again).double(), train=TRAIN, task=TASK)
        if found:  # the weights of the first, so that only the way of computing differs
            run = hw.Run.open(tmp_path / "True", build=lambda: Checkpointed(False).double(), train=TRAIN, task=TASK)
        found.append(values(run, hw.DropoutEnsemble(hw.GradDot(), members=2, masks=masks)))
    assert close(*found)


@pytest.mark.parametrize("kind", ["plain functions", "regression", "language", "a subclass"])
def test_tasks_of_every_kind_hand_ids_on(kind, tmp_path):
    """To gradients of both sides and to the curvature, in batches of any size; and a mask that drops nothing changes nothing."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 1 if kind == "regression" else 3)).double()
    task, train, asked = TASK, TRAIN, ASKED
    if kind == "plain functions":
        task = hw.tasks.Task(TASK.loss, TASK.measure, sample=lambda model, batch, draws: (batch[0], draws.categorical(model(batch[0]))))
    elif kind == "regression":
        task, train, asked = hw.tasks.Regression(), (TRAIN[0], TRAIN[0][:, :1]), (ASKED[0], ASKED[0][:, :1])
    elif kind == "language":
        net = nn.Sequential(nn.Embedding(9, 6), nn.Dropout(0.4), nn.Linear(6, 9)).double()
        task, train, asked = hw.tasks.Language(), (tokens(12)[0],), (tokens(3, 1)[0],)
    else:
        task = Own()
    run, method = recorded_on(tmp_path / "run", net, train, task), hw.Influence(damping=0.1)
    found = [values(fresh(run, tmp_path / str(size)), hw.DropoutEnsemble(method, members=1, masks="example"), asked, batch_size=size) for size in (5, 40)]
    whole, nothing = values(run, method, asked), values(run, hw.DropoutEnsemble(method, members=1, masks="example", rate=0.0), asked)
    assert close(*found, 1e-8) and not close(found[0], whole, 1e-2) and close(nothing, whole)


def test_measures_with_ids_are_told_apart_in_the_names_of_saved_work():
    from headwater.influence.ensembles.keyed import KeyedMeasure
    from headwater.tasks.code import code_digest

    digests = {code_digest(KeyedMeasure(measure, Ids()), held=True) for measure in (TASK.measure, TASK.loss, Own().measure, lambda model, batch: batch[0])}
    assert len(digests) == 4
    assert code_digest(KeyedMeasure(TASK.measure, Ids()), held=True) == code_digest(KeyedMeasure(hw.tasks.Classification().measure, Ids()), held=True)


class Own(hw.tasks.Classification):
    """A user's task with a measure of its own."""

    def measure(self, model, batch):
        return model(batch[0])[:, 0]


# ------------------------------------------------------------------------------------- models without, and what is left out


def bare():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture(scope="module")
def undropped(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("dropout") / "bare", model=bare())


def test_a_model_without_dropout_is_refused_with_the_way_out(undropped):
    with pytest.raises(InputError, match=r"without dropout modules[\s\S]*insert="):
        scores(undropped, hw.DropoutEnsemble(hw.GradDot()))


@ANY
@pytest.mark.parametrize("where", [{"insert": {"1": 0.4}}, {"insert": "activations", "rate": 0.4}])
def test_inserted_dropout_multiplies_the_layers_output_and_says_that_the_model_is_another(where, masks, undropped):
    ensemble = hw.DropoutEnsemble(hw.GradDot(), members=2, masks=masks, **where)
    with pytest.warns(UserWarning, match="no longer the trained model"):
        found = values(undropped, ensemble)
    with pytest.warns(UserWarning, match="no longer the trained model"):
        member = ensemble.variants(undropped)[0]
    view, seen = member.view(), []
    model = model_of(view)
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    view.stages[0].task.loss(model, view.stages[0].data.batch(range(40)))
    ratio = seen[0] / undropped.load(undropped.model(), 30)[:2](TRAIN[0])
    assert torch.all((ratio == 0) | torch.isclose(ratio, torch.tensor(1 / 0.6).double()))
    assert (len(set(map(tuple, (ratio == 0).tolist()))) == 1) == (masks == "member")
    assert not close(found, values(undropped, hw.GradDot()), 1e-2)


class Functional(nn.Module):
    def __init__(self, module=True):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.4) if module else None
        self.spare = nn.Dropout(0.2)

    def forward(self, x):
        h = F.dropout(self.inner(x), self.spare.p, self.training)  # as transformers' attention does with a module's rate
        return self.last(self.drop(h) if self.drop is not None else h)


def test_dropout_that_masks_leave_out_is_named(tmp_path):
    run = recorded_on(tmp_path / "run", Functional().double(), TRAIN)
    with pytest.warns(UserWarning, match=r"the model itself.*inside a function.*'spare'.*never called.*1 dropout module"):
        scores(run, hw.DropoutEnsemble(hw.GradDot(), members=1))
    alone = recorded_on(tmp_path / "alone", Functional(module=False).double(), TRAIN)
    with pytest.raises(InputError, match="draw inside a function"):
        scores(alone, hw.DropoutEnsemble(hw.GradDot(), members=1))
    attention = recorded_on(tmp_path / "attention", Encoder(attention=0.1).double(), tokens(12))
    assert survey(attention, None, None).drawing == ("body.layers.0.self_attn",)
    recurrent = nn.Sequential(nn.LSTM(4, 6, 2, dropout=0.3, batch_first=True), _First(), nn.Dropout(0.1), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    found = survey(recorded_on(tmp_path / "lstm", recurrent, (TRAIN[0][:, None], TRAIN[1]), steps=1), None, None)
    assert found.drawing == ("0",) and [s.path for s in found.sites] == ["2"] and not found.untried


class _First(nn.Module):
    def forward(self, x):
        return x[0][:, -1]


def test_a_model_that_does_not_run_in_training_mode_is_told(tmp_path):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = nn.Linear(4, 3), nn.Dropout(0.4)

        def forward(self, x):
            if self.training and len(x) < 3:
                raise ValueError("too few")
            return self.drop(self.inner(x))

    run = recorded_on(tmp_path / "run", Moody().double(), TRAIN)
    with pytest.warns(UserWarning, match=r"not looked for.*too few"):
        scores(run, hw.DropoutEnsemble(hw.GradDot(), members=1))


def test_runs_of_several_stages_have_masks_in_all_of_them(tmp_path):
    """Columns of both stages, each under its own task, in any batches; an example's mask goes by its column."""
    model = network(0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    later = data(12, 8)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=2, steps=4)
    for number, train in enumerate((TRAIN, later)):
        if number:
            recorder.stage("later", train=later, task=TASK, optimizer=optimizer, checkpoints=2, steps=4)
        for _ in range(4):
            optimizer.zero_grad()
            TASK.loss(model, train).mean().backward()
            optimizer.step()
            recorder.step(range(len(train[0])))
    recorder.finish()
    for masks in ("member", "example"):
        found = []
        for size in (5, 40):
            shutil.rmtree(tmp_path / "run" / "members", ignore_errors=True)
            run = hw.Run.open(tmp_path / "run", build=lambda: network(0), train={"train": TRAIN, "later": later}, task=TASK)
            found.append(values(run, hw.DropoutEnsemble(hw.Source(segments=2), members=2, masks=masks), batch_size=size))
        assert found[0].shape == (6, 52) and close(*found) and np.abs(found[0]).min() > 0


def test_looking_for_dropout_leaves_the_generators_alone(run):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    scores(run, hw.DropoutEnsemble(hw.GradDot(), members=2, seed=11))
    assert torch.equal(torch.get_rng_state(), before)


def test_one_dimensional_dropout_of_plain_features_is_refused(tmp_path):
    """torch takes (features, batch) for a single example there, and drops whole examples in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = recorded_on(tmp_path / "run", nn.Sequential(nn.Linear(4, 6), nn.Dropout1d(0.3), nn.Linear(6, 3)).double(), TRAIN)
    with pytest.raises(InputError, match="would drop whole examples"):
        scores(run, hw.DropoutEnsemble(hw.GradDot()))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: hw.DropoutEnsemble(hw.GradDot(), members=0), "members=0"),
        (lambda: hw.DropoutEnsemble(hw.GradDot(), masks="batch"), "masks='batch'"),
        (lambda: hw.DropoutEnsemble(hw.GradDot(), rate=1.0), "rate=1.0"),
        (lambda: hw.DropoutEnsemble(hw.GradDot(), insert={"1": -0.1}), "insert"),
        (lambda: hw.DropoutEnsemble(hw.GradDot(), insert="everywhere"), "insert='everywhere'"),
        (lambda: hw.DropoutEnsemble(hw.GradDot(), insert="activations"), "without a rate"),
        (lambda: hw.DropoutEnsemble(hw.Source(), forward_only=True), "made of gradients"),
        (lambda: hw.DropoutEnsemble(hw.Trak(output=lambda model, batch: model(batch[0])[:, 0]), masks="example"), "masks='example' for Trak"),
        (lambda: hw.DropoutEnsemble(hw.KNNShapley(), masks="example"), "masks='example' for KNNShapley"),
        (lambda: hw.DropoutEnsemble(hw.Unrolled()), "training did not have"),
        (lambda: hw.DropoutEnsemble(hw.Influence(damping=[1.0, 2.0])), "a sweep of 2"),
        (lambda: hw.DropoutEnsemble(hw.DropoutEnsemble(hw.GradDot())), "two levels"),
        (lambda: hw.DropoutEnsemble(hw.GradDot), "construct it"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, told):
    with pytest.raises(InputError, match=told):
        make()


def test_layers_that_are_not_there_or_hold_no_tensor_are_named(undropped, tmp_path):
    with pytest.raises(InputError, match="no module of that name"):
        scores(undropped, hw.DropoutEnsemble(hw.GradDot(), insert={"fc9": 0.1}))
    recurrent = nn.Sequential(nn.LSTM(4, 6, batch_first=True), _First(), nn.Linear(6, 3)).double()
    run = recorded_on(tmp_path / "run", recurrent, (TRAIN[0][:, None], TRAIN[1]), steps=1)
    with pytest.raises(GradientError, match="an output of type tuple of '0'"):
        scores(run, hw.DropoutEnsemble(hw.GradDot(), insert={"0": 0.1}), (ASKED[0][:, None], ASKED[1]))
    with pytest.raises(InputError, match="without activation modules"):
        scores(run, hw.DropoutEnsemble(hw.GradDot(), insert="activations", rate=0.1), (ASKED[0][:, None], ASKED[1]))


def test_dropout_of_rate_zero_is_none(tmp_path):
    run = recorded(tmp_path / "run", model=network(0, rate=0.0))
    with pytest.raises(InputError, match="rate 0 everywhere"):
        scores(run, hw.DropoutEnsemble(hw.GradDot()))
