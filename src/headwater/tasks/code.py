"""What a function of the user's does, as a short hash: so that saved work is never taken for another function's."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import numpy as np
from torch import Tensor, nn

from headwater.tasks.batches import hash_of

WAY = 2
"""Which way of making digests this is: those made in two ways cannot be compared."""
_LIBRARIES = ("torch", "transformers", "peft", "diffusers", "builtins", "typing", "collections")
"""Whose classes are known by their names."""
_INCIDENTAL = {*vars(nn.Module()), "_compiled_call_impl", "_is_torch_compile", "gradient_checkpointing", "_gradient_checkpointing_func", "_is_hf_initialized"}
"""Fields of a module that change nothing of what it computes: torch's own, how it is run, where it is in a life."""
_OF_DIFFUSERS = {"_internal_dict", "_lora_loadable_modules", "_use_default_values"}
_OF_TRANSFORMERS = {"name_or_path", "warnings_issued", "loss_type", "_attn_implementation", "_fsdp_plan", "_tp_plan", "_ep_plan", "_pp_plan"}
_OF_CONFIGS = {"use_cache", "dtype", "torch_dtype", "architectures", "gradient_checkpointing", "attn_implementation"}


def code_digest(function: Any, held: bool = False) -> str:
    """A short hash of what a function does.

    It covers the code without comments and docstrings, the plain constants it reads from its module and its closure, its defaults and
    bound arguments, what the object it is a method of holds, and the functions of the same module that it calls; with ``held`` also
    the tensors, arrays and weights among all these, what modules among them are made of (a criterion and its settings), and the names
    of functions and classes from elsewhere. It cannot see further, say into a library of yours.

    >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 2)
    False
    """
    return hashlib.blake2b("\n".join(_traits(function, set(), held)).encode(), digest_size=8).hexdigest()


def model_digest(model: nn.Module) -> str:
    """A short hash of what a model computes, apart from its weights: the kinds of its modules, their settings, and their code.

    Two models that take the same weights may do different things with them. Library classes are known by their names.

    >>> model_digest(nn.Sequential(nn.Linear(2, 2), nn.Tanh())) == model_digest(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    False
    """
    return hashlib.blake2b("\n".join(_anatomy(model, set())).encode(), digest_size=8).hexdigest()


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What a model computes, for a manifest: its digest; the kind of each module, so that a difference can be named; and by which versions
    and in which way the digest was made, since only digests of the same can be compared. Plain JSON values."""
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    libraries = {type(part).__module__.split(".")[0] for part in model.modules()} & {"transformers", "peft", "diffusers"} | {"torch"}
    versions = {name: str(sys.modules[name].__version__) for name in sorted(libraries)}
    return {"digest": model_digest(model), "kinds": kinds, "made": {"way": WAY, "python": ".".join(platform.python_version_tuple()[:2]), **versions}}


def task_identity(task: Any) -> list[Any]:
    """What gradients and curvature under a task depend on: its settings, and the code and contents of its loss and of its pseudo-losses."""
    return [task.describe(), *(code_digest(function, held=True) for function in (task.loss, task.sampled, task.exact))]


def _traits(function: Any, seen: set[int], held: bool) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield f"partial {_plain(function.args, held)} {_plain(function.keywords, held)}"
        for value in (*function.args, *function.keywords.values()) if held else ():
            yield from _elsewhere(value, seen)
        yield from _traits(function.func, seen, held)
        return
    if inspect.ismethod(function):
        yield from _fields(function.__self__, seen, held)
        function = function.__func__
    if id(function) in seen:
        return
    seen.add(id(function))
    yield _source(function)
    if inspect.isfunction(function):
        yield from _surroundings(function, seen, held)
    elif not inspect.isclass(function) and hasattr(function, "__dict__"):
        yield from _fields(function, seen, held)
        yield from _traits(type(function).__call__, seen, held)


def _anatomy(model: nn.Module, seen: set[int]) -> Iterator[str]:
    """What a module is made of: names, kinds, settings and the user's own code; not its weights, nor whether it is in training mode. A class
    of the user's is known by its code, so that it is the same in the script that defines it and in a file that imports it."""
    for name, part in model.named_modules():
        kind = type(part)
        own = kind.__module__.split(".")[0] not in _LIBRARIES
        yield f"{name}: {kind.__name__ if own else _named(kind)}"
        config = getattr(part, "config", None)
        described = _described(config)
        ignored = _INCIDENTAL | _OF_TRANSFORMERS | _OF_DIFFUSERS if described else _INCIDENTAL
        yield from _fields(_Settings({n: v for n, v in vars(part).items() if n not in ignored}), seen, False)
        yield from _plain({n: v for n, v in described.items() if "name" not in n and "version" not in n and n not in _OF_CONFIGS})
        for base in kind.__mro__:
            if id(base) not in seen and base.__module__.split(".")[0] not in _LIBRARIES:
                seen.add(id(base))
                yield _source(base)
        if kind.forward.__module__.split(".")[0] not in _LIBRARIES:
            yield from _traits(kind.forward, seen, True)


def _described(config: Any) -> dict[str, Any]:
    """The settings in a config of transformers or diffusers (a mapping, whose entries that begin with _ say where it came from)."""
    if hasattr(config, "to_dict"):
        found: dict[str, Any] = config.to_dict()
        return found
    return {name: value for name, value in config.items() if not name.startswith("_")} if isinstance(config, Mapping) else {}


class _Settings:
    """Values as the fields of an object."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _named(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _elsewhere(value: Any, seen: set[int]) -> Iterator[str]:
    """What is called but written elsewhere: functions and classes by their names, modules (a criterion) by what they are made of."""
    if isinstance(value, nn.Module):
        yield from _anatomy(value, seen)
    elif inspect.isclass(value) or inspect.isroutine(value):
        yield _named(value)


def _fields(holder: Any, seen: set[int], held: bool) -> Iterator[str]:
    """What an object holds: its plain values, and the functions among them (a task of plain functions is one)."""
    fields = vars(holder) if hasattr(holder, "__dict__") else {}
    yield from _plain(fields, held)
    for name, value in fields.items():
        if inspect.isfunction(value):
            yield name
            yield from _traits(value, seen, held)
        elif held:
            yield from _elsewhere(value, seen)


def _surroundings(function: Any, seen: set[int], held: bool) -> Iterator[str]:
    """Constants and functions that a function reads from its module and its closure, and its defaults."""
    reads = inspect.getclosurevars(function)
    for name, value in sorted({**reads.globals, **reads.nonlocals}.items()):
        yield from (f"{name}={text}" for text in _plain(value, held))
        if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == function.__module__:
            yield from _traits(value, seen, held)
        elif held and getattr(value, "__module__", "").split(".")[0] != "headwater":
            yield from (f"{name}={text}" for text in _elsewhere(value, seen))
    yield from _plain((function.__defaults__, function.__kwdefaults__), held)


def _plain(value: Any, held: bool = False) -> list[str]:
    """``[repr(value)]`` where it is made of numbers, strings and the like, with ``held`` a hash of tensors, arrays and weights; else
    nothing (an address in a repr would change every time)."""
    if isinstance(value, tuple | list):
        return [text for item in value for text in _plain(item, held)]
    if isinstance(value, dict):
        return [f"{key}={text}" for key, item in value.items() for text in _plain(item, held)]
    if held and isinstance(value, nn.Module):
        return _plain(dict(value.state_dict()), held)
    if held and isinstance(value, Tensor | np.ndarray):
        return [hash_of(value)]
    return [repr(value)] if isinstance(value, str | int | float | bool | type(None)) else []


def _source(function: Any) -> str:
    """The code without comments, layout and docstrings; compiled where its source is not to be had, or does not tell it from its
    neighbours (several lambdas on a line)."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if getattr(function, "__name__", "") == "<lambda>" and code is not None:
        return _compiled(code)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built in, or typed in
        return f"{name} {_compiled(code)}" if code is not None else name
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _compiled(code: CodeType) -> str:
    """Instructions, constants and names of compiled code, and of the code within it."""
    inner = "".join(_compiled(c) for c in code.co_consts if isinstance(c, CodeType))
    return f"{code.co_code.hex()} {_plain(code.co_consts)} {code.co_names} {inner}"
