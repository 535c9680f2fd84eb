"""Attributions beside captum's and shap's, in one run: equal where the definitions coincide, and by how much they differ where not.

    python benchmarks/explain_peers.py                     every table: about a minute on one thread
    python benchmarks/explain_peers.py captum shap         some of: published, captum, language, conductance, behaviour, shap
    python benchmarks/explain_peers.py --write             put what is printed at the end of docs/coming-from-captum-and-shap.md too

Needs captum 0.9.0 and shap 0.51.0 (`make bench` has an environment for peers; `published` needs neither), and transformers for `language`;
what is not installed is left out, and said. The figures of captum and shap are the largest difference of any attribution, as a share of the
largest attribution; those of `published` are in units of the output. Where a peer draws at random, it is run 20 times: "standardised" is the
root mean square of (mean of its runs - ours) / standard error, about 1 where both estimate the same number. Exit status 1 if a row misses
its bound.

`published` holds the numbers that captum's own tests expect (BSD-3, meta-pytorch/captum, tests/attr) against ours: the models are written
anew from their definitions, some of them examples of Sundararajan, Taly, Yan 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from speed.tables import installed, machine, table
from torch import Tensor, nn

import headwater as hw

RULES = {
    "gausslegendre": hw.quadrature.gauss_legendre,
    "riemann_middle": hw.quadrature.midpoint,
    "riemann_left": hw.quadrature.left,
    "riemann_right": hw.quadrature.right,
    "riemann_trapezoid": hw.quadrature.trapezoid,
}
RUNS = 20
BOUND = 2.0  # of what should be about 1


class Row(NamedTuple):
    """One comparison: what, how far apart, how far they may be."""

    what: str
    found: float
    bound: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        return bool(self.found <= self.bound)

    def cells(self) -> list[str]:
        return [self.what, f"{self.found:.1e} {self.unit}".strip(), f"{self.bound:g}", "yes" if self.holds else "NO"]


def apart(theirs: Any, ours: Any) -> float:
    """The largest difference, as a share of the largest number."""
    a, b = (np.concatenate([np.asarray(t.detach() if isinstance(t, Tensor) else t, dtype=float).ravel() for t in _parts(v)]) for v in (theirs, ours))
    return float(np.abs(a - b).max() / np.abs(b).max())


def standardised(runs: list[Any], ours: Any, stderr: Any = 0.0) -> float:
    """Root mean square of (mean of the runs - ours) / standard error, over numbers that vary."""
    draws = np.stack([np.asarray(r.detach() if isinstance(r, Tensor) else r, dtype=float) for r in runs])
    error = np.sqrt(draws.std(0, ddof=1) ** 2 / len(draws) + np.square(stderr))
    moves = error > 1e-3 * error.max()
    return float(np.sqrt((((draws.mean(0) - ours)[moves] / error[moves]) ** 2).mean()))


def _parts(v: Any) -> list[Any]:
    return list(v) if isinstance(v, tuple | list) else [v]


def explain(*args: Any, **settings: Any) -> Any:
    return hw.explain(*args, **settings, progress=False)


# ---- models ---------------------------------------------------------------------------------------------------------------------


def network(act: type[nn.Module]) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small convolutional network trained on digits, 16 test digits and their labels."""
    torch.manual_seed(0)
    (images, labels), (other, others) = hw.data.split(hw.data.mnist(), train=2000)
    layers = [nn.Conv2d(1, 4, 5, stride=2), act(), nn.Conv2d(4, 8, 5, stride=2), act(), nn.Flatten(), nn.Linear(128, 32), act(), nn.Linear(32, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), other[:16], others[:16]


class Tokens(nn.Module):
    """Ids (n, 12) through an embedding and a recurrent layer to two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read, self.head = nn.Embedding(50, 16), nn.GRU(16, 24, batch_first=True), nn.Linear(24, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.read(self.embed(ids))[0][:, -1])
        return out


# ---- what captum's tests expect ---------------------------------------------------------------------------------------------------


def _first(a: Tensor, b: Tensor) -> Tensor:
    return (a.relu() - 1 - b.relu()).relu()


def _second(a: Tensor, b: Tensor) -> Tensor:
    return ((a - 1).relu() - b.relu()).relu()


def _divided(a: Tensor, b: Tensor, by: Tensor, column: int) -> Tensor:
    return ((a - 1).relu() - b.relu() / by).relu()[:, column]


class Layered(nn.Module):
    """Three inputs, their sum shifted by (-10, 1, 1, 1), a ReLU, the sum of it shifted by (-1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.relu, self.head = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)
        with torch.no_grad():
            for layer, bias in ((self.shift, [-10.0, 1.0, 1.0, 1.0]), (self.head, [-1.0, 1.0])):
                layer.weight.fill_(1.0)
                layer.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.relu(self.shift(x)))
        return out


class Twice(nn.Module):
    """Two ReLUs in one module that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu(), x.relu()


class TwiceLayered(Layered):
    """The same with both of them added."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Twice()

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.both(self.shift(x))
        out: Tensor = self.head(one + other)
        return out


def _missed(values: Any, expected: tuple[float, ...]) -> float:
    return max(float(np.abs(v - e).max()) for v, e in zip(values, expected, strict=True))


def published() -> list[Row]:
    """Their expectations, with their tolerances (which are loose) and what we miss them by."""
    three, one, rows = torch.tensor([[3.0]]), torch.tensor([[1.0]]), []
    for name, model in (("ReLU(ReLU(a) - 1 - ReLU(b)) at (3, 1)", _first), ("ReLU(ReLU(a - 1) - ReLU(b)) at (3, 1)", _second)):
        for rule, make in RULES.items():
            e = explain(model, (three, one), rule=make(500))
            rows.append(Row(f"{name}: 1.5, -0.5; {rule}, 500 points", _missed(e.values, (1.5, -0.5)), 0.05))
        e = explain(model, (three, one), rule=hw.quadrature.gauss_legendre(500))
        slopes = (e.values[0] / 3, e.values[1] / 1)
        rows.append(Row(f"{name}, not multiplied by the inputs: 0.5, -0.5", _missed(slopes, (0.5, -0.5)), 0.05))
        rows.append(Row(f"{name}: residual", float(np.abs(e.residual).max()), 0.07))
    sizes = [explain(_first, (three, one), rule=hw.quadrature.gauss_legendre(500), batch_size=k).values for k in (1, 10, 20, 1000)]
    rows.append(Row("the same for every internal batch size", max(apart(s, sizes[0]) for s in sizes[1:]), 1e-6))
    a, b = torch.tensor([[1.5, 2.0, 34.3], [3.4, 1.2, 2.0]]), torch.tensor([[3.0, 3.5, 23.2], [2.3, 1.2, 0.3]])
    e = explain(_divided, (a, b), extra=(torch.arange(1.0, 7.0).reshape(2, 3), 1), rule=hw.quadrature.gauss_legendre(500))
    rows.append(Row("extra arguments, a tensor by rows and a number: residual", float(np.abs(e.residual).max()), 0.07))
    for x, layer, unit, expected in (
        ([0.0, 100.0, 0.0], "head", 0, [0.0, 390.0, 0.0]),
        ([0.0, 100.0, 0.0], "shift", 0, [0.0, 100.0, 0.0]),
        ([0.0, 6.0, 14.0], "relu", 0, [0.0, 3.0, 7.0]),
        ([0.0, 5.0, 4.0], "relu", 1, [0.0, 5.0, 4.0]),
    ):
        e = explain(Layered(), torch.tensor([x]), layer=layer, neuron=unit, rule=hw.quadrature.gauss_legendre(200))
        rows.append(Row(f"neuron {unit} of {layer} at {x}: {expected}", float(np.abs(e.values[0] - expected).max()), 0.1))
    e = explain(TwiceLayered(), torch.tensor([[0.0, 100.0, 0.0]]), 0, layer="both")
    rows.append(Row("a layer that returns two tensors: (90, 100, 100, 100) twice", max(float(np.abs(v - [[90.0, 100, 100, 100]]).max()) for v in e.values), 0.01))
    return [*rows, *_classification()]


def _classification() -> list[Row]:
    """Fresh classifiers with sigmoid and softmax outputs: |delta| within .005 at 200 points, whatever the rule."""
    torch.manual_seed(0)
    models = {
        "sigmoid": (nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 1), nn.Sigmoid()), 5, None),
        "softmax": (nn.Sequential(nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10), nn.Softmax(1)), 40, 5),
    }
    rows = []
    for name, (model, width, target) in models.items():
        x, b = torch.arange(1.0, 10.0 * width + 1).reshape(10, width) / width, 0.0
        for rule, make in RULES.items():
            if rule in ("riemann_left", "riemann_right"):
                continue
            e = explain(model, x, target, baseline=b, rule=make(200))
            rows.append(Row(f"{name} outputs: residual; {rule}, 200 points", float(np.abs(e.residual).max()), 0.005))
    return rows


# ---- captum ---------------------------------------------------------------------------------------------------------------------


def captum_rows() -> list[Row]:
    """Equal questions, put to both."""
    return [*_rules(nn.ReLU), *_rules(nn.GELU), *_questions(), *_drawn()]


def _rules(act: type[nn.Module]) -> list[Row]:
    """Every rule at 50 points."""
    from captum.attr import IntegratedGradients

    rows: list[Row] = []
    model, x, labels = network(act)
    for rule, make in RULES.items():
        what = f"CNN {act.__name__}, {rule}, 50 points"
        theirs, delta = IntegratedGradients(model).attribute(x, target=labels, n_steps=50, method=rule, return_convergence_delta=True)
        ours = explain(model, x, labels, rule=make(50))
        if rule == "riemann_trapezoid":
            rows.append(Row(f"{what}: captum's = ours x (1 - 1/50)", apart(theirs, ours.values * (1 - 1 / 50)), 1e-5))
            rows.append(Row(f"{what}: as they stand (captum's weights sum to 1 - 1/n)", apart(theirs, ours.values), 0.025))
        else:
            rows.append(Row(what, apart(theirs, ours.values), 1e-5))
            rows.append(Row(f"{what}: convergence delta = residual, in logits", float(np.abs(delta.numpy() - ours.residual).max()), 1e-4))
    return rows


def _questions() -> list[Row]:
    """Baselines, inputs, layers, neurons, tokens: Gauss-Legendre with 50 points on both sides."""
    from captum.attr import IntegratedGradients, LayerIntegratedGradients, NeuronConductance, NeuronIntegratedGradients

    model, x, labels = network(nn.GELU)
    ig, base, rule = IntegratedGradients(model), x.roll(1, 0), hw.quadrature.gauss_legendre(50)
    flat = explain(model, x, labels, rule=rule)
    slopes = np.divide(flat.values, flat.inputs, out=np.zeros_like(flat.values), where=flat.inputs != 0)
    raw = IntegratedGradients(model, multiply_by_inputs=False).attribute(x, target=labels).numpy() * (flat.inputs != 0)
    layer = LayerIntegratedGradients(model, model[3]).attribute(x, target=labels)
    neuron = NeuronIntegratedGradients(model, model[6]).attribute(x, 5)
    through = NeuronConductance(model, model[6]).attribute(x, 5, target=labels, method="gausslegendre")
    torch.manual_seed(0)
    reader, ids = Tokens().eval(), torch.randint(1, 50, (8, 12))
    tokens = LayerIntegratedGradients(reader, reader.embed).attribute(ids, torch.zeros_like(ids), target=1).sum(-1)

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return model(a + 0.5 * b)

    found = {
        "a baseline for each example": (ig.attribute(x, base, labels), explain(model, x, labels, baseline=base, rule=rule)),
        "LayerIntegratedGradients: layer=": (layer, explain(model, x, labels, layer=model[3], rule=rule)),
        "NeuronIntegratedGradients: layer=, neuron=": (neuron, explain(model, x, layer=model[6], neuron=5, rule=rule)),
        "NeuronConductance: layer=, neuron=, space='input'": (through, explain(model, x, labels, layer=model[6], neuron=5, space="input", rule=rule)),
        "LayerIntegratedGradients(embedding).sum(-1): the ids as they are": (tokens, explain(reader, ids, 1, baseline=0, rule=rule)),
        "two inputs": (IntegratedGradients(pair).attribute((x, base), target=labels), explain(pair, (x, base), labels, rule=rule)),
    }
    rows = [Row(what, apart(theirs, ours.values), 1e-5) for what, (theirs, ours) in found.items()]
    return [*rows, Row("multiply_by_inputs=False: values / (inputs - reference)", apart(raw, slopes), 1e-5)]


def _drawn() -> list[Row]:
    """Averages over random draws."""
    from captum.attr import GradientShap, IntegratedGradients, NoiseTunnel
    from captum.metrics import infidelity

    model, x, labels = network(nn.GELU)
    x, labels, data = x[:4], labels[:4], hw.data.mnist()[0][3000:3008]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (captum draws from numpy's global state)
    ours = explain(model, x, labels, baseline=hw.baselines.dataset(data, 8)).values
    runs = [GradientShap(model).attribute(x, data, n_samples=200, stdevs=0.0, target=labels) for _ in range(RUNS)]
    rows = [Row("GradientShap (200 samples): baselines.dataset", standardised(runs, ours), BOUND, "standardised")]
    tunnel = NoiseTunnel(IntegratedGradients(model))
    smooth = explain(model, x, labels, smooth=hw.Smooth(draws=200, spread=0.1))
    runs = [tunnel.attribute(x, nt_samples=40, nt_samples_batch_size=5, stdevs=0.1, target=labels) for _ in range(RUNS)]
    rows.append(Row("NoiseTunnel (smoothgrad): hw.Smooth", standardised(runs, smooth.values, smooth.stderr), BOUND, "standardised"))

    def removed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.rand_like(inputs) < 0.5).float()
        return mask, inputs * (1 - mask)

    e = explain(model, x, labels)
    values = torch.from_numpy(e.values).float()
    runs = [infidelity(model, removed, x, values, target=labels, n_perturb_samples=200) for _ in range(RUNS)]
    own = np.stack([hw.evaluate.infidelity(e, model, x, labels, draws=200, seed=k).values for k in range(RUNS)])
    found = standardised(runs, own.mean(0), own.std(0, ddof=1) / RUNS**0.5)
    return [*rows, Row("infidelity, half of the pixels removed: hw.evaluate.infidelity", found, BOUND, "standardised")]


def language() -> list[Row]:
    """A causal language model, each token of a continuation: LLMGradientAttribution over LayerIntegratedGradients of the embedding."""
    import transformers
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "the", "film", "was", "good", "bad", "long", "short", "very", "not"]
    spelled = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spelled, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.1}
    writer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    theirs = LLMGradientAttribution(LayerIntegratedGradients(writer, writer.transformer.wte), tokenizer)
    told = theirs.attribute(TextTokenInput("the film was", tokenizer), target="very good", n_steps=50).token_attr
    each = hw.targets.continuation("very good", each=True, prefix=False)
    ours = explain(writer, "the film was", each, tokenizer=tokenizer, baseline=0, rule=hw.quadrature.gauss_legendre(50))
    return [Row("LLMGradientAttribution of a GPT-2, each token: targets.continuation(each=True, prefix=False)", apart(told, ours.values), 1e-5)]


def conductance() -> str:
    """Layer conductance against 2,000 points."""
    from captum.attr import LayerConductance

    torch.manual_seed(0)
    line = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 1))
    cnn, x, labels = network(nn.GELU)
    cells = []
    for name, model, layer, inputs, target in (("linear network", line, line[0], torch.randn(16, 8), 0), ("CNN GELU, second convolution", cnn, cnn[3], x, labels)):
        ask = {"layer": layer, "space": "input"}
        truth = explain(model, inputs, target, **ask, rule=hw.quadrature.midpoint(2000)).values
        for n in (10, 50, 250):
            theirs = LayerConductance(model, layer).attribute(inputs, target=target, n_steps=n)
            ours = explain(model, inputs, target, **ask, rule=hw.quadrature.midpoint(n)).values
            cells.append([f"{name}, {n} points", f"{apart(theirs, truth):.1e}", f"{apart(ours, truth):.1e}"])
    return table(["largest error, as a share of the largest value", "captum (default rule)", "Headwater (midpoint)"], cells)


def behaviour() -> str:
    """What each does with a model that was left in training mode, and with an input that the output does not use."""
    from captum.attr import IntegratedGradients

    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).state_dict()
    x, cells = torch.randn(8, 4) + 1, []
    for name in ("captum", "Headwater"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
        model.load_state_dict(fresh)
        ask = IntegratedGradients(model).attribute if name == "captum" else lambda v, m=model: torch.from_numpy(explain(m, v).values)
        together = ask(x).detach()
        moved = float((model[1].running_mean - fresh["1.running_mean"]).abs().max())
        alone = _raised(lambda ask=ask, together=together: f"{apart(ask(x[:4]).detach(), together[:4]):.1e}")
        ask = IntegratedGradients(_first_alone).attribute if name == "captum" else lambda v: explain(_first_alone, v)
        unused = _raised(lambda ask=ask: "values of 0" if ask((x, x)) is not None else "")
        cells.append([name, f"{moved:.1e}", alone, unused])
    head = ["", "BatchNorm in training mode: running means moved by", "values of 4 examples alone and among 8 differ by", "an input that is not used"]
    return table(head, cells)


def _first_alone(a: Tensor, b: Tensor) -> Tensor:
    return a.sum(1)


def _raised(ask: Callable[[], str]) -> str:
    """The answer, or the kind of error."""
    try:
        return ask()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error)[:40]}..."


# ---- shap -----------------------------------------------------------------------------------------------------------------------


def shap_rows() -> list[Row]:
    """Equal questions, put to both."""
    import shap
    from sklearn.linear_model import LinearRegression, LogisticRegression

    numbers = np.random.default_rng(0)
    X = numbers.integers(0, 2, (400, 8)).astype(float)
    y = X[:, 0] * X[:, 1] + 2 * X[:, 2] - X[:, 3] * X[:, 4] + 0.3 * numbers.normal(size=400)
    rows = [row for name, model in forests(X, y).items() for row in _forest(name, model, X)]
    for name, model in (("LinearRegression", LinearRegression().fit(X, y)), ("LogisticRegression, log-odds", LogisticRegression().fit(X, y > 1))):
        theirs = shap.LinearExplainer(model, shap.maskers.Independent(X, max_samples=len(X))).shap_values(X[:50])
        target = 1 if name.startswith("Logistic") else None
        rows.append(Row(f"LinearExplainer, {name}, against the mean", apart(theirs, explain(model, X[:50], target, baseline=hw.baselines.mean(X)).values), 1e-9))
    ridge = LinearRegression().fit(X, y)
    theirs = shap.KernelExplainer(ridge.predict, X[:1]).shap_values(X[1:11], silent=True)
    rows.append(Row("KernelExplainer of a linear model's predict, one background row", apart(theirs, explain(ridge.predict, X[1:11], baseline=X[0]).values), 1e-6))

    def curved(rows: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(rows[:, 0] * rows[:, 1] * rows[:, 2]) + rows[:, 2] * rows[:, 3] - rows[:, 4] ** 2)

    Z = numbers.normal(size=(6, 5))
    theirs = shap.ExactExplainer(curved, shap.maskers.Independent(np.zeros((1, 5))))(Z, silent=True).values
    ours = explain(curved, Z, path=hw.paths.sweeps(segments=1, orders=400))
    rows.append(Row("ExactExplainer of a function: paths.sweeps(1), 400 orders", standardised([theirs, theirs], ours.values, ours.stderr), BOUND, "standardised"))
    model, x, _ = network(nn.GELU)
    data, target = hw.data.mnist()[0][3000:3008], 3
    torch.manual_seed(0)
    explainer = shap.GradientExplainer(model, data)
    runs = [explainer.shap_values(x[:2], nsamples=400, rseed=k)[..., target] for k in range(RUNS)]
    ours = explain(model, x[:2], target, baseline=hw.baselines.dataset(data, 8)).values
    rows.append(Row("GradientExplainer (400 samples): baselines.dataset", standardised(runs, ours), BOUND, "standardised"))
    return rows


def forests(X: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Ensembles of three libraries; classifiers by their margin."""
    import lightgbm
    import xgboost
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier

    return {
        "GradientBoostingRegressor": GradientBoostingRegressor(n_estimators=50, max_depth=4, random_state=0).fit(X, y),
        "RandomForestClassifier": RandomForestClassifier(30, random_state=0).fit(X, y > 1),
        "XGBoost": xgboost.XGBRegressor(n_estimators=50, max_depth=4).fit(X, y),
        "LightGBM": lightgbm.LGBMRegressor(n_estimators=50, verbose=-1).fit(X, y),
    }


def _forest(name: str, model: Any, X: np.ndarray) -> list[Row]:
    """Interventional SHAP on 0/1 columns: one background row, and fifty. shap sums leaves in single precision: hence 1e-7."""
    import shap

    rows = []
    target = 1 if name == "RandomForestClassifier" else None
    for count in (1, 50):
        theirs = shap.TreeExplainer(model, X[:count], feature_perturbation="interventional").shap_values(X[100:200])
        theirs = theirs[..., 1] if theirs.ndim == 3 else theirs
        baseline = X[0] if count == 1 else hw.baselines.dataset(X[:count], count)
        ours = explain(model, X[100:200], target, baseline=baseline).values
        rows.append(Row(f"TreeExplainer(interventional, {count} background row{'s' * (count > 1)}), {name}, 0/1 columns", apart(theirs, ours), 1e-6))
    return rows


def continuous() -> str:
    """Where columns are continuous, the Shapley value and the path are two answers; the path-dependent one is a third."""
    import shap

    numbers = np.random.default_rng(1)
    X = numbers.normal(size=(600, 8))
    y = X[:, 0] * X[:, 1] + 2 * X[:, 2] - np.abs(X[:, 3]) + 0.3 * numbers.normal(size=600)
    cells = []
    for name, model in forests(X, y).items():
        target = 1 if name == "RandomForestClassifier" else None
        ours = explain(model, X[100:300], target, baseline=X[0]).values
        pick = lambda v: v[..., 1] if v.ndim == 3 else v  # noqa: E731
        inter = pick(shap.TreeExplainer(model, X[:1], feature_perturbation="interventional").shap_values(X[100:300]))
        depend = pick(shap.TreeExplainer(model, feature_perturbation="tree_path_dependent").shap_values(X[100:300]))
        many = explain(model, X[100:300], target, baseline=hw.baselines.dataset(X[:100], 100)).values
        cells.append([name, f"{np.corrcoef(ours.ravel(), inter.ravel())[0, 1]:.3f}", f"{np.corrcoef(many.ravel(), depend.ravel())[0, 1]:.3f}"])
    return table(["continuous columns", "correlation with interventional, same baseline row", "with path-dependent (ours: 100 rows of the data)"], cells)


# ---- printing ---------------------------------------------------------------------------------------------------------------------

COMPARED: dict[str, tuple[str, Callable[[], list[Row]]]] = {
    "published": ("What captum's tests expect", published),
    "captum": ("captum", captum_rows),
    "language": ("Language models", language),
    "shap": ("shap", shap_rows),
}
SHOWN: dict[str, tuple[str, Callable[[], str]]] = {
    "conductance": ("Layer conductance", conductance),
    "behaviour": ("Models left in training mode, inputs left unused", behaviour),
    "shap": ("Where shap answers another question", continuous),
}


NEEDS = {"captum": ("captum",), "language": ("captum", "transformers"), "conductance": ("captum",), "behaviour": ("captum",), "shap": ("shap", "xgboost", "lightgbm")}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "coming-from-captum-and-shap.md"
MARK = "<!-- figures: python benchmarks/explain_peers.py --write -->"


def main(names: list[str], write: bool = False) -> int:
    """Print the tables that are asked for, and put them at the end of the page where ``write``; the number of rows that miss their bound."""
    missed, began, told = 0, time.perf_counter(), []
    for name in names or ["published", "captum", "language", "conductance", "behaviour", "shap"]:
        found = []
        if absent := [library for library in NEEDS.get(name, ()) if importlib.util.find_spec(library) is None]:
            print(f"{name}: left out, since {' and '.join(absent)} is not installed.\n")
            continue
        if name in COMPARED:
            title, rows = COMPARED[name][0], COMPARED[name][1]()
            missed += sum(not row.holds for row in rows)
            found.append(f"### {title}\n\n{table(['what', 'found', 'bound', 'holds'], [row.cells() for row in rows])}\n")
        if name in SHOWN:
            found.append(f"### {SHOWN[name][0]}\n\n{SHOWN[name][1]()}\n")
        print("\n".join(found), flush=True)
        told += found
    told.append(f"{missed} rows miss their bound. {machine()}, shap {installed('shap')}; {time.perf_counter() - began:.0f} s.\n")
    print(told[-1])
    if write:
        before = PAGE.read_text().split(MARK)[0]
        PAGE.write_text(f"{before}{MARK}\n\n" + "\n".join(told))
    return missed


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the peers
    torch.set_num_threads(1)
    sys.exit(min(1, main([a for a in sys.argv[1:] if a != "--write"], "--write" in sys.argv)))
