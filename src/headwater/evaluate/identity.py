"""What makes an experiment this experiment: the facts that a bank of retrained models is only valid for."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headwater.tasks.batches import Examples, fingerprint


def identity(experiment: Any, measure: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Plain JSON facts: the data's fingerprints and sizes, the task, the model's parameters, and digests of the training code.

    The digest of a function covers its code without comments and docstrings, the plain constants it reads from its module, its
    bound arguments, and the functions of the same module that it calls. It cannot see further, say into a library of yours.
    """
    train, test = Examples(experiment.train, experiment.task.collate), Examples(experiment.test, experiment.task.collate)
    facts = {
        "train": {"examples": len(train), "fingerprint": fingerprint(train)},
        "test": {"examples": len(test), "fingerprint": fingerprint(test)},
        "task": experiment.task.describe(),
        "model": _shapes(experiment.build),
        "code": {"build": code_digest(experiment.build), "fit": code_digest(experiment.fit)},
        "measure": "task" if measure is None else code_digest(measure),
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


def code_digest(function: Any) -> str:
    """A short hash of what a function does, as far as its source and its constants tell (see :func:`identity`)."""
    return hashlib.blake2b("\n".join(_traits(function, set())).encode(), digest_size=8).hexdigest()


def _traits(function: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield f"partial {_plain(function.args)} {_plain(function.keywords)}"
        yield from _traits(function.func, seen)
        return
    if inspect.ismethod(function):
        yield from _plain(vars(function.__self__)) if hasattr(function.__self__, "__dict__") else ()
        function = function.__func__
    if id(function) in seen:
        return
    seen.add(id(function))
    yield _source(function)
    if inspect.isfunction(function):
        yield from _surroundings(function, seen)
    elif not inspect.isclass(function) and hasattr(function, "__dict__"):
        yield from _plain(vars(function))
        yield from _traits(type(function).__call__, seen)


def _surroundings(function: Any, seen: set[int]) -> Iterator[str]:
    """Constants and functions that a function reads from its module and its closure, and its defaults."""
    reads = inspect.getclosurevars(function)
    for name, value in sorted({**reads.globals, **reads.nonlocals}.items()):
        yield from (f"{name}={text}" for text in _plain(value))
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == function.__module__:
            yield from _traits(value, seen)
    yield from _plain((function.__defaults__, function.__kwdefaults__))


def _plain(value: Any) -> list[str]:
    """``[repr(value)]`` where it is made of numbers, strings and the like; else nothing (an address in a repr would change every time)."""
    if isinstance(value, tuple | list):
        return [text for item in value for text in _plain(item)]
    if isinstance(value, dict):
        return [f"{key}={text}" for key, item in value.items() for text in _plain(item)]
    return [repr(value)] if isinstance(value, str | int | float | bool | type(None)) else []


def _source(function: Any) -> str:
    """The code without comments, layout and docstrings; the qualified name where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built in, typed in, or a lambda in the middle of an expression
        code = getattr(function, "__code__", None)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{name} {code.co_code.hex()} {_plain(code.co_consts)}" if code else name
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
