"""Exact attributions of tree ensembles beside treeig and shap, in one run: prints times per 1,000 rows, ratios, and how far the answers agree.

    python benchmarks/explain_trees.py                     one thread and two, each in a fresh process: about three minutes
    python benchmarks/explain_trees.py --tiny              in miniature, to see that it works: its times mean nothing

Same model, same rows, one baseline (the mean of the data); the best of alternated repeats,
which a busy machine disturbs least. Reading the model (headwater's arrays, treeig's and
shap's explainers) is timed apart: "ready". "walk" is headwater's counterpart of the peers' calls, "explain" the whole of ``hw.explain``, reading
the model and checking the sum against the forest's own prediction included. shap's interventional TreeExplainer has one background row and
answers another question (the Shapley value, not the path's); on binary data with one baseline the two coincide, and the last table compares them there.
shap runs on one thread whatever it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

MODELS = ("GBR 200 x depth 4", "RF 50, full depth", "XGBoost 500 x 6", "LightGBM 500 x 31")


def grown(name: str, X: np.ndarray, y: np.ndarray, tiny: bool) -> Any:
    """One of MODELS, fitted."""
    trees = 20 if tiny else None
    if name.startswith("GBR"):
        from sklearn.ensemble import GradientBoostingRegressor

        return GradientBoostingRegressor(n_estimators=trees or 200, max_depth=4, random_state=0).fit(X, y)
    if name.startswith("RF"):
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor(trees or 50, random_state=0).fit(X, y)
    if name.startswith("XGB"):
        import xgboost

        return xgboost.XGBRegressor(n_estimators=trees or 500, max_depth=6, learning_rate=0.1, n_jobs=1).fit(X, y)
    import lightgbm

    return lightgbm.LGBMRegressor(n_estimators=trees or 500, num_leaves=31, verbose=-1, n_jobs=1).fit(X, y)


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least wall seconds of each call, taken in turn; each is called once before, to compile."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in taken.items()}


def contest(name: str, tiny: bool, repeats: int) -> dict[str, Any]:
    """Times and answers for one model."""
    import shap
    import treeig
    from sklearn.datasets import make_friedman1

    import headwater as hw
    from headwater.features import trees
    from headwater.features.trees import walk

    X, y = make_friedman1(300 if tiny else 6000, 20, noise=1.0, random_state=0)
    X = X.astype(np.float32).astype(float)
    b = X.mean(0).astype(np.float32).astype(float)
    model = grown(name, X, y, tiny)
    rows = X[: 50 if tiny else 1000]
    # shap takes seconds per thousand rows where trees are deep: fewer rows there, scaled.
    few = rows[: max(1, len(rows) // (10 if name.startswith("RF") else 1))]
    ready: dict[str, float] = {}

    def prepared(who: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        ready[who] = time.perf_counter() - start
        return made

    forest = trees.forest_of(model)  # libraries are imported once, before the clocks
    forest, packed = prepared("headwater", lambda: ((f := trees.forest_of(model)), f.packed(np.ones(1))))
    theirs = prepared("treeig", lambda: treeig.TreeIG(model, baseline=b))
    shapley = prepared("shap", lambda: shap.TreeExplainer(model, b[None], feature_perturbation="interventional"))
    point = forest.read(b)[None, None]

    def walked() -> np.ndarray:
        return walk.attributions(packed, forest.read(rows), point, np.ones(1), False)[0]

    calls = {
        "walk": walked,
        "treeig": lambda: theirs.attribute(rows),
        "explain": lambda: hw.explain(model, rows, baseline=b, progress=False),
        "shap": lambda: shapley.shap_values(few, check_additivity=False),
    }
    times = seconds(calls, repeats)
    times["shap"] *= len(rows) / len(few)
    mine, other = walked(), theirs.attribute(rows)
    explained = hw.explain(model, rows, baseline=b, progress=False)
    return {
        "name": name,
        "nodes": len(forest.left),
        "ms": {who: 1e6 * spent / len(rows) for who, spent in times.items()},
        "ready": {who: 1e3 * spent for who, spent in ready.items()},
        "treeig gap": float(np.abs(mine - other).max()),
        "door gap": float(np.abs(mine - explained.values).max()),
        "residual": float(np.abs(explained.residual).max()),
        "largest": float(np.abs(mine).max()),
    }


def binary(tiny: bool) -> list[dict[str, Any]]:
    """On binary data: headwater against shap, which must agree, and treeig, which credits ties by their order."""
    import shap
    import treeig

    import headwater as hw

    rng = np.random.default_rng(0)
    B = rng.integers(0, 2, (2000, 12)).astype(float)
    y = B[:, 0] * B[:, 1] + B[:, 2] * B[:, 3] * B[:, 4] - B[:, 5] + B[:, 6] * (B[:, 7] - B[:, 8]) + 0.1 * rng.normal(size=2000)
    found = []
    for name in MODELS:
        model = grown(name, B, y, True)
        b = 1 - B[0]
        mine = hw.explain(model, B[:100], baseline=b, progress=False).values
        theirs = treeig.TreeIG(model, baseline=b).attribute(B[:100])
        shapley = shap.TreeExplainer(model, b[None], feature_perturbation="interventional").shap_values(B[:100], check_additivity=False)
        found.append({"name": name.split()[0], "shap": float(np.abs(mine - shapley).max()), "treeig": float(np.abs(theirs - shapley).max())})
    return found


def shown(threads: int, results: list[dict[str, Any]]) -> str:
    """A table."""
    lines = [
        f"### {threads} thread{'s' * (threads > 1)}: milliseconds per 1,000 rows",
        "",
        "| model | nodes | walk | treeig | shap | treeig / walk | shap / walk | whole explain | ready: headwater, treeig, shap (ms) | largest gap to treeig | residual |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ms, ready = r["ms"], r["ready"]
        cells = [r["name"], f"{r['nodes']:,}", *(f"{ms[who]:.1f}" for who in ("walk", "treeig", "shap")), *(f"{ms[who] / ms['walk']:.1f}" for who in ("treeig", "shap"))]
        cells += [f"{ms['explain']:.1f}", ", ".join(f"{spent:.0f}" for spent in ready.values()), f"{r['treeig gap']:.1e} of {r['largest']:.2f}", f"{r['residual']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=list(range(len(MODELS))), type=int, help="places in " + ", ".join(MODELS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.one:
        print(json.dumps(binary(given.tiny) if given.one == "binary" else contest(given.one, given.tiny, given.repeats)))
        return
    for threads in (1, 2):
        results = [fresh(MODELS[k], threads, given) for k in given.models]
        print(shown(threads, results) + "\n", flush=True)
    print("### Binary data, 12 columns: largest distance from shap's interventional values\n\n| model | headwater | treeig |\n|---|---|---|")
    for r in fresh("binary", 1, given):
        print(f"| {r['name']} | {r['shap']:.1e} | {r['treeig']:.1e} |")
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {given.repeats} repeats{', in miniature' * given.tiny}.")


def fresh(part: str, threads: int, given: argparse.Namespace) -> Any:
    """What a new process with so many threads finds."""
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, __file__, "--one", part, "--repeats", str(given.repeats), *(["--tiny"] if given.tiny else [])]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
