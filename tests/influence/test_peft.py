"""Models that the user adapted with peft: the whole ladder sees the adapters alone, and gives what autograd and retraining give for them."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.training import segments
from tests.influence.brute import Brute, source
from tests.influence.test_laws import ASKED, TASK, TRAIN, close, data, record, sgd, softmax_hessian, values

peft = pytest.importorskip("peft")


def adapted(**settings):
    """A perceptron with peft's adapters in both layers, which begin at a model that knows nothing of them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], **settings)).double()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("peft") / "run", sgd(momentum=0.5), model=adapted())


@pytest.fixture(scope="module")
def brute(run):
    return Brute(run)


def final(run):
    return run.weights(run.checkpoints[-1])


def test_only_adapters_count(run, brute):
    assert brute.names == [f"base_model.model.{k}.lora_{part}.default.weight" for k in "02" for part in "AB"]
    found = hw.trace(run, ASKED, hw.Source(), progress=False)
    assert set(found.provenance["coverage"]) == set(brute.names) and set(found.provenance["coverage"].values()) == {"Linear"}


def test_source_is_the_formula_over_the_adapters(run, brute):
    truth = source(brute, TASK.measure, ASKED, segments(run, 3), lambda state, stage: brute.gauss_newton(state, TRAIN[0], softmax_hessian))
    assert close(values(run, method=hw.Source(curvature=hw.Dense())), truth, 1e-8)


def test_trak_is_the_formula_over_the_adapters(run, brute):
    g, t = (brute.gradients(TASK.measure, final(run), batch) for batch in (TRAIN, ASKED))
    ridge = 0.02 * (g**2).sum()
    truth = t @ np.linalg.solve(g.T @ g + ridge * np.eye(g.shape[1]), g.T)
    model = run.load(run.model(), run.checkpoints[-1])
    with torch.no_grad():
        missing = 1 - model(TRAIN[0]).softmax(1).gather(1, TRAIN[1][:, None]).squeeze(1).numpy()
    assert close(values(run, method=hw.Trak(regularisation=0.02)), truth * missing, 1e-8)
    assert close(values(run, method=hw.Trak(dim=500, regularisation=0.02)), truth * missing, 1e-8)


def test_self_influence_is_the_diagonal(run, brute):
    u, g = (brute.gradients(function, final(run), TRAIN) for function in (TASK.measure, TASK.loss))
    assert close(hw.self_influence(run, hw.GradDot(), progress=False).values[0], -(u * g).sum(1) / 40, 1e-10)
    assert close(hw.self_influence(run, hw.Source(), progress=False).values[0], np.diag(values(run, TRAIN)), 1e-8)


def test_an_index_answers_as_the_run(run):
    kept = hw.index(run, progress=False)
    for method in (hw.GradDot(), hw.Influence(damping=0.01), hw.Source()):
        assert close(values(kept, method=method), values(run, method=method), 1e-10), method


def repeated(run, asked, make, i, weight):
    """The measurements at the end of the recorded training, repeated by torch alone with another weight on example i."""
    model = run.load(run.model(), 0)
    optimizer = make(model)
    for step in range(1, run.checkpoints[-1] + 1):
        ids = torch.as_tensor(run.order(step).astype(np.int64))
        optimizer.zero_grad()
        losses = run.stages[0].task.loss(model, run.stages[0].data.batch(ids.tolist()))
        (losses * (1 + (weight - 1) * (ids == i).double())).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return run.stages[0].task.measure(model.eval(), asked).numpy()


def differences(run, asked, make, i, step=1e-5):
    """Central differences of that."""
    up, down = (repeated(run, asked, make, i, 1 + sign * step) for sign in (1, -1))
    return (up - down) / (2 * step)


def test_unrolling_follows_the_training_of_the_adapters(run):
    found = values(run, method=hw.Unrolled())
    for i in sorted(set(run.order(3).tolist()))[:2]:
        assert close(found[:, i], differences(run, ASKED, sgd(momentum=0.5), i), 1e-5)


def test_dropout_within_the_adapters_is_drawn_again_as_it_was(tmp_path):
    """peft's own dropout, active in training: the repetition meets the same masks, and members can be made of others."""
    run = record(tmp_path / "run", sgd(momentum=0.5), model=adapted(lora_dropout=0.3).train(), steps=8)
    found = hw.trace(run, ASKED, hw.Unrolled(), progress=False)
    assert found.provenance["replay"]["bit_for_bit"] and np.abs(found.values).max() > 0
    masked = hw.trace(run, ASKED, hw.DropoutEnsemble(hw.GradDot(), members=3), progress=False)
    assert masked.stderr.max() > 0


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny GPT-2 whose attention and whose feed-forward layer are adapted, trained by AdamW."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by an old name
        settings = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), settings).double().eval()
    tokens, task = torch.randint(0, 11, (12, 6)), hw.tasks.Language()
    train = {"input_ids": tokens, "labels": tokens}
    optimizer = adamw(model)
    recorder = hw.Recorder(tmp_path_factory.mktemp("language") / "run", model, optimizer, task=task, train=train, steps=6, checkpoints=3)
    for step in range(6):
        ids = [(4 * step + k) % 12 for k in range(4)]
        optimizer.zero_grad()
        task.loss(model, {name: t[ids] for name, t in train.items()}).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish(), {name: t[:3] for name, t in train.items()}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-3)


def test_a_transformer_is_unrolled_through_its_adapters(language):
    run, asked = language
    found = hw.trace(run, asked, hw.Unrolled(), progress=False).values
    for i in (2, 7):
        assert close(found[:, i], differences(run, asked, adamw, i), 1e-5)


def test_trak_and_the_index_of_a_transformer(language):
    run, asked = language
    task, model = run.stages[0].task, run.load(run.model(), run.checkpoints[-1])
    free = [p for p in model.parameters() if p.requires_grad]

    def rows(function, batch):
        n = len(batch["input_ids"])
        found = [torch.autograd.grad(function(model, {k: v[i : i + 1] for k, v in batch.items()}).sum(), free) for i in range(n)]
        return np.stack([np.concatenate([g.numpy().ravel() for g in row]) for row in found])

    def minus(model, batch):
        return -task.loss(model, batch)

    g, t = rows(minus, run.stages[0].data.data), rows(task.measure, asked)
    truth = t @ np.linalg.solve(g.T @ g + 0.05 * (g**2).sum() * np.eye(g.shape[1]), g.T)  # the push of minus the loss is 1
    for method in (hw.Trak(regularisation=0.05, output=minus), hw.Trak(dim=1000, regularisation=0.05, output=minus)):
        assert close(hw.trace(run, asked, method, progress=False).values, truth, 1e-8)
    kept = hw.index(run, segments=2, progress=False)
    for method in (hw.Influence(damping=0.01), hw.Source(segments=2)):
        assert close(hw.trace(kept, asked, method, progress=False).values, hw.trace(run, asked, method, progress=False).values, 1e-10)


def test_adapters_that_were_never_trained_say_nothing_and_it_is_said(tmp_path):
    """B = 0: gradients of A are exactly zero."""
    run = hw.Run.from_checkpoints(tmp_path / "run", {10: adapted().state_dict()}, build=adapted, train=data(40, 1), task=TASK, optimizer=sgd())
    with pytest.raises(hw.errors.GradientError, match="never trained"):
        values(run, method=hw.Influence(damping=0.1))
