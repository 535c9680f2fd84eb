"""Models and tables from files: what needs no pickle, since a pickle runs whatever code it holds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.cli import asking
from headwater.errors import InputError, MissingExtra
from headwater.features import tables
from headwater.features.question import Question
from headwater.features.trees import forest_of, recognises
from headwater.store import bytes_hash

TABLES = (".npy", ".npz", ".csv", ".tsv", ".parquet")
NAMED = ("X", "x", "inputs", "data")  # what the inputs are called in an .npz that holds several arrays


# ---- tables ---------------------------------------------------------------------------------------------------------------------


def table(path: Path) -> Any:
    """The array or the frame that a file holds. Raises InputError, MissingExtra."""
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise InputError(f"{path} as a table", f"a file ending in {', '.join(TABLES)}", "save it as one of these: numpy.save('x.npy', x)")
    if not path.is_file():
        raise InputError(f"{path} is not a file", "a table", "check the path")
    try:
        return _array(path) if kind in (".npy", ".npz") else _frame(path, kind)
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({str(error).splitlines()[0]})", f"a whole {kind} file without pickled objects", "write it again") from error


def _array(path: Path) -> np.ndarray:
    held = np.load(path, allow_pickle=False)
    if isinstance(held, np.ndarray):
        return held
    with held:
        names = list(held)
        name = names[0] if len(names) == 1 else next((name for name in NAMED if name in names), None)
        if name is None:
            raise InputError(f"{path} with the arrays {', '.join(names)}", f"one array, or one called {', '.join(NAMED)}", "numpy.savez('x.npz', X=x)")
        return held[name]


def _frame(path: Path, kind: str) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra(f"{path} without the library pandas", "pandas", "pip install headwater[frames], or give the table as .npy") from error
    if kind == ".parquet":
        return pandas.read_parquet(path)
    return pandas.read_csv(path, sep="\t" if kind == ".tsv" else ",")


# ---- models ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """A model from a file. ``inputs``: what the file gives to explain, or None. ``settings``: further arguments of ``hw.explain`` from it."""

    file: Path
    model: Any
    inputs: Any = None
    settings: dict[str, Any] = field(default_factory=dict)

    def inputs_or(self, data: Path | None) -> Any:
        """The table of ``data``, or what the file gives. Raises InputError where there is neither."""
        if data is not None:
            return table(data)
        if self.inputs is None:
            raise InputError(f"{self.file} and nothing to explain", "its inputs", "add --data TABLE.csv (or .npy), or a function inputs() to a FILE.py")
        return self.inputs

    def fitting(self, data: Any) -> tuple[Any, tuple[str, ...], tuple[str, ...] | None]:
        """The data as the model takes them, what was done to them in sentences, and the names of columns where the data lost them."""
        if isinstance(self.model, nn.Module) and (tables.is_frame(data) or isinstance(data, np.ndarray)):
            values = torch.from_numpy(np.array(tables.numbers(data) if tables.is_frame(data) or data.dtype.kind == "f" else data))
            dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
            return values.to(dtype) if values.is_floating_point() else values, (), tables.column_names(data)
        if not tables.is_frame(data) or not recognises(Question(self.model, data)):
            return data, (), None
        forest, columns = forest_of(self.model), list(map(str, data.columns))
        said: tuple[str, ...] = ()
        if forest.names is not None:
            lacking = [name for name in forest.names if name not in columns]
            if lacking:
                raise InputError(f"a table without the columns {', '.join(lacking[:5])}", f"the {forest.features} that the model was fitted on", "name them as then")
            left = [name for name in columns if name not in forest.names]
            said = (f"Left out, as no feature of the model: {', '.join(left)}.",) if left else ()
            data, columns = data[list(forest.names)], list(forest.names)
        elif len(columns) != forest.features:
            given = f"a table of {len(columns)} columns, for a model that knows no names of columns"
            raise InputError(given, f"the {forest.features} columns that it was fitted on, in that order", "leave the others out of the table")
        return (tables.numbers(data), said, tuple(columns)) if forest.encode is None else (data, said, None)

    def rows(self, queries: str, count: int) -> np.ndarray:
        """The rows that ``--queries`` names."""
        word = queries.strip().lower()
        if word in ("wrong", "worst"):
            raise InputError(f"--queries {word} with a model from a file", "numbers of rows, or all", "labels are known of a run only: headwater explain RUN")
        return np.arange(count) if word == "all" else asking.ranges(queries, count)


def model_of(path: Path) -> Found:
    """The model of a file. Raises InputError for a kind that is not read, MissingExtra, and what the file's own code raises."""
    kind = path.suffix.lower()
    if kind not in READERS:
        pickled = kind in (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin", ".safetensors")
        mend = "write a FILE.py whose functions model() and inputs() give them, and pass that" if pickled else "save it as one of these, or write such a FILE.py"
        raise InputError(f"{path} as a model", f"XGBoost .json or .ubj, LightGBM .txt, CatBoost .cbm, or a FILE.py with a function model(){WEIGHTS * pickled}", mend)
    if not path.is_file():
        raise InputError(f"{path} is not a file", "a model", "check the path")
    return READERS[kind](path)


WEIGHTS = "; pickles are not read, and weights alone are no model"


def _library(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"{path} without the library {name}", name, f"pip install {name}") from error


def _broken(path: Path, library: str, error: Exception) -> InputError:
    return InputError(f"{path}, which {library} cannot read ({str(error).strip().splitlines()[-1][:200]})", f"a model saved by {library}", "check the path")


def _xgboost(path: Path) -> Found:
    xgboost = _library(path, "xgboost")
    try:
        return Found(path, xgboost.Booster(model_file=str(path)))
    except (xgboost.core.XGBoostError, ValueError) as error:
        raise _broken(path, "XGBoost", error) from error


def _lightgbm(path: Path) -> Found:
    lightgbm = _library(path, "lightgbm")
    if not path.read_text(errors="replace").startswith("tree"):  # the library prints and goes on
        raise _broken(path, "LightGBM", ValueError("it does not begin as its model files do"))
    try:
        return Found(path, lightgbm.Booster(model_file=str(path)))
    except lightgbm.basic.LightGBMError as error:
        raise _broken(path, "LightGBM", error) from error


def _catboost(path: Path) -> Found:
    catboost = _library(path, "catboost")
    try:
        return Found(path, catboost.CatBoost().load_model(str(path)))
    except catboost.CatBoostError as error:
        raise _broken(path, "CatBoost", error) from error


def _python(path: Path) -> Found:
    """A file with ``model()``, and perhaps ``inputs()`` and ``settings()``. It is run as a module of its own."""
    path = path.resolve()
    name = f"headwater_explained_{path.stem}_{bytes_hash(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported by it
    try:
        spec.loader.exec_module(module)
        made = {part: getattr(module, part)() if callable(getattr(module, part, None)) else None for part in ("model", "inputs", "settings")}
    finally:
        sys.path.remove(str(path.parent))
    if made["model"] is None:
        raise InputError(f"{path} gives no model", "a function model() that returns it", "def model(): ...; and def inputs(): ... for what to explain")
    settings = made["settings"] or {}
    if not isinstance(settings, Mapping):
        raise InputError(f"settings() of {path} gives a {type(settings).__name__}", "a dict of arguments of hw.explain", "return dict(tokenizer=...), say")
    return Found(path, made["model"], made["inputs"], dict(settings))


READERS: dict[str, Callable[[Path], Found]] = {".json": _xgboost, ".ubj": _xgboost, ".txt": _lightgbm, ".cbm": _catboost, ".py": _python}


def predicted(model: Any, inputs: Any) -> Any:
    """The class that a model predicts for each input; None for a model with one output and no classes."""
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return _largest(model.eval()(*inputs) if isinstance(inputs, tuple) else model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
    if recognises(Question(model, inputs)):
        forest = forest_of(model)
        margins = forest.raw(forest.read(tables.numbers(inputs if forest.encode is None else forest.encode(inputs))))
        best = (margins[:, 0] > 0).astype(int) if margins.shape[1] == 1 else margins.argmax(1)
        if forest.classes is None:
            return None if margins.shape[1] == 1 else best
        return np.array(forest.classes)[best]
    if hasattr(model, "classes_"):
        return np.asarray(model.predict(inputs))
    return None if hasattr(model, "predict") else _largest(torch.as_tensor(np.asarray(model(inputs))))


def _largest(output: Any) -> Any:
    found = output if isinstance(output, torch.Tensor) else output.logits
    return None if found.ndim == 1 or found.shape[-1] == 1 else found.argmax(-1)
