"""Quadrature rules are tables: their laws are those of any quadrature, whatever numbers stand in them."""

import numpy as np
import pytest

from headwater.errors import InputError
from headwater.features import quadrature

RULES = {
    "gauss_legendre": (quadrature.gauss_legendre, (1, 2, 3, 8, 32, 64)),
    "midpoint": (quadrature.midpoint, (1, 2, 9, 50)),
    "trapezoid": (quadrature.trapezoid, (2, 3, 9, 50)),
    "left": (quadrature.left, (1, 2, 9, 50)),
    "right": (quadrature.right, (1, 2, 9, 50)),
    "gauss_kronrod": (quadrature.gauss_kronrod, (3, 5, 7, 15, 21, 31, 61)),
}
EACH = [pytest.param(make(n), id=f"{name}-{n}") for name, (make, counts) in RULES.items() for n in counts]


@pytest.mark.parametrize("rule", EACH)
def test_weights_sum_to_one_and_none_is_negative(rule):
    assert abs(rule.weights.sum() - 1) < 1e-15 * len(rule) + 1e-15 and (rule.weights >= 0).all()


@pytest.mark.parametrize("rule", EACH)
def test_nodes_ascend_and_lie_in_their_own_cells(rule):
    assert (np.diff(rule.nodes) > 0).all() and rule.nodes.min() >= 0 and rule.nodes.max() <= 1
    edges = rule.edges
    assert edges[0] == 0 and abs(edges[-1] - 1) < 1e-14
    assert (rule.nodes >= edges[:-1] - 1e-14).all() and (rule.nodes <= edges[1:] + 1e-14).all()


@pytest.mark.parametrize("rule", EACH)
def test_polynomials_of_the_stated_degree_are_exact_and_the_next_is_not(rule):
    worst = max(abs(rule.weights @ rule.nodes**k - 1 / (k + 1)) for k in range(rule.degree + 1))
    assert worst < 1e-14
    if rule.degree < 20:  # beyond, the error of the next degree is below rounding
        # in the shifted Legendre polynomial of that degree, whose integral is 0, the error is not lost beside large terms
        k = rule.degree + 1
        wave = np.polynomial.legendre.legval(2 * rule.nodes - 1, np.eye(k + 1)[k])
        assert abs(rule.weights @ wave) > 1e-9


@pytest.mark.parametrize("points", [3, 7, 15, 21, 31])
def test_a_kronrod_pair_holds_the_gauss_rule_on_every_second_node(points):
    pair, gauss = quadrature.gauss_kronrod(points), quadrature.gauss_legendre(points // 2)
    assert np.allclose(pair.nodes[1::2], gauss.nodes, atol=1e-14)
    assert np.allclose(pair.embedded[1::2], gauss.weights, atol=1e-14) and (pair.embedded[::2] == 0).all()


def test_known_kronrod_numbers():
    pair = quadrature.gauss_kronrod(15)  # Piessens et al., QUADPACK (1983): abscissae and weights of the 7-15 pair
    assert abs(2 * pair.nodes[-1] - 1 - 0.991455371120812639) < 1e-15
    assert abs(2 * pair.weights[7] - 0.209482141084727828) < 1e-15


@pytest.mark.parametrize("points", [3, 8, 32])
def test_gaps_predict_changes_of_a_polynomial_from_node_to_node(points):
    rule = quadrature.gauss_legendre(points)
    f = np.polynomial.Polynomial(np.random.default_rng(0).normal(size=points + 1))
    ends = np.concatenate([[0.0], rule.nodes, [1.0]])
    assert np.allclose(rule.gaps @ f.deriv()(rule.nodes), np.diff(f(ends)), atol=1e-12)
    assert np.allclose(rule.gaps.sum(0), rule.weights, atol=1e-13)


def test_shape_is_what_the_next_degree_leaves():
    rule = quadrature.gauss_legendre(6)
    f = np.polynomial.Polynomial([0] * 7 + [1.0])  # its derivative has degree 6: one more than the nodes can interpolate
    ends = np.concatenate([[0.0], rule.nodes, [1.0]])
    left = rule.gaps @ f.deriv()(rule.nodes) - np.diff(f(ends))
    assert abs(abs(rule.shape @ left) / np.linalg.norm(left) - 1) < 1e-6


@pytest.mark.parametrize(("make", "points"), [(quadrature.gauss_legendre, 0), (quadrature.trapezoid, 1), (quadrature.gauss_kronrod, 16), (quadrature.midpoint, 2.5)])
def test_impossible_counts_are_refused(make, points):
    with pytest.raises(InputError, match="To mend it"):
        make(points)


@pytest.mark.parametrize("rule", [quadrature.gauss_legendre(1500), quadrature.gauss_kronrod(301)], ids=repr)
def test_rules_of_very_many_points_still_know_what_they_leave(rule):
    assert np.isfinite(rule.shape).all() and abs(np.linalg.norm(rule.shape) - 1) < 1e-12
    ends = np.concatenate([[0.0], rule.nodes, [1.0]])
    assert np.abs(rule.gaps @ np.cos(9 * rule.nodes) * 9 - np.diff(np.sin(9 * ends))).max() < 1e-10
