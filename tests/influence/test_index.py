"""Laws of the index: it answers as the run does, without the training data; what it leaves out is what its definition says; what is
on the disk is plain, whole, and the same after a kill."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import headwater as hw
from headwater.capture import BlockGradient, Outer
from headwater.errors import DamagedFile, InputError, ModelMismatch, NotFinite, QueryError
from headwater.influence.engine import Engine
from headwater.influence.index.near import MARGIN, Basis, Near, near
from headwater.influence.index.parted import Parted, parted
from headwater.influence.responses import Accumulated, Surviving
from headwater.influence.vectors import Factored, Whole
from headwater.linalg import Diagonal, Flow, Kronecker
from tests.influence.test_laws import ASKED, OPTIMIZERS, TASK, TRAIN, close, record, sgd, values

METHODS = [hw.GradDot(), hw.GradCos(), hw.TracIn(), hw.Influence(), hw.Influence(damping=0.01), hw.Source()]
MEANS = [method for method in METHODS if not isinstance(method, hw.TracIn)]


def index(run, *given, **settings):
    return hw.index(run, *given, progress=False, **settings)


class Locked(torch.utils.data.Dataset):
    """A dataset that can be closed: from then on it raises when an example is read."""

    def __init__(self, items):
        self.items, self.closed, self.reads, self.limit = items, False, 0, None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads += 1
        if self.closed or self.reads == self.limit:
            raise KeyboardInterrupt if self.limit else AssertionError("a training example was read")
        return self.items[i]


def trained(path, build, train, batch=8, steps=24, checkpoints=4, optimizer=sgd(), task=TASK, **settings):
    """A recorded training of a model on a list of examples, or on several for as many stages."""
    model = build()
    stages = train if isinstance(train, dict) else {"training": train}
    recorder = None
    for name, items in stages.items():
        opt = optimizer(model)
        if recorder is None:
            recorder = hw.Recorder(path, model, opt, task=task, train=items, steps=steps, checkpoints=checkpoints, **settings)
        else:
            recorder.stage(name, train=items, optimizer=opt, steps=steps, checkpoints=checkpoints)
        for step in range(steps):
            ids = [(step * batch + i) % len(items) for i in range(batch)]
            opt.zero_grad()
            task.loss(model, hw.tasks.Examples(items, task.collate).batch(ids)).mean().backward()
            opt.step()
            recorder.step(ids)
    return recorder.finish()


# ------------------------------------------------------------------------------------------------ it answers as the run does


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_answers_equal_the_runs_for_every_optimizer(kind, tmp_path):
    run = record(tmp_path / "run", OPTIMIZERS[kind])
    for method, found, truth in zip(METHODS, values(index(run), method=METHODS), values(run, method=METHODS), strict=True):
        assert close(found, truth, 1e-12), method


class Words(nn.Module):
    """Every form that rows are kept in: looked-up entries, factors at several positions, coordinates of norms and of a tied weight."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(40, 6, padding_idx=0), nn.Linear(6, 30), nn.LayerNorm(30)
        self.back, self.scale, self.out = nn.Linear(30, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, words):
        there = (words > 0).unsqueeze(-1)
        h = self.back(self.norm(self.first(self.words(words)).tanh())) * there
        return self.out(self.scale * h.sum(1) / there.sum(1))


def collate(rows):
    longest = max(len(words) for words, _ in rows)
    return torch.stack([nn.functional.pad(w, (0, longest - len(w))) for w, _ in rows]), torch.tensor([y for _, y in rows])


def sentences(n, seed, longest=5):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=g).tolist()
    return [(torch.randint(1, 40, (k,), generator=g), int(torch.randint(3, (1,), generator=g))) for k in lengths]


def words():
    torch.manual_seed(1)
    return Words().double()


def test_words_norms_and_ragged_batches(tmp_path, monkeypatch):
    """The longest examples come late, so rows have to become wider while they are written."""
    monkeypatch.setattr("headwater.influence.index.build.ROOM", 4000)
    task = hw.tasks.Classification(collate=collate)
    train = sorted(sentences(30, 1, 9), key=lambda row: len(row[0]))
    run = trained(tmp_path / "run", words, train, task=task)
    kept = index(run, batch_size=7)
    assert len(np.load(kept.path / "done.npy")) > 2
    kinds = {name: form["kind"] for name, form in kept.manifest["panels"][0]["blocks"].items()}
    assert kinds["words.weight"] == "lookup" and kinds["norm.weight"] == "coordinates" and kinds["out.weight"] == "factors"
    asked = sentences(5, 2)
    for method in MEANS:
        assert close(values(kept, asked, method), values(run, asked, method), 1e-11), method


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)
        self.norm, self.out = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.norm(self.grouped(self.conv(x.view(-1, 1, 8, 8)).tanh())).mean((2, 3)))


def picture():
    torch.manual_seed(1)
    return Picture().double()


def pictures(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 64, generator=g, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("painted") / "run", picture, pictures(40, 1), checkpoints=6, optimizer=sgd(weight_decay=0.01))


def test_layers_at_many_positions_are_kept_as_means_over_segments(painted):
    kept = index(painted)
    assert [len(panel.at) for panel in kept.panels] == [2, 2, 2, 1]
    for method in MEANS:
        assert close(values(kept, pictures(4, 2), method), values(painted, pictures(4, 2), method), 1e-12), method


def test_each_checkpoint_alone_serves_tracin_too(painted):
    with pytest.raises(InputError, match=r"gradients at step 4\n(.|\n)*as many segments as there are checkpoints"):
        values(index(painted), pictures(4, 2), hw.TracIn())
    alone = index(painted, 6)
    assert close(values(alone, pictures(4, 2), hw.TracIn()), values(painted, pictures(4, 2), hw.TracIn()), 1e-12)


def test_segments_merge_where_their_curvature_was_asked_for(painted):
    merged = [hw.Source(segments=1), hw.Source(segments=(2,))]
    with pytest.raises(InputError, match=r"EKFAC.* at steps 4, 8, 12, 16, 20, 24, was not estimated(.|\n)*also="):
        values(index(painted, 6, curvature=hw.EKFAC(seed=3)), pictures(4, 2), hw.Source(segments=1, curvature=hw.EKFAC(seed=3)))
    kept = index(painted, 6, also=merged)
    for method in merged:
        assert close(values(kept, pictures(4, 2), method), values(painted, pictures(4, 2), method), 1e-12), method


def test_several_stages(tmp_path):
    run = trained(tmp_path / "run", picture, {"training": pictures(20, 1), "second": pictures(14, 3)})
    kept = index(run, 4)
    for method in MEANS:
        method = replace(method, segments=4) if isinstance(method, hw.Source) else method
        found = values(kept, pictures(4, 2), method)
        assert found.shape == (4, 34) and close(found, values(run, pictures(4, 2), method), 1e-12), method


@pytest.mark.parametrize("curvature", [hw.Dense(), hw.Diagonal(), hw.EKFAC(fisher="empirical")], ids=repr)
def test_other_curvature(tmp_path, curvature):
    run = record(tmp_path / "run", OPTIMIZERS["Adam, L2"])
    kept = index(run, curvature=curvature)
    for method in (hw.Influence(damping=0.01, curvature=curvature), hw.Source(curvature=curvature)):
        assert close(values(kept, method=method), values(run, method=method), 1e-10), method


# --------------------------------------------------------------------------------------------------------- without the data


def test_the_training_data_are_not_read(tmp_path):
    train = Locked(list(zip(*TRAIN, strict=True)))
    run = trained(tmp_path / "run", lambda: _small(), train, checkpoints=6)
    kept = index(run)
    expected = [values(run, method=method) for method in METHODS]
    train.closed = True
    for method, truth in zip(METHODS, expected, strict=True):
        assert close(values(kept, method=method), truth, 1e-12)
    with pytest.raises(AssertionError, match="was read"):
        values(run, method=hw.GradDot())


def _small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_answers_count_no_example_gradients_and_say_where_they_come_from(tmp_path):
    kept = index(record(tmp_path / "run", sgd()))
    found = hw.trace(kept, ASKED, hw.Influence(damping=(1.0, 0.1)), progress=False)
    assert [s.provenance["cost"]["example_gradients"] for s in found] == [0, 0]
    assert found[0].provenance["index"] == kept.path.name and found[0].unit == "measurement"


# ------------------------------------------------------------------------------------------------------ what does not matter


@pytest.mark.parametrize("settings", [{"memory": 1}, {"batch_size": 1}, {"memory": 20_000, "batch_size": 3}], ids=str)
def test_chunks_of_queries_change_nothing(painted, settings):
    kept = index(painted)
    for method in MEANS:
        assert close(values(kept, pictures(5, 2), method, **settings), values(kept, pictures(5, 2), method), 1e-12), method


def test_batches_of_the_build_change_nothing(tmp_path):
    answers = []
    for size in (3, 40):
        run = trained(tmp_path / str(size), picture, pictures(40, 1))
        answers.append(values(index(run, batch_size=size), pictures(4, 2), hw.Source()))
    assert close(*answers, 1e-10)


def test_a_named_query_is_the_sum_of_its_members(painted):
    kept, asked = index(painted), pictures(6, 2)
    for method in MEANS:
        if not isinstance(method, hw.GradCos):
            each = values(kept, asked, method)
            named = values(kept, [hw.Query("a", tuple(t[:4] for t in asked)), hw.Query("b", tuple(t[4:] for t in asked))], method)
            assert close(named, np.stack([each[:4].sum(0), each[4:].sum(0)]))


def test_the_measure_may_be_another(painted):
    def logit(model, batch):
        return model(batch[0])[:, 1]

    kept = index(painted)
    assert close(values(kept, pictures(4, 2), hw.Source(), measure=logit), values(painted, pictures(4, 2), hw.Source(), measure=logit), 1e-12)


# -------------------------------------------------------------------------------------------------------------- leaving out


def largest(run, kept, method):
    """Influence through only those coordinates, over all layers of which some are left out, whose eigenvalues are largest."""
    engine, row = Engine.of(run, None), method.plan(run).rows[0]
    engine.load(row.at[0])
    u, g = (engine.capture.gradients(f, batch) for f, batch in ((TASK.measure, pictures(4, 2)), (TASK.loss, pictures(40, 1))))
    operators, flow = engine.curvature(row.curvature).operators, engine.flow(row)
    forms = kept.manifest["panels"][-1]["blocks"]
    free = [n for n, form in forms.items() if form["kind"] == "kept"]
    count = kept.manifest["dim"] - sum(form["numbers"] for form in forms.values() if form["kind"] != "kept")
    floor = torch.cat([operators[n].spectrum.flatten() for n in free]).sort(descending=True).values[count - 1]
    total = 0.0
    for n in u:
        if n in free:
            a, b = operators[n].rotate(u[n].dense()), operators[n].rotate(g[n].dense())
            a = a * row.phi(flow.flows[n].matrix.spectrum) * (operators[n].spectrum >= floor)
        else:
            a, b = flow.flows[n].respond(row.phi)(u[n].dense()), g[n].dense()
        total = total + a.flatten(1) @ b.flatten(1).T
    return (-total / row.examples).numpy()


def test_the_coordinates_of_largest_eigenvalue_are_kept(painted):
    method = hw.Influence(damping=0.05)
    for dim in (40, 60, 90):
        kept = index(painted, dim=dim)
        forms = kept.manifest["panels"][-1]["blocks"]
        assert forms["conv.weight"]["kind"] == forms["grouped.weight"]["kind"] == "kept" and forms["norm.weight"]["kind"] == "coordinates"
        assert close(values(kept, pictures(4, 2), method), largest(painted, kept, method), 1e-10)


def test_cosines_are_divided_by_whole_lengths(painted):
    """Of gradients that lost coordinates the dot product shrinks, and the lengths do not."""
    kept, whole = index(painted, dim=60), index(painted)
    ratio = values(kept, pictures(4, 2), hw.GradCos()) / values(kept, pictures(4, 2), hw.GradDot())
    assert close(ratio, values(whole, pictures(4, 2), hw.GradCos()) / values(whole, pictures(4, 2), hw.GradDot()), 1e-9)


def test_the_error_is_measured_as_it_is(painted):
    """What the report says of a sample is what all queries and examples show, within the sample's own spread; and it falls with dim."""
    errors = []
    for dim in (50, 70, 90):
        kept = index(painted, dim=dim)
        said = {m["method"]: m["error"] for m in kept.manifest["measured"]}
        method = hw.Source()
        a, b = (values(where, pictures(40, 5), method) for where in (painted, kept))
        seen = np.sqrt(((a - b) ** 2).mean() / (a**2).mean())
        assert 0.4 * seen < said["Source(segments=3, average='gradients')"] < 2.5 * seen
        errors.append(seen)
    assert errors[0] > errors[1] > errors[2] > 0
    assert f"{said['GradDot()']:.2g}" in kept.report() and "d_eff" in kept.report()
    assert all(m["error"] < 1e-12 and m["spearman"] > 1 - 1e-12 for m in index(painted).manifest["measured"])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("int8", 3e-2), ("float32", 1e-6)])
def test_rounded_rows_are_off_by_their_rounding(painted, dtype, error):
    kept = index(painted, dtype=dtype)
    assert kept.bytes < index(painted).bytes
    for method in MEANS:
        a, b = (values(where, pictures(20, 5), method) for where in (painted, kept))
        off = np.sqrt(((a - b) ** 2).mean() / (a**2).mean())
        assert 0 < off < error, method


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 network of layers applied once, large enough that leaving coordinates out of carried queries pays."""
    torch.manual_seed(0)
    x = torch.randn(300, 60) / torch.arange(1, 61) ** 0.5
    y = x[:, :3].argmax(1)

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 3))

    return trained(tmp_path_factory.mktemp("wide") / "run", build, (x, y), batch=50, steps=60, checkpoints=6, optimizer=sgd(momentum=0.9)), (x[:30], y[:30])


def test_carried_queries_may_be_off_by_the_tolerance(wide):
    run, asked = wide
    kept, errors = index(run), []
    exact = values(run, asked, hw.Source(), tolerance=0.0)
    for tolerance in (0.0, 1e-3, 1e-2, None):
        found = values(kept, asked, hw.Source(), tolerance=tolerance)
        errors.append(np.sqrt(((exact - found) ** 2).mean() / (exact**2).mean()))
    assert errors[0] < 1e-5 < errors[1] < 2e-3 < errors[2] < 2e-2 and errors[3] < 2e-2
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(exact, found, strict=True)]) > 0.999


def test_a_carried_query_is_a_multiple_of_itself_and_a_few_coordinates():
    """Contracted along 30 of 600 coordinates, and hardly elsewhere: the parts make the whole up to what was allowed."""
    torch.manual_seed(0)
    raw = Factored(torch.randn(5, 20), torch.randn(5, 30))
    energy, shrunk = torch.full((20, 30), 1e-3), 1 + 1e-3 * torch.rand(20, 30)
    energy[2, :], shrunk[2, :] = 1.0, torch.rand(30)
    side = Whole(0.7 * raw.whole() * shrunk)
    gradient = BlockGradient((Outer(torch.randn(4000, 1, 1, 30), torch.randn(4000, 1, 1, 20) * energy[:, 0].sqrt()),))
    for tolerance in (1e-1, 1e-2, 1e-3):
        found = parted(side, raw, energy, tolerance)
        assert isinstance(found, Parted) and len(found) == 5 and set(found.pairs[0].tolist()) <= {2} and found.pairs.shape[1] <= 30
        error = (found.dot(gradient) - side.dot(gradient)).square().mean().sqrt() / side.dot(gradient).square().mean().sqrt()
        assert 0 < error < 1.5 * tolerance
        assert torch.allclose(Whole(found.whole()).dot(gradient), found.dot(gradient), atol=1e-4)
    everywhere = Whole(torch.randn(5, 1, 20, 30))
    assert parted(everywhere, raw, energy, 1e-3) is everywhere


def contracting(seed, decay=0.02):
    """Curvature of 12 x 20 as an optimizer of one rate meets it: a spectrum that falls fast, in bases that differ as those of segments do."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.eye(n) + 0.1 * torch.randn(1, n, n, generator=g, dtype=torch.float64)).Q for n in (12, 20))
    falling = [torch.arange(1, n + 1, dtype=torch.float64) ** -2.0 for n in (12, 20)]
    return Kronecker(left, right, (falling[0][:, None] * falling[1]).unsqueeze(0)).flow(0.7, decay)


def chained(flows, raw, tolerance):
    """Queries carried by all flows but the last, seen by the last: on few eigenvectors, and whole."""
    side, whole = Near.itself(raw), raw.whole()
    for flow in flows[:-1]:
        (side,) = side.through(flow, [(Surviving(5.0), 1.0)], tolerance)
        whole = flow.carry(Surviving(5.0))(whole)
    (seen,) = side.through(flows[-1], [(Accumulated(5.0), flows[-1].gain)], tolerance)
    return seen, flows[-1].respond(Accumulated(5.0))(whole)


def test_queries_carried_through_several_bases_are_themselves_and_few_eigenvectors():
    torch.manual_seed(0)
    raw = Factored(torch.randn(40, 12, dtype=torch.float64), torch.randn(40, 20, dtype=torch.float64))
    flows = [contracting(seed) for seed in (1, 2, 3)]
    gradient = BlockGradient((Outer(torch.randn(30, 1, 1, 20, dtype=torch.float64), torch.randn(30, 1, 1, 12, dtype=torch.float64)),))
    seen, whole = chained(flows, raw, 0.0)
    assert torch.allclose(seen.whole(), whole, atol=1e-12) and torch.allclose(seen.dot(gradient), Whole(whole).dot(gradient), atol=1e-11)
    assert torch.allclose(seen.square_norms(), Whole(whole).square_norms(), rtol=1e-10) and torch.allclose(seen.part(slice(3, 9)).whole(), whole[3:9], atol=1e-12)
    sizes = []
    for tolerance in (0.3, 0.1, 0.03):  # three responses in bases of their own: their errors together
        seen, whole = chained(flows, raw, tolerance)
        assert 0 < off_by(flows[-1], seen.whole(), whole) <= 1.5 * tolerance
        sizes.append(seen.rest[0].numel())
    assert sizes[0] < sizes[1] < sizes[2] <= 240 and sizes[0] < 120


def off_by(flow, found, exact):
    """Relative error of vectors in the root mean square of their products with gradients under a flow's curvature."""
    weight = flow.matrix.spectrum[0] - flow.floor
    off, size = ((flow.matrix.rotate(v).square().mean((0, 1)) * weight).sum().sqrt() for v in (found - exact, exact))
    return off / size


@pytest.mark.parametrize("response", [Accumulated(5.0), Surviving(5.0)], ids=repr)
def test_one_response_leaves_out_no_more_than_it_may(response):
    torch.manual_seed(0)
    raw = Factored(torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 20, dtype=torch.float64))
    first, flow = contracting(1), contracting(2)
    (side,) = Near.itself(raw).through(first, [(Surviving(5.0), 1.0)], 0.0)
    (exact,) = side.through(flow, [(response, 1.0)], 0.0)
    for tolerance in (0.5, 0.1, 0.02):
        (found,) = side.through(flow, [(response, 1.0)], tolerance)
        assert 0 < off_by(flow, found.whole(), exact.whole()) <= MARGIN * tolerance


@pytest.mark.parametrize("own", [True, False], ids=["own basis", "another"])
def test_a_carried_query_meets_examples_on_few_coordinates_within_the_tolerance(own):
    """Of each query's own score, or of the scores that it is added to, in the root mean square over queries: of 16 all are looked at; what
    16 of 64 tell of the others is nearly as true."""
    torch.manual_seed(0)
    lengths = torch.logspace(-2, 2, 64, dtype=torch.float64).unsqueeze(1)
    raw = Factored(torch.randn(64, 12, dtype=torch.float64) * lengths, torch.randn(64, 20, dtype=torch.float64))
    seen, _ = chained([contracting(seed, 0.0) for seed in (1, 2)], raw, 0.0)
    at = contracting(2 if own else 1).matrix
    basis, energy = (seen.basis if own else Basis.of(at.left, at.right)), at.spectrum[0]
    for side, slack in ((seen.part(slice(0, 64, 4)), 1.0), (seen, 1.3)):
        exact, counts = side.full(basis), []
        scores = (exact.square() * energy).sum((1, 2))
        for tolerance, reference in ((0.0, 0 * scores), (0.01, 0 * scores), (0.1, 0 * scores), (0.01, 400 * scores)):
            found = side.parted(basis, energy, tolerance, reference)
            off = ((found.whole().squeeze(1) - exact).square() * energy).sum((1, 2)) / torch.maximum(scores, reference)
            assert off.mean().sqrt() <= slack * tolerance + 1e-12
            counts.append(found.pairs.shape[1])
        assert counts[0] > counts[1] > counts[2] > counts[3]


def test_only_layers_of_one_rate_stay_near_themselves():
    raw, flow = Factored(torch.ones(2, 12), torch.ones(2, 20)), contracting(1)
    assert isinstance(near(flow, raw), Near) and near(flow, Whole(raw.whole())) is None
    assert near(flow.matrix.flow(torch.rand(1, 12, 20)), raw) is None  # Adam's: a response of it is no multiple anywhere
    assert isinstance(flow, Flow) and near(replace(flow, matrix=Diagonal(flow.matrix.spectrum)), raw) is None


# -------------------------------------------------------------------------------------------------------------- on the disk


def test_rows_are_readable_with_numpy_alone(tmp_path):
    """The Gram matrix of the final gradients, from the arrays, is the one that autograd gives; the basis is orthonormal."""
    run = record(tmp_path / "run", sgd())
    folder = index(run).path
    manifest = json.loads((folder / "manifest.json").read_text())
    last = len(manifest["panels"]) - 1
    assert manifest["panels"][last]["at"] == [[60]]
    gram = 0.0
    for b, _ in enumerate(manifest["panels"][last]["blocks"]):
        g, a = (np.load(folder / f"{last}/{b}.{field}.npy") for field in ("g", "a"))
        rows = np.einsum("nkso,nksi->nkoi", g, a).reshape(len(g), -1)
        gram = gram + rows @ rows.T
    run.load(model := run.model(), 60)
    rows = []
    for i in range(len(TRAIN[0])):
        loss = TASK.loss(model, tuple(t[i : i + 1] for t in TRAIN)).sum()
        rows.append(torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))]).numpy())
    assert close(gram, np.array(rows) @ np.array(rows).T, 1e-12)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.npy")}


@pytest.mark.parametrize("reads", [50, 80])
def test_a_killed_build_continues_to_the_same_bytes(tmp_path, monkeypatch, reads):
    """16 rows of 19 numbers at once, at two checkpoints each: killed in the second of three parts, and in the third."""
    monkeypatch.setattr("headwater.influence.index.build.ROOM", 16 * 19)
    found, seen = [], []
    for name in ("whole", "killed"):
        train = Locked(list(zip(*TRAIN, strict=True)))
        run = trained(tmp_path / name, _small, train, checkpoints=2)
        for fit in {row.curvature for m in (hw.Source(segments=2), hw.Influence()) for row in m.plan(run).rows}:
            Engine.of(run, None).curvature(fit)
        train.reads = 0
        if name == "killed":
            train.limit = reads
            with pytest.raises(KeyboardInterrupt):
                index(run, 2)
            (partial,) = (run.path / "index").iterdir()
            assert not (partial / "manifest.json").exists() and np.load(partial / "done.npy").tolist() == [1, int(reads > 70), 0]
            train.limit, train.reads = None, 0
        found.append(index(run, 2))
        seen.append(train.reads)
    assert seen[0] - seen[1] == 2 * 16 * (1 + int(reads > 70))  # what was there is not computed again
    whole, killed = (contents(i.path) for i in found)
    assert whole.keys() == killed.keys() and all(whole[name] == killed[name] for name in whole)


def test_the_same_call_opens_the_index_again(tmp_path):
    train = Locked(list(zip(*TRAIN, strict=True)))
    run = trained(tmp_path / "run", _small, train)
    first = index(run)
    written = {f: f.stat().st_mtime_ns for f in first.path.rglob("*")}
    train.reads = 0
    again = index(run)
    assert again.path == first.path and train.reads <= 4  # the proof of the gradients, and the form that they come in
    assert {f: f.stat().st_mtime_ns for f in first.path.rglob("*")} == written
    assert index(run, 2).path != first.path


def test_a_flipped_byte_is_named(tmp_path):
    run = record(tmp_path / "run", sgd())
    victim = index(run).path / "6" / "0.g.npy"
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(DamagedFile, match=r"6/0\.g\.npy does not match its checksum(.|\n)*delete .*index"):
        values(index(run), method=hw.Influence())


def test_nothing_is_written_outside_the_run(tmp_path, monkeypatch):
    run = record(tmp_path / "run", sgd())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    values(index(run), method=hw.Source())
    assert list((tmp_path / "here").iterdir()) == [] and {f.name for f in tmp_path.iterdir()} == {"run", "here"}


def test_a_batch_that_goes_to_the_fallback_is_kept_as_coordinates(tmp_path):
    """A layer whose output hides the examples in larger batches: its rows are no outer products then."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x) if len(x) < 3 else self.a(x.unsqueeze(0).expand(2, -1, -1)).mean(0)
            return self.b(h.tanh())

    def build():
        torch.manual_seed(0)
        return Odd().double()

    run = trained(tmp_path / "run", build, TRAIN)
    kept = index(run)
    assert {n: form["kind"] for n, form in kept.manifest["panels"][-1]["blocks"].items()} == {"a.weight": "coordinates", "b.weight": "factors"}
    assert list((run.path / "index").iterdir()) == [kept.path] == [index(run).path]
    for method in MEANS:
        assert close(values(kept, method=method), values(run, method=method), 1e-12), method


# --------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_served_is_refused_by_name(painted, tmp_path):
    kept = index(painted)
    asked = pictures(2, 2)
    for method, said in (
        (hw.Source(average="parameters"), "mean weights of steps 4, 8"),
        (hw.Source(curvature=hw.EKFAC(seed=9)), r"EKFAC\(fisher='auto', seed=9"),
        (hw.Influence(damping=0.1, curvature=hw.Diagonal()), r"Diagonal\("),
        (hw.Influence(damping=0.1, refine=3), "refine"),
        (hw.Representations(), "hw.Source"),
    ):
        with pytest.raises(InputError, match=said):
            values(kept, asked, method)
    with pytest.raises(InputError, match=r"kept the coordinates of EKFAC\(fisher='auto', seed=0"):
        values(index(painted, dim=70), asked, hw.Influence(damping=0.1, curvature=hw.Diagonal()))
    with pytest.raises(QueryError, match="like those of the training examples"):
        values(kept, (torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, dtype=torch.long)), hw.GradDot())
    with pytest.raises(InputError, match="Index where a run belongs"):
        hw.self_influence(kept, hw.GradDot(), progress=False)


def test_a_measure_under_which_parameters_are_laid_out_otherwise_is_refused(tmp_path):
    """It runs the first layer on examples out of order, so that its weight and its bias need the fallback, each for itself."""

    def twice(model, batch):
        return model[2](model[1](model[0](torch.cat([batch[0], batch[0].flip(0)]))[: len(batch[0])])).square().sum(1)

    run = record(tmp_path / "run", sgd())
    kept = index(run)
    with pytest.raises(ModelMismatch, match=r"'0\.weight' is laid out as(.|\n)*runs the model as the training loss does"):
        values(kept, method=hw.GradDot(), measure=twice)
    assert np.isfinite(values(run, method=hw.GradDot(), measure=twice)).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"dim": 0}, "dim=0"), ({"dim": 8}, r"dim=8\n(.|\n)*kept whole"), ({"dtype": "int4"}, "dtype='int4'"), ({"segments": 9}, "9 segments")],
    ids=str,
)
def test_bad_settings_are_refused(painted, settings, said):
    before = sorted(painted.path.rglob("*"))
    with pytest.raises(InputError, match=said):
        index(painted, **settings)
    assert sorted(painted.path.rglob("*")) == before
    with pytest.raises(InputError, match=r"a hw\.Run"):
        hw.index(pictures(3, 1))


class Broken(hw.tasks.Classification):
    """Infinite for the training example whose first input is ``marked``, in the loss alone: curvature is taken from pseudo-losses."""

    def loss(self, model, batch):
        return torch.where(batch[0][:, 0] == TRAIN[0][7, 0], torch.inf, 1.0) * super().loss(model, batch)


def test_a_gradient_that_is_not_finite_names_its_example(tmp_path):
    run = record(tmp_path / "run", sgd())
    broken = replace(run, stages=tuple(replace(s, task=Broken()) for s in run.stages))
    with pytest.raises(NotFinite, match="for training example 7 of stage 'train' at step 10"):
        index(broken)
    assert not list(run.path.rglob("index/*/manifest.json"))
