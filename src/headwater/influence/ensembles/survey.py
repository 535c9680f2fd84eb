"""Where a model drops units, found by running it: which dropout modules it has, how they are called, and what draws by itself.

Dropout that is a module can be replaced by a mask. Dropout inside a function (``F.dropout``, the attention of ``nn.MultiheadAttention``,
``nn.LSTM(dropout=)``) cannot: it is found by running the model once in training mode with all modules replaced, and looking at which
module the state of the random generator moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.capture.capture import Layout, layout
from headwater.errors import InputError
from headwater.influence.ensembles.masks import Site, place
from headwater.tasks.batches import Batch, take, to
from headwater.training import Run, Stage

KINDS: dict[Any, tuple[bool, bool]] = {
    nn.Dropout: (False, False),
    nn.AlphaDropout: (False, True),
    nn.Dropout1d: (True, False),
    nn.Dropout2d: (True, False),
    nn.Dropout3d: (True, False),
    nn.FeatureAlphaDropout: (True, True),
}
"""Each kind of dropout module: whether it drops whole channels, and whether it keeps mean and variance."""
AXES: dict[Any, tuple[int, ...]] = {nn.Dropout1d: (3,), nn.Dropout2d: (3, 4), nn.Dropout3d: (5,)}
"""The axes of a batch that torch takes for one, where it counts them."""
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus)
ACTIVATIONS = (*_RECTIFIERS, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardtanh)
AFTER_ACTIVATIONS = "activations"
_ENOUGH = "hw.DropoutEnsemble(method, insert={'name of a layer': 0.1}), or insert='activations' with rate=0.1: it is then no longer the trained model"


@dataclass(frozen=True)
class Survey:
    """What a model drops: ``sites`` for masks, ``drawing``: modules that draw by themselves in training mode (they stay off), and
    ``silent``: dropout modules that are never called. ``untried``: why the model could not be run in training mode, if it could not."""

    sites: tuple[Site, ...]
    drawing: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    untried: str = ""


def survey(run: Run, rate: float | None, insert: Mapping[str, float] | str | None) -> Survey:
    """Find the sites of a run's model; see :class:`headwater.DropoutEnsemble` for ``rate`` and ``insert``. Raises InputError."""
    model = run.load(run.model(), run.checkpoints[-1])
    sites = [*_modules(model, rate), *_inserted(model, rate, insert)]
    kinds = {site.path: type(model.get_submodule(site.path)) for site in sites}
    calls = _calls(run, model, sites)
    silent = tuple(site.path for site in sites if not calls[site.path])
    drawing, untried = _drawing(run, tuple(sites))
    found = tuple(replace(site, layouts=_layouts(calls[site.path], site, kinds[site.path])) for site in sites if calls[site.path])
    if not found:
        raise InputError(f"a model without dropout modules{_told(drawing, silent)}", "at least one nn.Dropout (or Dropout1d/2d/3d, AlphaDropout) that is called", _ENOUGH)
    if rate is None and all(site.rate == 0 for site in found):
        raise InputError(f"dropout of rate 0 everywhere ({[site.path for site in found]})", "a rate above 0 somewhere", "hw.DropoutEnsemble(method, rate=0.1)")
    return Survey(found, drawing, silent, untried)


def _told(drawing: Sequence[str], silent: Sequence[str]) -> str:
    parts = [f"{list(drawing)} draw inside a function, where no mask can be put"] * bool(drawing) + [f"{list(silent)} are never called"] * bool(silent)
    return f" ({'; '.join(parts)})" if parts else ""


def tell(found: Survey) -> None:
    """Warn of what is left out, and of what is no longer the trained model."""
    if found.untried:
        warnings.warn(f"dropout inside functions was not looked for: the model does not run in training mode on two examples ({found.untried})", stacklevel=2)
    if found.drawing or found.silent:
        warnings.warn(
            f"dropout that masks leave out:{_told(found.drawing, found.silent)}. It stays off, as in eval mode; {len(found.sites)} dropout module(s) are masked.",
            stacklevel=2,
        )
    inserted = [site.path for site in found.sites if site.inserted]
    if inserted:
        warnings.warn(
            f"dropout is inserted after {inserted}, where training had none: the members are no longer the trained model, and their scores those of other functions.",
            stacklevel=2,
        )


def _modules(model: nn.Module, rate: float | None) -> Iterator[Site]:
    for path, module in model.named_modules():
        for kind, (channels, alpha) in KINDS.items():
            if isinstance(module, kind) and type(module).forward is kind.forward and path:
                yield Site(path, float(vars(module)["p"]) if rate is None else rate, channels, alpha)
                break


def _inserted(model: nn.Module, rate: float | None, insert: Mapping[str, float] | str | None) -> Iterator[Site]:
    if insert is None:
        return
    if isinstance(insert, str):
        wanted = {path: float(rate or 0.0) for path, m in model.named_modules() if isinstance(m, ACTIVATIONS) and path}
        if not wanted:
            raise InputError(f"insert={insert!r} for a model without activation modules", "nn.ReLU, nn.GELU and the like as modules", "name layers: insert={'fc1': 0.1}")
    else:
        wanted = {path: float(value) for path, value in insert.items()}
    known = dict(model.named_modules())
    for path, value in wanted.items():
        if path not in known or not path:
            raise InputError(f"insert={{{path!r}: {value}}}: no module of that name", f"names such as {[name for name in known if name][:6]}", "print(run.model())")
        yield Site(path, value, inserted=True)


class _Ear(nn.Module):
    """Stands where a mask will: hears the shapes that come. ``p``: as of the module it stands for, whose rate a model may use by itself."""

    def __init__(self, heard: list[tuple[int, ...]], p: float) -> None:
        super().__init__()
        self.heard, self.p = heard, p

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append(tuple(x.shape))
        return x


def _calls(run: Run, model: nn.Module, sites: Sequence[Site]) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """For each site the shapes of each of its calls in one forward pass of the loss, with one example and with two."""
    heard: dict[str, list[tuple[int, ...]]] = {site.path: [] for site in sites}
    place(model, tuple(sites), lambda site: _Ear(heard[site.path], site.rate))
    found: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {site.path: [] for site in sites}
    for stage in run.stages:
        records = []
        for count in (1, 2):
            with torch.no_grad():
                stage.task.loss(model, _copies(run, stage, count))
            records.append({path: list(shapes) for path, shapes in heard.items()})
            for shapes in heard.values():
                shapes.clear()
        for path, known in found.items():
            if not known:
                one, two = records[0][path], records[1][path]
                found[path] = list(zip(one, two, strict=False)) if len(one) == len(two) else [((), ())]
    return found


def _copies(run: Run, stage: Stage, count: int) -> Batch:
    """A batch of ``count`` times the stage's first example."""
    return take(to(stage.data.batch(range(1)), run.device), torch.zeros(count, dtype=torch.long, device=run.device))


def _layouts(calls: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], site: Site, kind: type[nn.Module]) -> tuple[Layout, ...]:
    for one, _ in calls:
        allowed = next((axes for k, axes in AXES.items() if issubclass(kind, k)), None)
        if not site.inserted and allowed is not None and len(one) not in allowed:
            raise InputError(
                f"{kind.__name__} {site.path!r} that is given {len(one)} axes, {one}",
                f"{' or '.join(map(str, allowed))}: torch takes anything else for a single example, and would drop whole examples of a batch",
                "use nn.Dropout there",
            )
    return tuple(Layout(layout(one, two), len(one)) for one, two in calls)


def _drawing(run: Run, sites: tuple[Site, ...]) -> tuple[tuple[str, ...], str]:
    """The modules that move a random generator in training mode when no dropout module is left; and why that could not be seen."""
    model = place(run.load(run.model(), run.checkpoints[-1]), sites, lambda site: _Ear([], site.rate)).train()
    moved: list[str] = []
    untried = ""
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _listening(model, moved, devices):
        for stage in run.stages:
            try:
                with torch.no_grad():
                    stage.task.loss(model, _copies(run, stage, 2))
            except Exception as error:  # noqa: BLE001 (whatever a model does in training mode: it may want other batches, or return something else)
                untried = f"{type(error).__name__}: {error}"
    return tuple(dict.fromkeys(moved)), untried


@contextmanager
def _listening(model: nn.Module, moved: list[str], devices: list[Any]) -> Iterator[None]:
    """Note the innermost modules during whose forward pass the generators' states move."""
    open_calls: list[list[Any]] = []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    def enter(*_: Any) -> None:
        open_calls.append([states(), False])

    def leave(name: str) -> Any:
        def hook(*_: Any) -> None:
            before, inside = open_calls.pop()
            changed = any(not torch.equal(a, b) for a, b in zip(before, states(), strict=True))
            if changed and not inside:
                moved.append(name or "the model itself")
            if open_calls:
                open_calls[-1][1] = open_calls[-1][1] or changed

        return hook

    handles = [h for name, m in model.named_modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave(name)))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
