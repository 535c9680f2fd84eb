"""The rule against the path taken literally (tests/features/trees/reference.py): continuous, integer, binary and decimal data, values on
thresholds, both predicates, missing values, categories, margins and probabilities; and the laws that hold for any model."""

import numpy as np
import pytest

import headwater as hw
from headwater.features import trees
from headwater.features.trees import discrete, walk
from headwater.features.trees.forest import CATEGORY, DEFAULT_FIRST, NAN_IS_MISSING, Forest, Link, bitset, joined
from tests.features.trees.reference import along_the_path, interventional

P = 5


def grown(rng, depth, thresholds, outputs=1, category=None):
    """A random tree with cuts drawn from ``thresholds``; column ``category`` is asked for sets instead. Returns the tree; sets go to ``rng.sets``."""
    left, right, feature, threshold, value, kinds = [], [], [], [], [], []

    def grow(level):
        place = len(left)
        for column in (left, right, feature, threshold, value, kinds):
            column.append(None)
        if level == depth or (level > 1 and rng.random() < 0.15):
            row = (-1, -1, -1, 0.0, rng.normal(size=outputs), 0)
        else:
            f = int(rng.integers(P))
            way = NAN_IS_MISSING | (DEFAULT_FIRST if rng.random() < 0.5 else 0)
            cut = float(rng.choice(thresholds))
            if f == category:
                cut, way = float(len(SETS)), way | CATEGORY
                SETS.append(bitset(rng.permutation(6)[:3]))
            row = (grow(level + 1), grow(level + 1), f, cut, np.zeros(outputs), way)
        for column, v in zip((left, right, feature, threshold, value, kinds), row, strict=True):
            column[place] = v
        return place

    grow(0)
    return {k: np.array(v) for k, v in zip(("left", "right", "feature", "threshold", "value", "kinds"), (left, right, feature, threshold, value, kinds), strict=True)}


SETS = []


def forest(seed, thresholds, trees=6, depth=4, outputs=1, per_tree=False, category=None, **facts):
    """A random forest; per_tree: each tree adds to one output."""
    rng = np.random.default_rng(seed)
    SETS.clear()
    parts = [grown(rng, depth, thresholds, 1 if per_tree else outputs, category) for _ in range(trees)]
    categorical = None if category is None else np.arange(P) == category
    output = np.arange(trees) % outputs if per_tree else None
    return joined(
        parts, output=output, base=np.full(outputs, 0.25), features=P, library="by hand", sets=tuple(SETS), missing=True, categorical=categorical, **facts
    )  # fmt: skip


def walked(f, x, points, weights=None, shares=(1.0,), levels=None):
    """Attributions of rows x (n, p) against points (K, 1, p), as ``explain`` makes them."""
    weights = np.ones(f.outputs) if weights is None else np.asarray(weights, float)
    linked = "probability" if f.link.kind != "identity" else "margin"
    points = [f.read(p) for p in np.asarray(points, float).reshape(-1, 1, P)]
    return trees._walked(f, f.read(np.asarray(x, float)), points, np.asarray(shares, float), np.tile(weights, (len(x), 1)), linked, levels, None, 4096)


NORMAL = np.round(np.random.default_rng(1).normal(size=60), 3)
DATA = {
    "continuous": (NORMAL, lambda rng, n: rng.normal(size=(n, P))),
    "integers": (np.arange(5) + 0.5, lambda rng, n: rng.integers(0, 6, (n, P)).astype(float)),
    "on thresholds": (np.arange(5.0), lambda rng, n: rng.integers(0, 6, (n, P)).astype(float)),
    "binary": (np.array([0.5]), lambda rng, n: rng.integers(0, 2, (n, P)).astype(float)),
    "decimals": (np.arange(0.05, 1, 0.1), lambda rng, n: rng.integers(0, 11, (n, P)) / 10),
}


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", DATA)
def test_the_rule_is_the_path_taken_literally(kind, single):
    cuts, draw = DATA[kind]
    rng = np.random.default_rng(7)
    for seed in range(4):
        f = forest(seed, cuts, single=single)
        x, b = draw(rng, 12), draw(rng, 1)
        phi = walked(f, x, b).values
        expected = [along_the_path(f, row, f.read(b)[0], lambda m: m[0]) for row in f.read(x)]
        np.testing.assert_allclose(phi, expected, atol=1e-12)
        np.testing.assert_allclose(phi.sum(1), (f.raw(f.read(x)) - f.raw(f.read(b)))[:, 0], atol=1e-12)


def test_missing_values_and_categories_switch_halfway():
    rng = np.random.default_rng(3)
    for seed in range(6):
        f = forest(seed, np.arange(5) + 0.5, category=2)
        x, b = rng.integers(0, 6, (15, P)).astype(float), rng.integers(0, 6, (1, P)).astype(float)
        x[rng.random(x.shape) < 0.3] = np.nan
        b[0, seed % P] = np.nan
        phi = walked(f, x, b).values
        np.testing.assert_allclose(phi, [along_the_path(f, row, b[0], lambda m: m[0]) for row in x], atol=1e-12)
        np.testing.assert_allclose(phi.sum(1), (f.raw(x) - f.raw(b))[:, 0], atol=1e-12)


def test_on_categories_alone_it_is_the_baseline_shapley_value():
    rng = np.random.default_rng(4)
    f = forest(0, np.array([0.5]), category=2, depth=6, trees=10)
    x, b = rng.integers(0, 2, (10, P)).astype(float), rng.integers(0, 2, P).astype(float)
    x[:, 2], b[2] = rng.integers(0, 6, 10), 5
    x[rng.random(x.shape) < 0.2] = np.nan
    np.testing.assert_allclose(walked(f, x, b).values, [interventional(f, row, b, lambda m: m[0]) for row in x], atol=1e-12)


@pytest.mark.parametrize(("second", "expected"), [(0.5, [0.5, 0.5]), (0.5 + 1e-12, [0.5, 0.5]), (0.5 + 1e-8, [0, 1]), (0.5 - 1e-8, [1, 0])])
def test_of_an_and_the_last_to_come_has_all_and_those_that_come_together_share(second, expected):
    left, right = np.array([1, -1, 3, -1, -1]), np.array([2, -1, 4, -1, -1])
    both = joined(
        [{"left": left, "right": right, "feature": np.array([0, 0, 1, 0, 0]), "threshold": np.array([0.5, 0, second, 0, 0]), "value": np.eye(5)[:, 4:]}],
        output=None, base=np.zeros(1), features=P, library="by hand",
    )  # fmt: skip
    np.testing.assert_allclose(walked(both, np.ones((1, P)), np.zeros(P)).values[0], [*expected, 0, 0, 0], atol=1e-15)


@pytest.mark.parametrize("link", [Link("sigmoid", 1.5), Link("softmax"), Link("exp", 0.5), Link("isolation", 0.2)], ids=lambda link: link.kind)
@pytest.mark.parametrize("kind", ["continuous", "integers", "binary"])
def test_through_a_link_every_corner_is_a_shapley_value(kind, link):
    cuts, draw = DATA[kind]
    rng = np.random.default_rng(5)
    outputs = 3 if link.kind == "softmax" else 1
    f = forest(11, cuts, outputs=outputs, per_tree=kind != "binary", link=link, trees=6, depth=3)
    x, b = draw(rng, 6), draw(rng, 1)
    weights = np.eye(outputs)[0]
    phi = walked(f, x, b, weights).values
    measure = lambda m: float(f.link(m[None])[0] @ weights)  # noqa: E731
    np.testing.assert_allclose(phi, [along_the_path(f, row, b[0], measure) for row in x], atol=1e-12)


def test_a_link_that_changes_nothing_gives_the_plain_rule():
    rng = np.random.default_rng(6)
    f = forest(2, np.arange(5) + 0.5, trees=12, category=1)
    x, b = rng.integers(0, 6, (40, P)).astype(float), rng.integers(0, 6, (1, P)).astype(float)
    phi, corners = walk.linked(f, f.cuts, x, b, np.ones(1), True)
    np.testing.assert_allclose(phi, walked(f, x, b).values, atol=1e-12)
    assert corners == 0


def test_beyond_a_dozen_tied_features_the_diagonal_formula_stands_in_and_says_so(monkeypatch):
    f = forest(3, np.array([0.5]), trees=20, depth=5, link=Link("sigmoid", 0.5))
    x, b = np.ones((2, P)), np.zeros((1, P))
    x[1, :2] = 0
    monkeypatch.setattr(walk, "MOST", 2)
    found = walked(f, x, b)
    gap = f.link(f.raw(x))[:, 0] - f.link(f.raw(b))[:, 0]
    np.testing.assert_allclose(found.values.sum(1), gap, atol=1e-11)
    assert found.diagonal == 2
    np.testing.assert_allclose(found.values[0], diagonal_by_hand(f), atol=1e-9)


def diagonal_by_hand(f):
    """``∫ link'(m(t)) (E[margin | j moved] - E[margin | j not moved]) dt`` with every other feature moved with probability t."""
    corners = (np.arange(2**P)[:, None] >> np.arange(P)) & 1
    margins = f.raw(corners.astype(float))[:, 0]
    nodes, shares = np.polynomial.legendre.leggauss(200)
    phi = np.zeros(P)
    for t, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        odds = np.where(corners == 1, t, 1 - t)
        probability = 1 / (1 + np.exp(-f.link.slope * (odds.prod(1) @ margins)))
        for j in range(P):
            others = np.delete(odds, j, 1).prod(1)
            phi[j] += share * f.link.slope * probability * (1 - probability) * (others * np.where(corners[:, j] == 1, margins, -margins)).sum()
    return phi


def test_the_diagonal_formula_is_the_shapley_value_where_the_link_is_straight(monkeypatch):
    monkeypatch.setattr(walk, "MOST", 1)
    f = forest(4, np.array([0.5]), trees=10, depth=4)
    x, b = np.ones((1, P)), np.zeros((1, P))
    phi, corners = walk.linked(f, f.cuts, x, b, np.ones(1), False)
    assert corners == 1
    np.testing.assert_allclose(phi, walked(f, x, b).values, atol=1e-12)


# ---- laws -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def integers():
    rng = np.random.default_rng(9)
    f = forest(5, np.arange(5) + 0.5, trees=20, outputs=2, per_tree=True)
    return f, rng.integers(0, 6, (150, P)).astype(float), rng.integers(0, 6, (1, P)).astype(float)


def test_what_a_row_gets_does_not_depend_on_its_company(integers):
    f, x, b = integers
    together = walked(f, x, b).values
    np.testing.assert_array_equal(together, np.concatenate([walked(f, x[k : k + 1], b).values for k in range(len(x))]))
    np.testing.assert_array_equal(together[::-1], walked(f, x[::-1], b).values)


def test_the_way_back_has_the_other_sign(integers):
    f, x, b = integers
    back = [walked(f, b, row).values[0] for row in x[:20]]
    np.testing.assert_allclose(walked(f, x[:20], b).values, -np.array(back), atol=1e-13)


def test_outputs_add_up(integers):
    f, x, b = integers
    parts = walked(f, x, b, [1, 0]).values, walked(f, x, b, [0, 1]).values
    np.testing.assert_allclose(walked(f, x, b, [2, -0.5]).values, 2 * parts[0] - 0.5 * parts[1], atol=1e-13)


def test_features_that_do_not_move_or_are_not_asked_get_nothing(integers):
    f, x, b = integers
    values = walked(f, x, b).values
    assert (values[x == b] == 0).all() and (x == b).any()
    unasked = forest(6, np.arange(5) + 0.5)
    unasked.feature[unasked.feature == 3] = 1
    assert (walked(unasked, x, b).values[:, 3] == 0).all()


def test_several_baselines_are_averaged_with_their_weights_and_spread(integers, monkeypatch):
    f, x, _ = integers
    rng = np.random.default_rng(10)
    points = rng.integers(0, 6, (150, P)).astype(float)
    monkeypatch.setattr(walk, "BYTES", 2**12)  # blocks of 25: more than one
    each = np.stack([walked(f, x[:9], b).values for b in points])
    equal = walked(f, x[:9], points, shares=np.full(150, 1 / 150))
    np.testing.assert_allclose(equal.values, each.mean(0), atol=1e-13)
    np.testing.assert_allclose(equal.stderr, each.std(0, ddof=1) / np.sqrt(150), atol=1e-13)
    shares = rng.random(150)
    shares /= shares.sum()
    unequal = walked(f, x[:9], points, shares=shares)
    mean = np.tensordot(shares, each, 1)
    np.testing.assert_allclose(unequal.values, mean, atol=1e-13)
    np.testing.assert_allclose(unequal.stderr, np.sqrt(150 / 149 * np.tensordot(shares**2, (each - mean) ** 2, 1)), atol=1e-13)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_change_nothing(integers, monkeypatch, threads):
    f, x, b = integers
    expected = walked(f, x, b).values
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert walk.threads() <= int(threads)
    np.testing.assert_array_equal(walked(f, x, b).values, expected)


# ---- discrete columns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1e-35, np.nextafter(1.0, 0), 0.3], ids=["LightGBM's", "XGBoost's", "anywhere"])
def test_where_a_library_puts_its_cut_between_levels_does_not_matter(cut):
    rng = np.random.default_rng(12)
    middle = forest(7, np.array([0.5]), trees=15)
    moved = forest(7, np.array([cut]), trees=15)
    x, b = rng.integers(0, 2, (30, P)).astype(float), np.array([[1.0, 0, 1, 0, 1]])
    expected = walked(middle, x, b).values
    levels = "auto" if cut != 0.3 else range(P)
    np.testing.assert_array_equal(walked(moved, x, b, levels=levels).values, expected)
    assert cut == 0.3 or np.abs(walked(moved, x, b).values - expected).max() > 0.1
    np.testing.assert_allclose(expected, [interventional(middle, row, b[0], lambda m: m[0]) for row in x], atol=1e-8)


def test_each_row_decides_for_itself_whether_a_column_is_discrete():
    f = forest(8, np.array([0.0, 1.0, 2.0]))
    x, b = np.full((2, P), 3.0), np.zeros((1, P))
    x[1, 0] = 2.5
    found = walked(f, x, b, levels="auto")
    assert found.moved == {0: 1, 1: 2, 2: 2, 3: 2, 4: 2}
    np.testing.assert_array_equal(found.values[:1], walked(f, x[:1], b, levels="auto").values)


def test_cuts_move_to_the_middle_of_the_levels_that_are_named():
    f = forest(9, np.array([12.0, 30.0]))
    x, b = np.full((1, P), 50.0), np.zeros((1, 1, P))
    (part,) = discrete.parts(f, x, b, {"a": [0, 10, 50], 1: [0, 50]}, list("abcde"))
    for j, expected in ((0, {30.0}), (1, {25.0}), (2, {12.0, 30.0})):
        assert set(part.cuts[(f.feature == j)]) <= expected
    with pytest.raises(hw.errors.InputError, match="the value 50 in column 'a'"):
        discrete.parts(f, x, b, {"a": [0, 10]}, list("abcde"))
    with pytest.raises(hw.errors.InputError, match="the column 'z'"):
        discrete.parts(f, x, b, ["z"], list("abcde"))
    with pytest.raises(hw.errors.InputError, match="discrete=7"):
        discrete.parts(f, x, b, 7, None)


def test_float32_numbers_are_written_as_short_decimals_and_stay_in_order():
    rng = np.random.default_rng(13)
    numbers = np.concatenate([rng.normal(size=5000), 10.0 ** rng.uniform(-37, 37, 5000), np.arange(200) / 10, -np.arange(200) / 100]).astype(np.float32)
    numbers = np.unique(np.concatenate([numbers, np.nextafter(numbers, np.float32(np.inf))]))
    found = trees.forest.decimal(numbers)
    assert (np.diff(found) > 0).all()
    np.testing.assert_array_equal(found.astype(np.float32), numbers)
    assert set(np.arange(200) / 10) <= set(found)


def test_a_forest_is_read_whatever_the_order_of_its_nodes():
    f = forest(10, NORMAL, trees=5, outputs=2)
    order = np.random.default_rng(0).permutation(len(f.left))
    for root in f.roots:  # roots stay where their tree begins
        here = np.flatnonzero(order == root)[0]
        order[here], order[root] = order[root], root
    tree = np.searchsorted(f.roots, np.arange(len(f.left)), side="right") - 1
    order = order[np.argsort(tree[order], kind="stable")]
    for root in f.roots:
        here = np.flatnonzero(order == root)[0]
        order[here], order[root] = order[root], order[here]
    new = np.argsort(order)
    follow = lambda child: np.where(child[order] < 0, -1, new[child[order]])  # noqa: E731
    shuffled = Forest(
        follow(f.left), follow(f.right), f.feature[order], f.threshold[order], f.value[order], None, f.roots, f.base, P, "by hand", kinds=f.how[order], missing=True
    )
    x = np.random.default_rng(1).normal(size=(30, P))
    np.testing.assert_array_equal(shuffled.raw(x), f.raw(x))
    np.testing.assert_allclose(walked(shuffled, x[1:], x[:1]).values, walked(f, x[1:], x[:1]).values, atol=1e-13)
