"""Operators against the matrices they stand for, with every function of a matrix taken by scipy or from its own eigenvectors."""

import numpy as np
import pytest
import scipy.linalg
import torch

from headwater.errors import NotFinite
from headwater.linalg import Dense, Diagonal, Kronecker, eigh


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def basis(groups, n):
    return torch.linalg.qr(torch.randn(groups, n, n))[0]


def kronecker(groups, out, inner, left=True, right=True):
    return Kronecker(basis(groups, out) if left else None, basis(groups, inner) if right else None, torch.rand(groups, out, inner) * 2)


OPERATORS = {  # operator, and the shape of the vectors it acts on
    "Kronecker": lambda: (kronecker(1, 3, 4), (1, 3, 4)),
    "Kronecker, groups": lambda: (kronecker(2, 3, 2), (2, 3, 2)),
    "Kronecker, entries": lambda: (kronecker(1, 4, 3, left=False), (1, 4, 3)),
    "Kronecker, unmixed": lambda: (Kronecker(torch.eye(3).unsqueeze(0), torch.eye(4).unsqueeze(0), torch.rand(1, 3, 4)), (1, 3, 4)),
    "Kronecker, left alone": lambda: (kronecker(1, 3, 4, right=False), (1, 3, 4)),
    "Dense": lambda: (Dense.of(semidefinite(12)), (3, 4)),
    "Diagonal": lambda: (Diagonal(torch.rand(3, 4) * 2), (3, 4)),
}
each = pytest.mark.parametrize("kind", OPERATORS)


def semidefinite(n, rank=None):
    half = torch.randn(n, rank or n)
    return half @ half.T / n


def explicit(op, shape):
    """The matrix written out: np.kron of the eigenvectors, group by group."""
    size = int(np.prod(shape))
    if isinstance(op, Diagonal):
        return torch.diag(op.spectrum.reshape(-1))
    if isinstance(op, Dense):
        return op.basis @ torch.diag(op.spectrum) @ op.basis.T
    groups, out, inner = shape
    full = torch.zeros(size, size)
    for g in range(groups):
        left = torch.eye(out) if op.left is None else op.left[g]
        right = torch.eye(inner) if op.right is None else op.right[g]
        v = torch.from_numpy(np.kron(left.numpy(), right.numpy()))
        rows = slice(g * out * inner, (g + 1) * out * inner)
        full[rows, rows] = v @ torch.diag(op.spectrum[g].reshape(-1)) @ v.T
    return full


def symmetric(matrix, f):
    spectrum, v = torch.linalg.eigh(matrix)
    return v @ torch.diag(f(spectrum.clamp_min(0))) @ v.T


def near(a, b, tolerance=1e-11):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-300)


def applied(apply, v):
    return apply(v).reshape(len(v), -1)


FUNCTIONS = [lambda s: 1 / (s + 0.1), lambda s: torch.exp(-3 * s), lambda s: -torch.expm1(-2 * s) / s.clamp_min(1e-300), torch.sqrt]


@each
def test_an_operator_is_its_matrix(kind):
    op, shape = OPERATORS[kind]()
    v = torch.randn(5, *shape)
    near(applied(op, v), v.flatten(1) @ explicit(op, shape))
    near(applied(lambda u: op @ u, v), v.flatten(1) @ explicit(op, shape))
    near(op.dense(shape), explicit(op, shape))
    assert op(v).shape == v.shape


@each
def test_a_function_of_an_operator_is_that_of_its_matrix(kind):
    op, shape = OPERATORS[kind]()
    v = torch.randn(5, *shape)
    for f in FUNCTIONS:
        near(applied(op.map(f), v), v.flatten(1) @ symmetric(explicit(op, shape), f), 1e-9)


@each
def test_restoring_undoes_rotating_and_lengths_stay(kind):
    op, shape = OPERATORS[kind]()
    v = torch.randn(5, *shape)
    turned = op.rotate(v)
    assert turned.shape == (5, *op.spectrum.shape)
    near(op.restore(turned).reshape(v.shape), v)
    near(turned.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1))


@each
def test_negative_eigenvalues_count_as_zero(kind):
    op, shape = OPERATORS[kind]()
    shifted = op.with_spectrum(op.spectrum - 0.5)
    clamped = op.with_spectrum((op.spectrum - 0.5).clamp_min(0))
    v = torch.randn(2, *shape)
    near(applied(shifted.map(torch.sqrt), v), applied(clamped.map(torch.sqrt), v))
    near(applied(shifted.flow(0.3).carry(lambda s: torch.exp(-s)), v), applied(clamped.flow(0.3).carry(lambda s: torch.exp(-s)), v))


@each
def test_the_diagonal_of_a_precision_in_the_basis(kind):
    op, shape = OPERATORS[kind]()
    precision = torch.rand(shape) + 0.5
    vectors = op.rotate(torch.eye(precision.numel()).reshape(-1, *shape)).flatten(1)  # rows: parameters, columns: eigenvectors
    near(op.precision_in_basis(precision).reshape(-1), (vectors.T @ torch.diag(precision.reshape(-1)) @ vectors).diag())


# ---- flows: P^1/2 (H + decay) P^1/2 + decoupled


def phi(s):
    return -torch.expm1(-2 * s) / s.clamp_min(1e-300)


def psi(s):
    return torch.exp(-2 * s)


def check_flow(flow, matrix, gain, v, tolerance=1e-9):
    """respond = P^1/2 phi(M) P^1/2 and carry = P^-1/2 psi(M) P^1/2 on queries, for M = P^1/2 (H + decay) P^1/2 + decoupled."""
    root = gain.sqrt()
    near(applied(flow.respond(phi), v), v.flatten(1) @ (root[:, None] * symmetric(matrix, phi) * root), tolerance)
    near(applied(flow.carry(psi), v), v.flatten(1) @ (root[:, None] * symmetric(matrix, psi) / root), tolerance)


@each
@pytest.mark.parametrize(("gain", "decay", "decoupled"), [(1.0, 0.0, 0.0), (0.3, 0.2, 0.0), (2.0, 0.0, 0.1), (0.5, 0.2, 0.1)])
def test_a_flow_with_one_gain_is_exact(kind, gain, decay, decoupled):
    op, shape = OPERATORS[kind]()
    h = explicit(op, shape)
    eye = torch.eye(len(h))
    check_flow(op.flow(gain, decay, decoupled), gain * (h + decay * eye) + decoupled * eye, torch.full((len(h),), gain), torch.randn(4, *shape))


@pytest.mark.parametrize("kind", ["Dense", "Diagonal"])
@pytest.mark.parametrize("varied", ["gain", "gain and decay", "all three"])
def test_a_gain_that_varies_is_exact_where_the_matrix_allows(kind, varied):
    op, shape = OPERATORS[kind]()
    gain = torch.rand(shape) + 0.1
    decay, decoupled = (torch.rand(shape) if kind == "Dense" and part in varied else 0.2 for part in ("decay", "all"))
    h, root = explicit(op, shape), gain.reshape(-1).sqrt()
    whole = torch.diag(torch.as_tensor(decay).expand(shape).reshape(-1)) + h
    matrix = root[:, None] * whole * root + torch.diag(torch.as_tensor(decoupled).expand(shape).reshape(-1))
    check_flow(op.flow(gain, decay, decoupled), matrix, gain.reshape(-1), torch.randn(4, *shape))


def test_decay_alone_may_vary_under_a_dense_matrix():
    op, shape = OPERATORS["Dense"]()
    decay = torch.rand(shape)
    matrix = 0.5 * (explicit(op, shape) + torch.diag(decay.reshape(-1))) + 0.1 * torch.eye(12)
    check_flow(op.flow(0.5, decay, 0.1), matrix, torch.full((12,), 0.5), torch.randn(4, *shape))


@pytest.mark.parametrize("kind", [k for k in OPERATORS if k.startswith("Kronecker")])
def test_a_gain_that_commutes_is_exact_under_kronecker_and_others_are_harmonic_means(kind):
    op, shape = OPERATORS[kind]()
    v = torch.randn(3, *shape)
    constant = op.flow(torch.full(shape, 0.4), 0.2, 0.1)
    near(applied(constant.respond(phi), v), applied(op.flow(0.4, 0.2, 0.1).respond(phi), v))
    gain = torch.rand(shape) + 0.1
    vectors = op.rotate(torch.eye(gain.numel()).reshape(-1, *shape)).flatten(1)
    harmonic = 1 / (vectors.T @ torch.diag(1 / gain.reshape(-1)) @ vectors).diag()
    near(op.flow(gain).gain.reshape(-1), harmonic)


@each
def test_parameters_that_do_not_move_respond_with_nothing(kind):
    """A gain of zero for some parameters: Adam has no second moment for them, and 1 / 0 must not spread as NaN."""
    op, shape = OPERATORS[kind]()
    gain = torch.rand(shape) + 0.1
    gain.view(-1)[[0, 5]] = 0.0
    v = torch.randn(3, *shape)
    flow = op.flow(gain, 0.1, 0.0)
    responded, carried = flow.respond(phi)(v).reshape(3, -1), flow.carry(psi)(v).reshape(3, -1)
    assert torch.isfinite(responded).all() and torch.isfinite(carried).all()
    if not isinstance(op, Kronecker):  # whose basis mixes parameters
        assert (responded[:, [0, 5]] == 0).all()
    still = op.flow(torch.zeros(shape), 0.1, 0.0)
    assert (still.respond(phi)(v).abs() < 1e-300).all()
    near(applied(still.carry(psi), v), v.flatten(1))


@pytest.mark.parametrize("rank", [12, 3])
@pytest.mark.parametrize("decoupled", [0.0, 0.3, "varied"])
def test_a_held_parameter_still_sees_those_that_move(rank, decoupled):
    """Under a dense matrix: exp of the dynamics themselves, th' = -(P (H + decay) + decoupled) th, taken by scipy."""
    op, shape = Dense.of(semidefinite(12, rank)), (3, 4)
    gain = torch.rand(12) + 0.1
    gain[[0, 5, 6]] = 0.0
    decoupled = torch.rand(12) if decoupled == "varied" else torch.full((12,), decoupled)
    decay = 0.0 if rank == 3 else 0.2  # without decay some directions have no curvature at all, as held ones have none
    dynamics = gain[:, None] * (explicit(op, shape) + decay * torch.eye(12)) + torch.diag(decoupled)
    expected = torch.from_numpy(scipy.linalg.expm(-2 * dynamics.numpy()))  # state after the segment, by the state before it
    v = torch.randn(4, *shape)
    near(applied(op.flow(gain.reshape(shape), decay, decoupled.reshape(shape)).carry(psi), v), v.flatten(1) @ expected, 1e-5)


# ---- splits


@pytest.mark.parametrize("tolerance", [0.2, 1e-2, 1e-4])
@pytest.mark.parametrize(("gain", "decay"), [(1.0, 0.0), (0.5, 0.01)])
def test_a_split_stays_within_its_tolerance(tolerance, gain, decay):
    """In root mean square over gradients whose second moments are the eigenvalues, counted exactly in the eigenbasis."""
    out, inner = 24, 32
    steep = torch.logspace(0, -14, out)[:, None] * torch.logspace(1, -14, inner)
    op = Kronecker(basis(1, out), basis(1, inner), steep.unsqueeze(0))
    flow = op.flow(gain, decay)

    def respond(s):
        return -torch.expm1(-30 * s) / s.clamp_min(1e-300) + torch.where(s > 0, 0.0, 30.0)

    split = flow.split(respond, tolerance)
    assert split is not None and split.pairs.shape[1] <= out * inner // 8
    full = (flow.gain * respond(flow.matrix.spectrum))[0]
    kept = torch.full_like(full, split.constant)
    kept[split.pairs[0], split.pairs[1]] += split.excess
    moments = flow.matrix.spectrum[0] - flow.floor
    error = ((full - kept) * moments).square().sum().sqrt() / (full * moments).square().sum().sqrt()
    assert error <= tolerance * (1 + 1e-9)
    # and as it is used: on factors, without forming anything
    u, w = (torch.randn(3, out), torch.randn(3, inner)), (torch.randn(5, out), torch.randn(5, inner))
    found = split.dots(split.turn(*u), split.turn(*w))
    wholes = [(g[:, :, None] * a[:, None, :]).unsqueeze(1) for g, a in (u, w)]
    near(found, (op.restore(op.rotate(wholes[0]) * kept)).flatten(1) @ wholes[1].flatten(1).T, 1e-9)


def test_no_split_where_it_would_save_nothing_or_cannot_be_made():
    op, _ = OPERATORS["Kronecker"]()
    assert op.flow(1.0).split(phi, 1e-6) is None  # every eigenvalue matters
    assert op.flow(torch.rand(1, 3, 4) + 0.1).split(phi, 0.5) is None  # no common floor
    assert kronecker(2, 3, 2).flow(1.0).split(phi, 0.5) is None
    assert OPERATORS["Dense"]()[0].flow(1.0).split(phi, 0.5) is None
    none = Diagonal(torch.zeros(())).flow(0.5, 0.2).split(phi, 0.1)
    assert none.excess.numel() == 0
    assert abs(none.constant - 0.5 * float(phi(torch.tensor(0.1)))) < 1e-15


# ---- decomposition


def test_eigh_decomposes_in_float64_what_float32_cannot():
    v = basis(1, 40)[0]
    spectrum = torch.logspace(-9, 0, 40)
    matrix = (v @ torch.diag(spectrum) @ v.T).float()
    found, vectors = eigh(matrix)
    exact = torch.linalg.eigh(matrix.double())[0]
    assert found.dtype == vectors.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-12)
    skewed = matrix.double() + torch.triu(torch.ones(40, 40), 1) * 1e-9  # rounding leaves a matrix a little asymmetric
    assert torch.allclose(eigh(skewed)[0], eigh((skewed + skewed.T) / 2)[0], atol=1e-15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    with pytest.raises(NotFinite, match=r"NaN or infinite(.|\n)*diverged"):
        eigh(matrix)
    with pytest.raises(NotFinite):
        Dense.of(matrix)
