"""Scores of every structure, complete by construction, for the tests of this room."""

import numpy as np

from headwater.result import FeatureScores
from headwater.result.arrays import leaves, rebuilt


def scores(values, seed=0, gap=0.01, **changes):
    """Scores whose values sum to the change of output and the gap."""
    rng = np.random.default_rng(seed)
    n = len(leaves(values)[0])
    total = sum(array.reshape(n, -1).sum(1) for array in leaves(values))
    base, residual = rng.normal(size=n), gap * rng.normal(size=n)
    given = {"method": "by hand", "target": "output 0", "baseline": "zeros", **changes}
    return FeatureScores(values, residual, rng.integers(1, 99, n), base + total - residual, base, **given)


def like(values, seed, positive=False):
    """Other random numbers in the same structure."""
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=array.shape) for array in leaves(values)]
    return rebuilt(values, [np.abs(a) if positive else a for a in made])


def random(*shape, seed=0):
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


TOKENS = (("[CLS]", "not", "un", "##bear", "##able", "[SEP]"), ("[CLS]", "good", "[SEP]"))


def text():
    """Two texts, the second padded, with zeros on the padding."""
    values = random(2, 6)
    values[1, 3:] = 0
    return scores(values, kind="text", tokens=TOKENS, stderr=np.abs(values) / 10)


def every_structure():
    """One of each form in which inputs come, with everything that scores can have."""
    table, image = random(5, 4), random(3, 1, 9, 9, seed=1)
    several, named = (random(4, 3), random(4, 2, 30)), {"camera": random(2, 3, 16, 16), "state": random(2, 5)}
    full = {"converged": np.array([True, False, True, True, False]), "feature_names": ("a", "b", "c", "d"), "example_names": tuple("vwxyz")}
    more = {"notes": ("a note", "another"), "provenance": {"seconds": 1.5, "rule": "gauss"}, "kind": "table"}
    return {
        "table": scores(table, stderr=like(table, 1, positive=True), inputs=like(table, 2), reference=like(table, 3), **full, **more),
        "image": scores(image, inputs=like(image, 2), reference=np.zeros_like(image), kind="image"),
        "text": text(),
        "series": scores(random(2, 3, 50), kind="series", inputs=random(2, 3, 50, seed=5)),
        "array": scores(random(2, 6, 5, 4, 3)),
        "one number": scores(random(4)),
        "tuple": scores(several, stderr=like(several, 1, positive=True), inputs=like(several, 2)),
        "dict": scores(named, inputs=like(named, 2), reference=like(named, 3)),
    }
