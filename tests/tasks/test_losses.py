"""Built-in tasks against torch's own losses, reduced exactly as a training loop reduces them; and what they refuse, in which words."""

import collections
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headwater.errors import TaskError
from headwater.tasks import Classification, Draws, Language, Regression, Task, log_odds, mean_tokens


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Given(nn.Module):
    """A model that returns what it is given."""

    def forward(self, logits):
        return logits


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- classification


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_classification_sums_to_torchs_cross_entropy(weighted, smoothing):
    logits, labels = torch.randn(9, 4), torch.randint(0, 4, (9,))
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0]) if weighted else None
    task = Classification(weight=weight, label_smoothing=smoothing, scale=0.7)
    whole = 0.7 * F.cross_entropy(logits, labels, weight, label_smoothing=smoothing, reduction="sum")
    close(task.loss(Given(), (logits, labels)).sum(), whole)


def test_the_scale_that_matches_torchs_weighted_mean():
    logits, labels, weight = torch.randn(9, 4), torch.randint(0, 4, (9,)), torch.tensor([0.5, 1.0, 2.0, 3.0])
    task = Classification(weight=weight, scale=1 / float(weight[labels].mean()))
    close(task.loss(Given(), (logits, labels)).mean(), F.cross_entropy(logits, labels, weight))


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
@pytest.mark.parametrize("label_shape", [(8,), (8, 1)])
def test_one_output_is_a_binary_classifier(shape, label_shape):
    logits, labels = torch.randn(8), torch.randint(0, 2, (8,)).double()
    batch = (logits.reshape(shape), labels.reshape(label_shape))
    close(Classification().loss(Given(), batch), F.binary_cross_entropy_with_logits(logits, labels, reduction="none"))
    close(Classification().measure(Given(), batch), torch.where(labels == 1, logits, -logits))
    assert Classification().outputs(Given(), batch) == 2


def test_log_odds_equal_their_definition():
    logits, labels = torch.randn(7, 5), torch.randint(0, 5, (7,))
    p = logits.softmax(1)[torch.arange(7), labels]
    close(log_odds(logits, labels), torch.log(p / (1 - p)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("sign", [1, -1])
def test_log_odds_stay_finite_with_a_useful_gradient_however_sure_the_model(dtype, classes, sign):
    logits = torch.zeros(3, classes, dtype=dtype)
    logits[:, -1] = sign * 1e4
    logits.requires_grad_()
    value = Classification().measure(Given(), (logits, torch.full((3,), max(classes - 1, 1))))
    assert torch.allclose(value.double(), torch.tensor(sign * 1e4), rtol=0.01)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.isfinite(gradient).all() and (gradient[:, -1] == 1).all()


# ---- regression


@pytest.mark.parametrize("outputs", ["mean", "sum"])
@pytest.mark.parametrize(("shape", "target_shape"), [((6, 3), (6, 3)), ((6, 2, 2), (6, 2, 2)), ((6, 1), (6,)), ((6,), (6, 1))])
def test_regression_reduces_as_mse_loss(outputs, shape, target_shape):
    f, y = torch.randn(shape), torch.randn(target_shape)
    task = Regression(scale=0.5, outputs=outputs)
    expected = 0.5 * F.mse_loss(f, y.reshape(shape), reduction="none").flatten(1 if f.ndim > 1 else 0).reshape(6, -1)
    close(task.loss(Given(), (f, y)), expected.mean(1) if outputs == "mean" else expected.sum(1))
    close(task.measure(Given(), (f, y)), -task.loss(Given(), (f, y)))


# ---- language


class Tiny(nn.Module):
    """Ids to logits over 6 tokens; mixes positions, and takes what a transformers model takes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        hidden = hidden if attention_mask is None else hidden * attention_mask.unsqueeze(-1)
        return collections.namedtuple("Output", "logits")(self.head(torch.tanh(hidden.cumsum(1))))


def token_losses(net, ids, targets, **inputs):
    """-log p of each target, by the definition; 0 where the target is -100."""
    p = net(ids, **inputs).logits.softmax(-1)
    picked = p[:, : targets.shape[1]].gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, -picked.log())


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
LABELS = torch.tensor([[0, 1, -100, 3, 4], [5, 4, 3, -100, -100], [-100, -100, -100, -100, 2]])
IDS = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 1, 0, 5, 2]])
LAYOUTS = {  # batch -> (ids, shifted targets, further inputs)
    "ids": lambda: (IDS, (IDS, IDS[:, 1:], {})),
    "ids alone in a tuple": lambda: ((IDS,), (IDS, IDS[:, 1:], {})),
    "ids in a dict": lambda: ({"input_ids": IDS}, (IDS, IDS[:, 1:], {})),
    "mask": lambda: ({"input_ids": IDS, "attention_mask": MASK}, (IDS, IDS[:, 1:].masked_fill(MASK[:, 1:] == 0, -100), {"attention_mask": MASK})),
    "labels": lambda: ({"input_ids": IDS, "labels": LABELS}, (IDS, LABELS[:, 1:], {})),
    "labels and mask": lambda: ({"input_ids": IDS, "labels": LABELS, "attention_mask": MASK}, (IDS, LABELS[:, 1:], {"attention_mask": MASK})),
    "shifted targets": lambda: ((IDS[:, :-1], LABELS[:, 1:]), (IDS[:, :-1], LABELS[:, 1:], {})),
    "dataclass": lambda: (Fields(IDS, LABELS), (IDS, LABELS[:, 1:], {})),
}


@dataclass
class Fields:
    input_ids: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_reduces_as_the_training_loop_does(layout):
    net = Tiny()
    batch, (ids, targets, inputs) = LAYOUTS[layout]()
    losses, counted = token_losses(net, ids, targets, **inputs), (targets != -100).sum(1)
    close(Language(reduction="sum").loss(net, batch), losses.sum(1))
    close(Language(reduction="mean").loss(net, batch), losses.sum(1) / counted)
    # a mean over all tokens of the batch, as transformers does, is the mean of the examples' losses
    task = Language(reduction="tokens", mean_tokens=float(counted.double().mean()))
    close(task.loss(net, batch).mean(), losses.sum() / counted.sum())
    close(task.measure(net, batch), -losses.sum(1))


def test_the_tokens_reduction_is_the_loss_of_transformers():
    transformers = pytest.importorskip("transformers")
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 4, "vocab_size": 6, "n_positions": 8, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).double().eval()
    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS})
    task = Language(reduction="tokens", mean_tokens=mean_tokens([{k: v[i] for k, v in batch.items()} for i in range(3)]))
    close(task.loss(net, batch).mean(), net(**batch).loss.double(), 1e-6)  # transformers computes its loss in float32


def test_an_example_without_counted_tokens_has_no_loss_and_no_gradient():
    net = Tiny()
    value = Language(reduction="mean").loss(net, (IDS[:1, :-1], torch.full((1, 4), -100)))
    assert value.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(value.sum(), list(net.parameters())))


def test_mean_tokens_counts_what_the_loss_counts():
    assert mean_tokens(IDS) == 4
    assert mean_tokens({"input_ids": IDS, "attention_mask": MASK}) == (4 + 2 + 4) / 3
    assert mean_tokens({"input_ids": IDS, "labels": LABELS}) == (3 + 2 + 1) / 3


# ---- a task of one's own


def test_a_task_from_two_functions_and_its_sample():
    net, x = nn.Linear(3, 1), torch.randn(5, 3)

    def sample(model, batch, draws):
        return batch[0], model(batch[0]).detach().squeeze(1) + draws.normal(1).squeeze(1) * 0.5**0.5

    task = Task(loss=lambda m, b: (m(b[0]).squeeze(1) - b[1]) ** 2, measure=lambda m, b: m(b[0]).squeeze(1), sample=sample)
    ours = Regression().sampled(net, (x, torch.zeros(5)), Draws(3, range(5)))
    close(task.sampled(net, (x, torch.zeros(5)), Draws(3, range(5))), ours)
    assert task.outputs(net, (x, x)) is None


def test_a_task_without_what_the_curvature_needs_says_what_to_do():
    task = Task(loss=lambda m, b: m(b).squeeze(1), measure=lambda m, b: m(b).squeeze(1))
    with pytest.raises(TaskError, match=r"without sample=(.|\n)*fisher='empirical'"):
        task.sampled(nn.Linear(3, 1), torch.ones(2, 3), Draws(0, range(2)))
    with pytest.raises(TaskError, match=r"does not know its outputs(.|\n)*fisher='sampled'"):
        task.exact(nn.Linear(3, 1), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("reduce", "given"),
    [
        (lambda v: v.mean(), r"shape \(\) for a batch of 4"),
        (lambda v: v[:, None], r"shape \(4, 1\)"),
        (lambda v: v[:2], r"shape \(2,\)"),
        (lambda v: v.tolist(), "list"),
    ],
    ids=["mean", "column", "too few", "list"],
)
@pytest.mark.parametrize("what", ["loss", "measure"])
def test_a_loss_that_is_not_one_number_per_example_is_refused(reduce, given, what):
    def function(model, batch):
        return reduce((model(batch[0]) - batch[1]).square().sum(1))

    task = Task(loss=function, measure=function)
    with pytest.raises(TaskError, match=rf"the task's {what} returned (a )?{given}(.|\n)*(reduction=\"none\"|one {what} per example)"):
        getattr(task, what)(nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, 2)))


# ---- what the built-in tasks refuse


three = torch.zeros(4, 3)
REFUSED = {
    "labels out of range": (Classification(), (three, torch.tensor([0, 1, 2, 3])), r"labels from 0 to 3 and 3 classes(.|\n)*0\.\.2(.|\n)*renumber"),
    "negative labels": (Classification(), (three, torch.tensor([0, -1, 2, 1])), "labels from -1 to 2"),
    "soft labels for one output": (Classification(), (three[:, :1], torch.full((4,), 0.3)), r"not whole numbers(.|\n)*soft labels(.|\n)*hw.tasks.Task"),
    "probabilities": (Classification(), (three, torch.full((4, 3), 1 / 3)), r"labels of shape \(4, 3\)(.|\n)*one class number per example"),
    "too few labels": (Classification(), (three, torch.zeros(3)), r"labels of shape \(3,\) for logits of shape \(4, 3\)"),
    "three axes": (Classification(), (torch.zeros(4, 3, 2), torch.zeros(4)), r"shape \(4, 3, 2\)(.|\n)*\(examples, classes\)"),
    "no labels": (Classification(), {"logits": three}, r"fields \['logits'\](.|\n)*'labels'(.|\n)*labels='...'"),
    "no pair": (Classification(), (three,), "inputs, labels"),
    "a bare tensor": (Regression(), three, "a batch of type Tensor"),
    "targets of another shape": (Regression(), (three, torch.zeros(4, 2)), r"\(4, 3\) and targets of shape \(4, 2\)(.|\n)*last layer"),
    "a model that reduces": (Regression(), (torch.zeros(()), torch.zeros(4)), r"predictions of shape \(\)"),
    "tokens out of the vocabulary": (Language(), (torch.zeros(2, 3, 6), torch.full((2, 3), 6)), r"tokens from 6 to 6 and 6 classes"),
    "targets that are not shifted": (Language(), (torch.zeros(2, 3, 6), torch.zeros(2, 4, dtype=torch.long)), r"\(2, 3, 6\) for targets of shape \(2, 4\)"),
    "nothing to predict": (Language(), {"attention_mask": MASK}, r"fields \['attention_mask'\](.|\n)*input_ids"),
    "a batch of text": (Language(), ["a", "b"][:1], r"type str(.|\n)*collate="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_does_not_fit_is_refused_with_what_to_do(case):
    task, batch, text = REFUSED[case]
    for function in (task.loss, task.measure):
        with pytest.raises(TaskError, match=text) as caught:
            function(Given(), batch)
        assert caught.value.mend and caught.value.expected


def test_a_model_that_returns_neither_a_tensor_nor_logits_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {"scores": x}

    with pytest.raises(TaskError, match=r"returned a dict(.|\n)*\.logits"):
        Classification().loss(Odd(), (three, torch.zeros(4)))


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: (z, None), lambda z: {"logits": z}, lambda z: collections.namedtuple("O", "loss logits")(None, z)], ids=range(4))
def test_logits_are_found_in_any_usual_output(wrap):
    class Model(nn.Module):
        def forward(self, x):
            return wrap(x)

    logits = torch.randn(4, 3)
    close(Classification().loss(Model(), (logits, torch.arange(4) % 3)), F.cross_entropy(logits, torch.arange(4) % 3, reduction="none"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Regression(outputs="avg"), "'mean' or 'sum'"),
        (lambda: Language(reduction="batch"), "'sum', 'mean' or 'tokens'"),
        (lambda: Language(reduction="tokens"), "hw.tasks.mean_tokens"),
        (lambda: Language(mean_tokens=3.0), "mean_tokens exactly when"),
    ],
    ids=["regression", "language", "tokens without their mean", "their mean without tokens"],
)
def test_settings_that_make_no_sense_are_refused(make, text):
    with pytest.raises(TaskError, match=text):
        make()


def test_labels_are_found_by_the_name_they_have():
    logits, y = torch.randn(4, 3), torch.arange(4) % 3
    named = Classification(labels="target")
    close(named.loss(Given(), {"target": y, "logits": logits}), Classification().loss(Given(), (logits, y)))


def test_every_task_describes_itself_in_plain_json():
    import json

    for task in (Classification(weight=torch.ones(2)), Regression(), Language(), Task(loss=print, measure=print)):
        assert json.loads(json.dumps(task.describe())) == task.describe() and repr(task).startswith(type(task).__name__)
