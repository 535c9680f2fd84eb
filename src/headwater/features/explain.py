"""The door of this room: ``explain``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from headwater.errors import InputError
from headwater.features.question import Question
from headwater.result import FeatureScores

FAMILIES = ("text", "pipelines", "trees", "kernels", "network", "blackbox")
"""Modules of this room that know a kind of model, asked in this order. Each has ``recognises(question) -> bool`` and
``explain(question) -> FeatureScores``; adding a kind of model is one module and one word here."""


def explain(
    model: Any,
    inputs: Any,
    target: Any = None,
    *,
    baseline: Any = None,
    path: Any = None,
    rule: Any = None,
    tolerance: float | None = None,
    max_evaluations: int | None = None,
    layer: Any = None,
    neuron: Any = None,
    space: str | None = None,
    extra: Any = None,
    output: str | None = None,
    discrete: Any = None,
    smooth: Any = None,
    tokenizer: Any = None,
    feature_names: Sequence[str] | None = None,
    example_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureScores:
    """Which parts of these inputs carried the prediction? Integrated Gradients of any model, exact where it can be.

    With f what is explained, b the baseline and the straight line between them (Sundararajan, Taly, Yan 2017, arXiv 1703.01365, equation 1),

        value_j = (x_j - b_j) * integral of df/dx_j (b + t (x - b)) dt over t from 0 to 1,        sum of the values = f(x) - f(b).

    Positive: the part raised the output above its value at the baseline. Values are in units of the output. Tree ensembles are walked
    exactly, kernel machines and linear models have closed forms, networks are integrated in points, functions are explained by their values.

    Args:
        model: a torch module or a function of tensors; a fitted estimator of scikit-learn (trees, kernel machines, linear models,
            perceptrons, pipelines of them), XGBoost, LightGBM or CatBoost; a model or pipeline of transformers; or any function ``(n, p) -> (n,)`` or
            ``(n, outputs)`` of arrays. It is not changed: modules in training mode are put into eval mode for the while, and a note says so.
        inputs: (n, ...), the first axis counts examples: a tensor, an array, a frame, a tuple or dict of tensors, texts, token ids.
        target: which output, None where there is one. An index, a tuple of them for outputs with several axes, n of them (one for each
            example), a function ``outputs (m, ...) -> (m,)``, or one of ``hw.targets``. For estimators the label of a class, or two (one
            against the other), None meaning the second class of two, and of more each row's predicted one. For texts also a label's name, a continuation, an answer.
        baseline: what the inputs are compared with: None (zeros; of texts padding), a number, one point (...), one for each example
            (n, ...), or one of ``hw.baselines``. Several points are averaged, and ``stderr`` tells their spread.
        path: one of ``hw.paths``; default: the straight line. Networks; functions also take ``hw.paths.sweeps()``.
        rule: one of ``hw.quadrature``; default: 32 points of Gauss-Legendre. Where points are used at all.
        tolerance: relative, between 0 and 1: points are added, example by example, until both the residual and the estimated error are
            below it. Networks, kernel machines without a closed form, functions.
        max_evaluations: how many evaluations an example may cost when there is a tolerance; default 256 (networks). Examples that are not
            done by then keep their best answer, and ``converged`` is False.
        layer: a module of the network, its dotted name, or a list: values are those of its output (m, ...), the line runs in the layer.
        neuron: a unit of that layer (a tuple for several axes): with no target, the inputs' part in that unit; with one, the inputs' part
            in the output that flows through it.
        space: "layer" (default), or "input" for conductance: the line runs in the inputs, the values are the layer's.
        extra: further arguments of a network, a tuple or dict; tensors of n rows hold one row for each example.
        output: of estimators: "margin" (default) or "probability"; of tree ensembles also "prediction".
        discrete: of trees: columns whose cuts are moved to the middle between levels; default: those whose cuts part whole numbers; False: none.
            Of functions: columns that switch in the middle of the path.
        smooth: ``hw.Smooth(draws, spread)``: average over noisy copies of the inputs. Networks.
        tokenizer: of a text model.
        feature_names, example_names: what parts of the last axis, and examples, are called.
        batch_size: path points (rows) at once; default: as many as suit the device. Memory does not grow with the number of points.
        seed: of all chance (baselines that are drawn, noise, orders of sweeps).
        progress: show a bar where the work takes longer than two seconds.

    Returns:
        :class:`headwater.FeatureScores`: ``values`` in the structure and shape of the inputs (of a layer: of its output; of texts: (n,
        positions)); ``residual`` (n,), which is a lower bound on the error; ``error`` (n,), its estimate, where there is one;
        ``evaluations`` (n,), ``converged`` (n,), ``output`` and ``baseline_output`` (n,), and ``notes`` of what was found and handled.

    Raises:
        InputError: a model that no family knows, shapes that do not fit, a target that does not exist, an output that does not depend on
            the inputs, an argument that means nothing for this model (none is ignored), a setting out of range.
        BatchCoupling: an example's output depends on the others of its batch.
        NotFinite: the model's output is not finite somewhere between baseline and input.
        MissingExtra: a library that is needed is not installed.

    >>> import torch
    >>> product = lambda x: x[:, 0] * x[:, 1] ** 2
    >>> e = explain(product, torch.tensor([[3.0, 2.0]]), progress=False)
    >>> e.values.round(5).tolist()
    [[4.0, 8.0]]
    >>> float(e.output[0]), float(e.baseline_output[0]), int(e.evaluations[0])
    (12.0, 0.0, 34)
    >>> explain(torch.nn.Linear(4, 3), torch.ones(2, 4), target=7)
    Traceback (most recent call last):
    headwater.errors.InputError: ...
    """
    question = Question(**locals())
    for name in FAMILIES:
        family = import_module(f"headwater.features.{name}")
        if family.recognises(question):
            return family.explain(question)
    raise InputError(
        f"a model of type {type(model).__module__}.{type(model).__name__}",
        "a torch module, a scikit-learn, XGBoost, LightGBM or CatBoost estimator, a transformers model with its tokenizer, or a function",
        "pass a function from an array (n, features) to (n,) or (n, outputs): it is explained by evaluating it along the path",
    )
