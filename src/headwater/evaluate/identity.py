"""What makes an experiment this experiment: the facts that a bank of retrained models is only valid for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headwater.tasks.batches import fingerprint
from headwater.tasks.code import code_digest


def identity(experiment: Any, measure: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Plain JSON facts: the data's fingerprints and sizes, the task, the model's parameters, and digests of the training code.

    The digest of a function covers its code without comments and docstrings, the plain constants it reads from its module, its
    bound arguments, and the functions of the same module that it calls. It cannot see further, say into a library of yours.
    """
    train, test = experiment.task.examples(experiment.train), experiment.task.examples(experiment.test)
    facts = {
        "train": {"examples": len(train), "fingerprint": fingerprint(train)},
        "test": {"examples": len(test), "fingerprint": fingerprint(test)},
        "task": {**experiment.task.describe(), "code": code_digest(experiment.task.loss)},
        "model": _shapes(experiment.build),
        "code": {"build": code_digest(experiment.build), "fit": code_digest(experiment.fit)},
        "measure": code_digest(experiment.task.measure if measure is None else measure, held=True),
    }
    return json.loads(json.dumps(facts))  # as it will be read back


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two identities differ, in words: ``train.examples: 50 there, 60 here``."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(k for k in other if k not in one)]:
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield f"{path}: {one} there, {other} here"


def _shapes(build: Callable[[], Any]) -> dict[str, list[int]]:
    with torch.random.fork_rng(devices=[]):
        return {name: list(p.shape) for name, p in build().named_parameters()}
