"""Reading attributions: whatever is picked, summed or subtracted still adds up to the change of the output."""

import numpy as np
import pytest

import headwater as hw
from headwater.errors import InputError
from headwater.result.arrays import leaves
from headwater.result.groups import OTHERS
from tests.result.making import TOKENS, every_structure, like, random, scores, text

structures = pytest.mark.parametrize("name", list(every_structure()))


def total(e):
    return sum(array.reshape(e.n, -1).sum(1) for array in leaves(e.values))


def complete(e):
    np.testing.assert_allclose(total(e), e.output - e.baseline_output + e.residual, rtol=1e-12, atol=1e-12)


def same(a, b):
    if a is None or b is None or (isinstance(a, str | tuple) and not isinstance(a[0] if a else "", np.ndarray)):
        return a == b
    return type(a) is type(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


# ---- files


@structures
def test_what_is_saved_is_what_is_loaded(tmp_path, name):
    e = every_structure()[name]
    back = hw.load(e.save(tmp_path / "scores"))
    for field in e.__dataclass_fields__:
        given, found = getattr(e, field), getattr(back, field)
        assert given == found if field == "provenance" else same(given, found), field
    assert not isinstance(e.values, dict) or list(back.values) == list(e.values)


# ---- picking


@structures
def test_picking_examples_keeps_everything_that_belongs_to_them(name):
    e = every_structure()[name]
    picked = e.at([1, 0, -1])
    complete(picked)
    for given, found in zip(leaves(e.values), leaves(picked.values), strict=True):
        np.testing.assert_array_equal(found, given[[1, 0, -1]])
    np.testing.assert_array_equal(picked.evaluations, e.evaluations[[1, 0, -1]])
    assert type(picked.values) is type(e.values) and picked.feature_names == e.feature_names and picked.notes == e.notes
    assert picked.tokens == (None if e.tokens is None else (e.tokens[1], e.tokens[0], e.tokens[-1]))
    assert picked.example_names == (None if e.example_names is None else (e.example_names[1], e.example_names[0], e.example_names[-1]))


def test_examples_are_picked_by_number_or_by_yes_and_no():
    e = every_structure()["table"]
    missed = e.at(~e.converged)
    assert missed.example_names == ("w", "z") and not missed.converged.any() and e.at(2).example_names == ("x",)
    for wrong in ([5], [-6], [0.5], [[0]], [True, False]):
        with pytest.raises(InputError, match="examples="):
            e.at(wrong)


@structures
def test_no_examples_are_read_like_any_others(name):
    e = every_structure()[name]
    none = e.at([])
    assert none.n == 0 and len(none.top(2)) == 0 and none.minus(none).n == 0 and "0 examples" in repr(none)
    assert len(none.to_frame()) == 0 and list(none.to_frame().columns) == list(e.to_frame().columns)
    inputs = none.group("inputs")
    assert inputs.values.shape == (0, len(leaves(e.values))) and "<script" not in none._repr_html_()


# ---- the strongest


def test_top_and_bottom_are_the_ends_of_the_order_with_their_names():
    e = every_structure()["table"]
    for i in range(5):
        order = np.sort(e.values[i])
        np.testing.assert_array_equal(e.top(3).scores[i], order[::-1][:3])
        np.testing.assert_array_equal(e.bottom(3).scores[i], order[:3])
        assert [name for name, _ in list(e.top(2))[i]] == ["abcd"[j] for j in e.top(2).indices[i]]
    assert e.top(9).scores.shape == (5, 4) and len(e.top(1)) == 5 and repr(e.top(1)).startswith("v: ")
    with pytest.raises(InputError, match="k=0"):
        e.top(0)


def test_parts_are_named_by_where_they_stand():
    values = np.zeros((1, 3, 9, 9))
    values[0, 2, 4, 7] = 5.0
    assert scores(values).top(1).names == (("channel 2, row 4, column 7",),)
    assert scores(values[:, 2]).top(1).names == (("row 4, column 7",),)
    assert scores(values[:, 2:]).top(1).names == (("row 4, column 7",),)
    assert scores(values, kind="array").top(1).names == (("channel 2, row 4, column 7",),)
    assert text().at(0).top(1).names[0][0] in [f"{token} ({k})" for k, token in enumerate(TOKENS[0])]
    both = scores({"a": np.array([[1.0, 2.0]]), "b": np.array([[9.0, 0.0]])})
    assert both.top(2).names == (("b: feature 0", "a: feature 1"),)


# ---- groups


GROUPINGS = {
    "table": [["x", "y", "x", "y"], {"x": [0, 2], "y": ["b"]}, {"x": [True, False, True, False]}, np.array(["q", "q", "q", "r"])],
    "image": [np.arange(81).reshape(9, 9) // 20, np.arange(3 * 81).reshape(3, 9, 9) % 7, {"left": np.arange(81).reshape(9, 9) % 9 < 4}],
    "text": [[[None, "w", "w", "w", "w", None], [None, "v", None]], ["a", "a", "b", "b", "c", "c"], np.arange(12).reshape(2, 6) // 5],
    "series": [{"early": range(25)}, np.arange(150).reshape(3, 50) // 60],
    "array": [["x", "y", "x"], {"x": [0, 1]}],
    "one number": [["all"]],
    "tuple": ["inputs", (["x", "y", "x"], {"x": range(30)})],
    "dict": ["inputs", {"camera": np.zeros((16, 16), int), "state": ["s"] * 5}],
}


@pytest.mark.parametrize(("name", "k"), [(name, k) for name, groups in GROUPINGS.items() for k in range(len(groups))])
def test_groups_sum_to_the_whole(name, k):
    e = every_structure()[name]
    g = e.group(GROUPINGS[name][k])
    complete(g)
    assert g.values.shape == (e.n, len(g.feature_names)) and g.kind == "table" and g.output is e.output
    if e.stderr is not None:
        np.testing.assert_allclose(g.stderr.sum(1), sum(a.reshape(e.n, -1).sum(1) for a in leaves(e.stderr)))
        assert any("upper bounds" in note for note in g.notes)
    else:
        assert g.stderr is None and not any("upper bounds" in note for note in g.notes)


def test_each_group_is_the_sum_of_its_parts():
    e = every_structure()["table"]
    v = e.values
    g = e.group(["x", "y", "x", "z"])
    assert g.feature_names == ("x", "y", "z")
    np.testing.assert_allclose(g.values, np.stack([v[:, 0] + v[:, 2], v[:, 1], v[:, 3]], 1))
    g = e.group({"p": ["d", "a"], "q": [1]})
    assert g.feature_names == ("p", "q", OTHERS)
    np.testing.assert_allclose(g.values, np.stack([v[:, 3] + v[:, 0], v[:, 1], v[:, 2]], 1))
    image = random(2, 3, 9, 9)
    labels = np.arange(81).reshape(9, 9) // 27
    g = scores(image).group(labels)
    assert g.feature_names == ("0", "1", "2")
    np.testing.assert_allclose(g.values[:, 1], image[:, :, labels == 1].sum((1, 2)))
    own = np.stack([labels, 2 - labels])
    g = scores(image).group(own)
    np.testing.assert_allclose(g.values[1], [image[1, :, own[1] == k].sum() for k in range(3)])


def test_an_axis_can_be_chosen():
    values = random(2, 3, 50)
    e = scores(values, kind="series")
    g = e.group(["x", "y", "z"], axis=1)
    np.testing.assert_allclose(g.values, values.sum(2))
    g = e.group({"first": [0], "last": [-1]}, axis=2)
    np.testing.assert_allclose(g.values, np.stack([values[..., 0].sum(1), values[..., -1].sum(1), values[..., 1:-1].sum((1, 2))], 1))


def test_several_inputs_share_groups_of_the_same_name():
    e = scores((random(4, 2), random(4, 3, seed=1)))
    g = e.group((["x", "y"], ["y", "y", "x"]))
    assert g.feature_names == ("x", "y")
    np.testing.assert_allclose(g.values[:, 0], e.values[0][:, 0] + e.values[1][:, 2])
    assert e.group("inputs").feature_names == ("input 0", "input 1")


@pytest.mark.parametrize(
    ("name", "groups", "axis", "message"),
    [
        ("table", {"x": [0, 1], "y": [1]}, None, "'x' and 'y' share"),
        ("table", {"x": [4]}, None, "whole numbers below 4"),
        ("table", {"x": [0.5]}, None, "whole numbers"),
        ("table", {"x": ["age"]}, None, r"'age'(.|\n)*'a', 'b'"),
        ("table", {"x": [True]}, None, "mask of shape"),
        ("table", ["x", "y"], None, "2 group names"),
        ("table", "rows", None, "groups='rows'"),
        ("table", ["x"] * 5, 0, "axis 0 are the examples"),
        ("image", np.zeros((8, 9), int), None, r"map of labels of shape \(8, 9\)"),
        ("text", [[1], [2], [3]], None, "3 rows of labels"),
        ("dict", ["x"], None, r"for the inputs \['camera', 'state'\]"),
    ],
)
def test_groups_that_do_not_fit_are_refused(name, groups, axis, message):
    with pytest.raises(InputError, match=message):
        every_structure()[name].group(groups, axis)


# ---- words


WORDS = [[None, 0, 1, 1, 1, None], [None, 0, None]]


def test_words_are_sums_of_their_tokens():
    e = text()
    w = e.words(WORDS)
    complete(w)
    assert w.tokens == (("[CLS]", "not", "unbearable", "[SEP]"), ("[CLS]", "good", "[SEP]")) and w.kind == "text"
    np.testing.assert_allclose(w.values[0], [e.values[0, 0], e.values[0, 1], e.values[0, 2:5].sum(), e.values[0, 5]])
    np.testing.assert_allclose(w.values[1], [*e.values[1, :3], 0])
    np.testing.assert_allclose(w.stderr[0, 2], e.stderr[0, 2:5].sum())


def test_words_can_come_with_the_scores_through_a_file(tmp_path):
    e = scores(text().values, kind="text", tokens=TOKENS, provenance={"word_ids": WORDS})
    back = hw.load(e.save(tmp_path / "text"))
    np.testing.assert_array_equal(back.words().values, e.words(WORDS).values)


def test_words_need_tokens_and_their_numbers():
    with pytest.raises(InputError, match="which tokens make a word"):
        text().words()
    with pytest.raises(InputError, match=r"word numbers for \[3, 3\](.|\n)*\[6, 3\]"):
        text().words([[0, 1, 2], [0, 1, 2]])
    with pytest.raises(InputError, match="words\\(\\) of scores of kind 'table'"):
        every_structure()["table"].words([[0] * 4] * 5)
    padded = scores(random(2, 6), kind="text", tokens=TOKENS)
    with pytest.raises(InputError, match="positions without a token"):
        padded.words(WORDS)


# ---- differences


@structures
def test_a_difference_of_two_explanations_is_complete(name):
    e = every_structure()[name]
    other = scores(like(e.values, 9), seed=9, gap=0.5, target="output 1", tokens=e.tokens, kind=e.kind)
    d = e.minus(other)
    complete(d)
    np.testing.assert_array_equal(d.output, e.output - other.output)
    np.testing.assert_array_equal(d.evaluations, e.evaluations + other.evaluations)
    assert d.target == "(output 0) - (output 1)" and d.method == "by hand" and "differ in target" in d.notes[-1]
    assert d.stderr is None and d.provenance == {"first": e.provenance, "second": other.provenance}


def test_a_difference_keeps_what_both_have_alike():
    e = every_structure()["table"]
    d = e.minus(e)
    assert not d.values.any() and not d.residual.any() and d.feature_names == e.feature_names and d.inputs is e.inputs and d.reference is e.reference
    np.testing.assert_array_equal(d.stderr, 2 * e.stderr)  # an upper bound: nothing says that the two errors are one
    np.testing.assert_array_equal(d.converged, e.converged)
    assert "both have the same inputs" in d.notes[-1] and e.notes[0] in d.notes and d.minus(d).n == 5
    moved = e.minus(scores(e.values, inputs=e.inputs + 1, feature_names=("p", "q", "r", "s")))
    assert moved.inputs is None and moved.feature_names is None and moved.converged is None and "inputs" in moved.notes[-1]


def test_a_difference_needs_the_same_shapes():
    made = every_structure()
    for one, other in (("table", "image"), ("tuple", "dict"), ("table", "tuple")):
        with pytest.raises(InputError, match="the same shapes"):
            made[one].minus(made[other])
    with pytest.raises(InputError, match="the same shapes"):
        scores({"a": random(2, 3)}).minus(scores({"b": random(2, 3)}))
