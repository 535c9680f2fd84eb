"""The house itself: which names the door shows, which way knowledge flows, and mistakes that no linter reports."""

import ast
import contextlib
import inspect
import io
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

import headwater
from headwater import errors

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("src", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SOURCE = [path for path in FILES if path.is_relative_to(ROOT / "src")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

DOOR = [
    "Accumulator",
    "CheckpointEnsemble",
    "DAS",
    "DTrak",
    "Datamodel",
    "Dense",
    "Diagonal",
    "DiffusionReTrac",
    "DiffusionTracIn",
    "DropoutEnsemble",
    "EKFAC",
    "Ensemble",
    "Experiment",
    "FeatureScores",
    "GradCos",
    "GradDot",
    "HeadwaterError",
    "Index",
    "Influence",
    "InteractionScores",
    "JourneyTrak",
    "KNNShapley",
    "LoGra",
    "LoraEnsemble",
    "Query",
    "Recorder",
    "Refine",
    "Representations",
    "Run",
    "Smooth",
    "Source",
    "Summary",
    "TracIn",
    "TrainingScores",
    "Trak",
    "Unrolled",
    "audit",
    "baselines",
    "compare_models",
    "data",
    "errors",
    "evaluate",
    "explain",
    "floors",
    "index",
    "interactions",
    "load",
    "paths",
    "projections",
    "quadrature",
    "regions",
    "self_influence",
    "summarize",
    "targets",
    "tasks",
    "trace",
    "weigh",
]

# Only the call that needs one of these may import it: they are slow to load, or not installed at all.
OPTIONAL = ["catboost", "datasets", "lightgbm", "numba", "matplotlib", "pandas", "peft", "pyarrow", "ray", "sklearn", "transformers", "xgboost"]

# What a method or a curvature does for the rooms above it, not for the user: written down once, in the protocols Method and Estimate.
BETWEEN_ROOMS = {"plan", "fit", "passes", "tensors", "rebuild", "parts", "combine"}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


# ---- the door


def test_the_door_shows_exactly_these_names():
    assert sorted(headwater.__all__, key=lambda name: (name.islower(), name)) == sorted(DOOR, key=lambda name: (name.islower(), name))


@pytest.mark.parametrize("name", DOOR)
def test_every_name_of_the_door_is_documented(name):
    thing = getattr(headwater, name)
    text = (vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__) or ""  # a class could inherit its parent's
    assert len(text.split()) >= 5, f"headwater.{name} has no docstring of its own"
    assert not text.startswith(f"{name}("), f"headwater.{name} has only the signature that dataclass writes"


@pytest.mark.parametrize("name", [name for name in DOOR if inspect.isclass(getattr(headwater, name))])
def test_every_public_method_of_the_door_is_documented(name):
    kind = getattr(headwater, name)
    public = {member: value for member, value in vars(kind).items() if not member.startswith("_") and member not in BETWEEN_ROOMS}
    bare = [member for member, value in public.items() if (inspect.isroutine(value) or isinstance(value, property)) and not inspect.getdoc(value)]
    assert not bare, f"headwater.{name} has undocumented methods: {bare}"


def test_the_version_is_the_one_of_the_project_file():
    assert headwater.__version__ == PROJECT["project"]["version"]


def test_importing_headwater_imports_no_optional_library():
    use = "import sys, headwater, headwater.report; [getattr(headwater, name) for name in headwater.__all__]"  # the door may load lazily
    code = f"{use}; print([m for m in {OPTIONAL} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "[]"


# ---- the direction of knowledge


def test_the_import_contracts_of_the_project_file_hold():
    from importlinter.cli import lint_imports

    with contextlib.redirect_stdout(io.StringIO()) as report:
        status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, report.getvalue()


# ---- what every file has


@each_file
def test_every_module_begins_by_saying_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"


def test_the_tree_in_errors_lists_every_error_under_its_parent():
    drawn, open_branches = {}, {}
    for line in (errors.__doc__ or "").splitlines():
        if "──" in line:
            branch, _, rest = line.partition("── ")
            open_branches[len(branch)] = name = rest.split()[0]
            drawn[name] = open_branches.get(max((depth for depth in open_branches if depth < len(branch)), default=None), "HeadwaterError")
    defined = {name: kind.__bases__[0].__name__ for name, kind in vars(errors).items() if inspect.isclass(kind) and name != "HeadwaterError"}
    assert drawn == defined


# ---- checks that check nothing


def silent_lines(source):
    """Lines that look like a check or a message and do nothing: a comparison without ``assert``, a string after an assertion."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for before, statement in zip([None, *body], body, strict=False) if isinstance(body, list) else ():
            if not isinstance(statement, ast.Expr):
                continue
            value = statement.value
            name = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
            comparison = name in {"allclose", "array_equal", "equal", "isclose", "check_equal"}
            if comparison or (isinstance(before, ast.Assert) and isinstance(value, ast.Constant)):
                yield statement.lineno


@each_file
def test_no_check_is_thrown_away(path):
    assert list(silent_lines(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.allclose(a, b)\nassert torch.allclose(a, b)", [1]),
        ("def test():\n    x = f(y)\n    np.array_equal(x, y)", [3]),
        ("assert x, 'first half '\n'second half'", [2]),
        ('def f():\n    """Text."""\n    np.testing.assert_allclose(x, y)', []),
    ],
)
def test_the_search_for_such_lines_finds_known_ones(source, lines):
    assert list(silent_lines(source)) == lines


def unreachable(source):
    """Lines that follow a statement which never comes back: what an edit left behind."""
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, part, None) for part in ("body", "orelse", "finalbody")):
            for before, statement in pairwise(body) if isinstance(body, list) else ():
                if isinstance(before, ast.Return | ast.Raise | ast.Continue | ast.Break):
                    yield statement.lineno


@each_file
def test_nothing_follows_a_return(path):
    assert list(unreachable(path.read_text())) == []


def test_the_search_for_what_follows_a_return_finds_it():
    assert list(unreachable("def f(x):\n    if x:\n        return 1\n        x = 2\n    raise ValueError\n    x = 3")) == [6, 4]


# ---- disk is a format, not an object graph


PICKLERS = {"torch.save", "pickle.dump", "pickle.load", "joblib.dump", "joblib.load", "torch.load"}


def pickles(source):
    """Lines that would write or read a pickle in a file; ``torch.load(weights_only=True)``, which reads tensors alone, may."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            if flags.get("allow_pickle", "False") != "False" or (name in PICKLERS and not (name == "torch.load" and flags.get("weights_only") == "True")):
                yield node.lineno


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_holds_a_pickle(path):
    assert list(pickles(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.save(x, p)", True),
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=False)", True),
        ("torch.load(p, weights_only=True)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("np.load(p, allow_pickle=False)", False),
        ("pickle.dump(x, f)", True),
        ("pickle.dumps(x)", False),
    ],
)
def test_the_search_for_pickles_finds_known_ones(source, found):
    assert bool(list(pickles(source))) == found
