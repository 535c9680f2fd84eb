"""Similarities and floors: against the same numbers computed plainly, and the laws of scores."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError, NotFinite
from headwater.influence.similarity.texts import bm25

CLASSES = 3


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, x[:, :CLASSES].argmax(1)


TRAIN, ASKED, TASK = data(40, 1), data(6, 2), hw.tasks.Classification()
MEASURES = {
    "cosine": lambda a, b: torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1),
    "dot": lambda a, b: (a[:, None] * b[None]).sum(-1),
    "l2": lambda a, b: -(a[:, None] - b[None]).square().sum(-1).sqrt(),
}


def recorded(path, make=build, train=TRAIN, task=TASK, stages=1, rate=0.1):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=train, steps=10)
    for stage in range(stages):
        if stage:
            recorder.stage(f"stage {stage}", train=train, optimizer=optimizer, steps=10)
        for step in range(10):
            ids = torch.arange(10) + 10 * (step % 4)
            optimizer.zero_grad()
            task.loss(model, hw.tasks.Examples(train, task.collate).batch(ids.numpy())).mean().backward()
            optimizer.step()
            recorder.step(ids)
    return recorder.finish()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("floors") / "run")


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("stages") / "run", stages=2)


def trace(run, method, queries=ASKED, **settings):
    return hw.trace(run, queries, method, **{"progress": False, **settings})


def final(run):
    return run.load(run.model(), run.checkpoints[-1])


def close(a, b):
    return np.allclose(a, b, rtol=0, atol=1e-12 * max(1.0, float(np.abs(b).max())))


# ------------------------------------------------------------------------------------------------------- representations


@pytest.mark.parametrize("similarity", MEASURES)
@pytest.mark.parametrize(("layer", "cut"), [(None, 2), ("1", 2), ("0", 1), ("2", 3), ("input", 0)])
def test_representations_are_similarities_of_what_the_layer_gives(run, layer, cut, similarity):
    found = trace(run, hw.Representations(layer, similarity))
    part = final(run)[:cut]
    with torch.no_grad():
        truth = MEASURES[similarity](part(ASKED[0]), part(TRAIN[0])).numpy()
    assert close(found.values, truth) and found.unit == ("cosine" if similarity == "cosine" else "rank only")


def test_the_result_says_which_layer_was_taken(run):
    found = trace(run, hw.Representations())
    assert found.method == "Representations(cosine of the input of layer '2')" and found.provenance["layer"] == "the input of layer '2'"
    assert found.provenance["weights"] == run.weights_hash(run.checkpoints[-1])
    assert trace(run, hw.Representations("0")).provenance["layer"] == "the output of layer '0'"


def test_a_wrong_name_is_answered_with_the_layers_there_are(run):
    with pytest.raises(InputError, match=r"0 \(Linear\), 1 \(Tanh\), 2 \(Linear\)"):
        trace(run, hw.Representations("layer4"))
    with pytest.raises(InputError, match="layer=''"):
        trace(run, hw.Representations(""))


def test_labels_that_agree_keep_the_sign_and_others_turn_it(run):
    plain, signed = (trace(run, hw.Representations(similarity="dot", labels=labels)).values for labels in ("ignore", "agree"))
    same = (ASKED[1][:, None] == TRAIN[1]).numpy()
    assert close(signed, np.where(same, plain, -plain)) and not same.all()


def test_the_sign_of_agreeing_labels_is_the_one_that_training_a_last_layer_gives(run):
    """What one step on the last layer does to the score of the query's class: it follows the dot product, up for the same class."""
    found = trace(run, hw.Representations(similarity="dot", labels="agree")).values
    model, features = final(run), final(run)[:2]
    with torch.no_grad():
        p = model(TRAIN[0]).softmax(1)
        pull = torch.eye(CLASSES, dtype=p.dtype)[TRAIN[1]] - p  # minus the gradient of the loss in the logits
        truth = (features(ASKED[0]) @ features(TRAIN[0]).T) * pull[:, ASKED[1]].T
    assert (np.sign(found) == np.sign(truth.numpy())).all()


@pytest.mark.parametrize("arguments", [{"similarity": "manhattan"}, {"labels": "yes"}, {"positions": "first"}, {"similarity": "l2", "labels": "agree"}])
def test_settings_without_meaning_are_refused(arguments):
    with pytest.raises(InputError, match="To mend it"):
        hw.Representations(**arguments)


class Sequences(nn.Module):
    """Tokens to classes, with padding that the mask hides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, input_ids, attention_mask):
        hidden = torch.tanh(self.mix(self.embed(input_ids)))
        return self.head(hidden)[:, 0]


def texts(n, seed):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 6, (n,), generator=g)
    ids = torch.randint(0, 7, (n, 5), generator=g)
    return {"input_ids": ids, "attention_mask": (torch.arange(5) < length[:, None]).long(), "labels": ids[:, 0] % CLASSES}


@pytest.mark.parametrize("positions", ["mean", "last", "all"])
def test_positions_are_pooled_over_what_the_mask_shows(tmp_path, positions):
    run = recorded(tmp_path / "run", Sequences, texts(40, 0))
    asked = texts(5, 1)
    found = trace(run, hw.Representations("mix", "dot", positions=positions), asked).values
    model = final(run)

    def pooled(batch):
        with torch.no_grad():
            out, lengths = model.mix(model.embed(batch["input_ids"])), batch["attention_mask"].sum(1)
        one = {"mean": lambda h, k: h[:k].mean(0), "last": lambda h, k: h[k - 1], "all": lambda h, k: h.flatten()}[positions]
        return torch.stack([one(h, int(k)) for h, k in zip(out, lengths, strict=True)])

    assert np.allclose(found, (pooled(asked) @ pooled(texts(40, 0)).T).numpy(), atol=1e-5)


def test_feature_maps_are_averaged_over_places(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES)).double()

    def pictures(n, seed):
        x = torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return x, x.flatten(1)[:, :CLASSES].argmax(1)

    run = recorded(tmp_path / "run", make, pictures(40, 0))
    asked, part = pictures(3, 1), final(run)[:2]
    with torch.no_grad():
        a, b = part(asked[0]), part(pictures(40, 0)[0])
    assert close(trace(run, hw.Representations("1", "dot"), asked).values, (a.mean((2, 3)) @ b.mean((2, 3)).T).numpy())
    assert close(trace(run, hw.Representations("1", "dot", positions="all"), asked).values, (a.flatten(1) @ b.flatten(1).T).numpy())
    assert close(trace(run, hw.Representations(None, "dot"), asked).values, (a.flatten(1) @ b.flatten(1).T).numpy())
    with pytest.raises(InputError, match="a sequence"):
        trace(run, hw.Representations("1", positions="last"), asked)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused = nn.Linear(4, 4).double(), nn.Linear(4, CLASSES).double(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.head(self.body(self.body(x).tanh()))


def test_layers_that_are_not_met_once_are_refused(tmp_path):
    run = recorded(tmp_path / "run", Twice)
    for layer, times in (("body", 2), ("unused", 0)):
        with pytest.raises(InputError, match=f"called {times} times"):
            trace(run, hw.Representations(layer))
    assert trace(run, hw.Representations()).provenance["layer"] == "the input of layer 'head'"


def test_zeros_are_told(tmp_path):
    x, y = TRAIN[0].clone(), TRAIN[1]
    x[3] = 0
    run = recorded(tmp_path / "run", train=(x, y))
    with pytest.warns(UserWarning, match="exactly 0 between 1 training examples"):
        found = trace(run, hw.Representations("input"))
    assert (found.values[:, 3] == 0).all() and found.provenance["zero_columns"] == 1 and np.isfinite(found.values).all()


def test_what_is_not_finite_is_named(tmp_path):
    run = recorded(tmp_path / "run")
    asked = ASKED[0].clone()
    asked[4, 0] = float("nan")
    with pytest.raises(NotFinite, match="query 4"):
        trace(run, hw.Representations("1"), (asked, ASKED[1]))


# ------------------------------------------------------------------------------------------------------------------ floors


def test_random_is_the_seeds_alone(run):
    a, b, c = (trace(run, hw.floors.random(seed)).values for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and abs(a.mean()) < 0.2 and abs(a.std() - 1) < 0.2
    assert np.array_equal(trace(run, hw.floors.random(0), tuple(t[:3] for t in ASKED)).values, a[:3])


def test_same_label_is_the_indicator(run):
    assert np.array_equal(trace(run, hw.floors.same_label()).values, (ASKED[1][:, None] == TRAIN[1]).numpy())


@pytest.mark.parametrize("similarity", MEASURES)
def test_inputs_are_compared_as_they_are(run, similarity):
    assert close(trace(run, hw.floors.inputs(similarity)).values, MEASURES[similarity](ASKED[0], TRAIN[0]).numpy())


def test_loss_and_gradient_norm_are_the_same_for_every_query(run):
    model = final(run)
    losses = TASK.loss(model, TRAIN)
    norms = [torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True)]).norm().item() for one in losses]
    for method, truth in ((hw.floors.loss(), losses.detach().numpy()), (hw.floors.gradient_norm(), np.array(norms))):
        found = trace(run, method)
        assert found.values.shape == (6, 40) and found.unit == "rank only"
        assert close(found.values, np.broadcast_to(truth, (6, 40)))


def test_texts_are_compared_by_their_tokens(tmp_path):
    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embed(input_ids))

    train, asked = ({k: v for k, v in texts(n, seed).items() if k != "labels"} for n, seed in ((40, 0), (5, 1)))
    run = recorded(tmp_path / "run", Next, train, hw.tasks.Language())
    shown = [[ids[mask == 1].tolist() for ids, mask in zip(t["input_ids"], t["attention_mask"], strict=True)] for t in (asked, train)]
    jaccard = [[len(set(a) & set(b)) / len(set(a) | set(b)) for b in shown[1]] for a in shown[0]]
    assert np.allclose(trace(run, hw.floors.inputs("overlap"), asked).values, jaccard)
    n, mean = 40, np.mean([len(t) for t in shown[1]])
    idf = {t: np.log(1 + (n - k + 0.5) / (k + 0.5)) for t in range(7) for k in [sum(t in d for d in shown[1])]}
    truth = [[sum(idf[t] * d.count(t) * 2.5 / (d.count(t) + 1.5 * (0.25 + 0.75 * len(d) / mean)) for t in q) for d in shown[1]] for q in shown[0]]
    assert np.allclose(trace(run, hw.floors.inputs("bm25"), asked).values, truth)
    with pytest.raises(InputError, match="token ids where numbers"):
        trace(run, hw.floors.inputs("cosine"), asked)
    with pytest.raises(InputError, match="language task"):
        trace(run, hw.floors.same_label(), asked)


def test_numbers_are_no_texts_and_targets_no_classes(run, tmp_path):
    with pytest.raises(InputError, match="comparison of texts"):
        trace(run, hw.floors.inputs("bm25"))
    with pytest.raises(InputError, match="bm25"):
        hw.floors.inputs("edit distance")

    def line():
        torch.manual_seed(0)
        return nn.Linear(4, 1).double()

    other = recorded(tmp_path / "run", line, (TRAIN[0], TRAIN[0][:, 0]), hw.tasks.Regression())
    asked = ASKED[0], ASKED[0][:, 0]
    with pytest.raises(InputError, match="classes"):
        trace(other, hw.floors.same_label(), asked)
    assert close(trace(other, hw.Representations(similarity="dot"), asked).values, (ASKED[0] @ TRAIN[0].T).numpy())


def test_empty_texts_give_zeros():
    from scipy import sparse

    assert (bm25(sparse.csr_matrix((2, 3)), sparse.csr_matrix((4, 1))) == 0).all()


# -------------------------------------------------------------------------------------------------------------------- laws

ALL = [
    hw.Representations(),
    hw.Representations("1", "l2"),
    hw.Representations(similarity="dot", labels="agree"),
    hw.KNNShapley(3),
    hw.floors.random(1),
    hw.floors.same_label(),
    hw.floors.inputs(),
    hw.floors.inputs("dot"),
    hw.floors.loss(),
    hw.floors.gradient_norm(),
]


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_batches_chunks_and_company_change_nothing(run, method):
    plain = trace(run, method).values
    for settings in ({"batch_size": 7}, {"memory": 100}):
        assert close(trace(run, method, **settings).values, plain)
    together = trace(run, [hw.GradDot(), method])
    assert close(together[1].values, plain)
    part = trace(run, method, tuple(t[:3] for t in ASKED)).values
    assert close(part, plain[:3])


@pytest.mark.parametrize("method", [m for m in ALL if not isinstance(m, type(hw.floors.random()))], ids=repr)
def test_named_queries_are_sums_and_cosines_means(run, method):
    plain = trace(run, method)
    named = trace(run, method, [hw.Query("a", tuple(t[:4] for t in ASKED)), hw.Query("b", tuple(t[4:] for t in ASKED))])
    if isinstance(method, type(hw.floors.loss()) | type(hw.floors.gradient_norm())):
        truth = plain.values[:2]
    else:
        merge = np.mean if plain.unit == "cosine" else np.sum
        truth = np.stack([merge(plain.values[:4], 0), merge(plain.values[4:], 0)])
    assert close(named.values, truth) and named.query_names == ("a", "b")


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_every_stage_has_its_columns(two_stages, method):
    found = trace(two_stages, method).values
    assert found.shape == (6, 80)
    if not isinstance(method, hw.KNNShapley | type(hw.floors.random())):
        assert close(found[:, 40:], found[:, :40])  # the same examples again


@pytest.mark.parametrize("method", [hw.Representations("1"), hw.floors.loss()], ids=repr)
def test_what_was_stopped_goes_on_where_it_was(run, method, monkeypatch):
    whole, calls = trace(run, method, batch_size=10).values, []
    batch = hw.tasks.Examples.batch

    def stops(self, ids):
        if len(ids) == 10:
            calls.append(int(ids[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, ids)

    monkeypatch.setattr("headwater.tasks.batches.Examples.batch", stops)
    with pytest.raises(KeyboardInterrupt):
        trace(run, method, batch_size=10)
    calls.append(0)  # from here on nothing stops it
    assert np.array_equal(trace(run, method, batch_size=10).values, whole)
    assert calls == [0, 10, 20, 0, 20, 30] and not list((run.path / "jobs").glob("*.json"))


def test_the_plan_is_told_and_can_be_silenced(run, capsys):
    trace(run, hw.Representations("1"))
    assert capsys.readouterr() == ("", "")
    trace(run, hw.Representations("1"), progress=True)
    assert "6 query examples x 40 training examples" in capsys.readouterr().err
