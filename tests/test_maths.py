import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlor_peft.maths import (
    alignment_index,
    apply,
    collapse,
    condition_bound,
    condition_bound_by_inverse,
    effective_rank,
    inverse,
    is_invertible,
    materialise,
    singular_values,
    slogdet,
    spectral_norm,
)

EXACT = {torch.float64: 1e-12, torch.float32: 1e-4}

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 9)
ranks = st.integers(0, 4)
dtypes = st.sampled_from([torch.float64, torch.float32])
law = settings(deadline=None, max_examples=60)


def random(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def away_from_zero(d: Tensor) -> Tensor:
    return d + d.sign() / 2


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return ((got - want).norm() / want.norm().clamp(min=1)).item()


def dense(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Entry by entry, as a check that shares no code with the package."""
    p, q = len(U), len(V)
    M = U.new_zeros(p, q)
    for i in range(p):
        for j in range(q):
            M[i, j] = (U[i] * V[j]).sum() + (d[i % len(d)] if i == j else 0)
    return M


@law
@given(seeds, sizes, sizes, ranks, st.booleans(), dtypes)
def test_materialise_is_entrywise(seed, p, q, r, scalar, dtype):
    d, U, V = random(seed, (1 if scalar else min(p, q),), (p, r), (q, r), dtype=dtype)
    assert relative(materialise(d, U, V), dense(d, U, V)) < EXACT[dtype]


@law
@given(seeds, sizes, sizes, ranks, st.booleans(), st.lists(st.integers(0, 3), max_size=2), dtypes)
def test_apply_is_the_dense_product(seed, p, q, r, scalar, batch, dtype):
    d, U, V, x = random(seed, (1 if scalar else min(p, q),), (p, r), (q, r), (*batch, q), dtype=dtype)
    assert relative(apply(x, d, U, V), x @ materialise(d, U, V).mT) < EXACT[dtype]


@law
@given(seeds, st.integers(1, 5), sizes, ranks, st.booleans(), dtypes)
def test_collapse_is_the_dense_product(seed, num_factors, n, r, scalar, dtype):
    d, U, V = random(seed, (num_factors, 1 if scalar else n), *[(num_factors, n, r)] * 2, dtype=dtype)
    collapsed = collapse(d, U, V)
    assert [tuple(t.shape) for t in collapsed] == [(d.shape[1],), *[(n, num_factors * r)] * 2]
    product = torch.eye(n, dtype=dtype)
    for factor in zip(d, U, V, strict=True):
        product = materialise(*factor) @ product
    scale = math.prod(materialise(*factor).norm().item() for factor in zip(d, U, V, strict=True))
    assert (materialise(*collapsed) - product).norm() <= EXACT[dtype] * max(1, scale)


def test_collapse_meets_factor_0_first():
    d, U, V, x = random(0, (3, 5), (3, 5, 2), (3, 5, 2), (4, 5))
    y = x
    for factor in zip(d, U, V, strict=True):
        y = apply(y, *factor)
    assert relative(apply(x, *collapse(d, U, V)), y) < 1e-12


def test_collapse_of_one_factor_returns_it():
    stacks = random(0, (1, 5), (1, 5, 2), (1, 5, 2))
    assert all(torch.equal(got, stack[0]) for got, stack in zip(collapse(*stacks), stacks, strict=True))


@law
@given(seeds, sizes, ranks, st.booleans(), dtypes)
def test_inverse_inverts_on_both_sides(seed, n, r, scalar, dtype):
    d, U, V = random(seed, (1 if scalar else n,), (n, r), (n, r), dtype=dtype)
    d = away_from_zero(d)
    M = materialise(d, U, V)
    condition = torch.linalg.cond(M.double()).item()
    assume(condition < 1e3)
    d_inverse, U_inverse, V_inverse = inverse(d, U, V)
    assert (d_inverse.shape, U_inverse.shape, V_inverse.shape) == (d.shape, U.shape, V.shape)
    M_inverse = materialise(d_inverse, U_inverse, V_inverse)
    identity = torch.eye(n, dtype=dtype)
    tolerance = 10 * EXACT[dtype] * condition
    assert relative(M @ M_inverse, identity) < tolerance
    assert relative(M_inverse @ M, identity) < tolerance


def test_inverse_names_the_zero_in_d():
    d, U, V = random(0, (5,), (5, 2), (5, 2))
    d[3] = 0
    with pytest.raises(ValueError, match=r"d is zero at \[3\]"):
        inverse(d, U, V)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "r"), [(2, 1), (64, 1), (64, 3), (5, 5)])
def test_inverse_of_a_projector_names_the_capacitance(n, r, dtype):
    basis = torch.linalg.qr(random(0, (n, r), dtype=dtype)[0])[0]
    with pytest.raises(ValueError, match=r"capacitance .* is singular"):
        inverse(torch.ones(1, dtype=dtype), -basis, basis)


@law
@given(seeds, sizes, ranks, st.booleans(), st.integers(0, 4), st.sampled_from([0.0, 1e-9]), dtypes)
def test_slogdet_is_that_of_the_dense_matrix(seed, n, r, scalar, num_tiny, tiny, dtype):
    d, U, V = random(seed, (1 if scalar else n,), (n, r), (n, r), dtype=dtype)
    d = away_from_zero(d)
    d[:num_tiny] *= tiny
    M = materialise(d, U, V).double()
    assume(torch.linalg.cond(M) < 1e3)
    sign, logabsdet = slogdet(d, U, V)
    want_sign, want_logabsdet = torch.linalg.slogdet(M)
    assert sign == want_sign
    assert abs(logabsdet - want_logabsdet) < 1e3 * EXACT[dtype]


@pytest.mark.parametrize("tiny", [1e-4, 1e-8, 1e-12, 1e-16])
def test_slogdet_keeps_its_digits_beside_tiny_entries(tiny):
    d, U, V = random(3, (6,), (6, 3), (6, 3))
    d = away_from_zero(d)
    d[1], d[4] = tiny, -tiny
    sign, logabsdet = slogdet(d, U, V)
    want_sign, want_logabsdet = torch.linalg.slogdet(materialise(d, U, V))
    assert sign == want_sign
    assert abs(logabsdet - want_logabsdet) < 1e-10


def test_slogdet_of_a_singular_matrix():
    d, U, V = random(0, (4,), (4, 1), (4, 1))
    d[0] = 0
    U[0] = 0
    assert slogdet(d, U, V) == (0, -torch.inf)
    d[0], d[1], U[0] = 1, 0, 1
    # rank 1 cannot repair two zeros
    assert slogdet(d * torch.tensor([0.0, 0, 1, 1]), U, V)[1] < -30
    assert slogdet(torch.zeros(1), torch.ones(3, 0), torch.ones(3, 0)) == (0, -torch.inf)


@law
@given(seeds, sizes, sizes, st.integers(0, 12), dtypes)
def test_spectral_norm_is_the_largest_singular_value(seed, p, q, r, dtype):
    U, V = random(seed, (p, r), (q, r), dtype=dtype)
    want = torch.linalg.matrix_norm(U @ V.mT, 2) if r else U.new_zeros(())
    assert relative(spectral_norm(U, V), want) < EXACT[dtype]


def test_spectral_norm_keeps_small_values():
    # squared, in (U^T U)(V^T V), these would drown in each other
    U = torch.diag(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    V = torch.diag(torch.tensor([1e-12, 1e-4], dtype=torch.float64))
    assert spectral_norm(U, V).item() == pytest.approx(1e-12, rel=1e-12)


def test_spectral_norm_has_a_finite_gradient_at_the_start():
    U, V = torch.zeros(5, 2, requires_grad=True), random(0, (4, 2), dtype=torch.float32)[0]
    spectral_norm(U, V).backward()
    assert U.grad is not None
    assert U.grad.isfinite().all()


@law
@given(seeds, sizes, ranks, st.booleans(), st.floats(0, 0.999), dtypes)
def test_condition_bound_bounds_the_condition(seed, n, r, scalar, rho, dtype):
    d, U, V = random(seed, (1 if scalar else n,), (n, r), (n, r), dtype=dtype)
    d = away_from_zero(d)
    U = U * (rho * d.abs().min() / spectral_norm(U, V).clamp(min=1e-6))
    bound = condition_bound(d, U, V).item()
    condition = torch.linalg.cond(materialise(d, U, V).double()).item()
    assert condition <= bound * (1 + 10 * EXACT[dtype])
    largest, smallest = d.abs().max().item(), d.abs().min().item()
    if r:
        want = (largest + rho * smallest) / ((1 - rho) * smallest)
        assert bound == pytest.approx(want, rel=100 * EXACT[dtype])
    else:
        assert bound == pytest.approx(largest / smallest, rel=EXACT[dtype])


def test_condition_bound_is_attained():
    d = torch.tensor([1.0, 3.0], dtype=torch.float64)
    U, V = torch.diag(torch.tensor([-0.5, 0.5], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    assert condition_bound(d, U, V).item() == pytest.approx(7)
    assert torch.linalg.cond(materialise(d, U, V)).item() == pytest.approx(7)


@law
@given(seeds, sizes, ranks, st.booleans(), st.floats(0, 5))
def test_the_bound_by_the_inverse_bounds_the_condition_and_is_the_tighter_one(seed, n, r, scalar, rho):
    d, U, V = random(seed, (1 if scalar else n,), (n, r), (n, r))
    d = away_from_zero(d)
    U = U * (rho * d.abs().min() / spectral_norm(U, V).clamp(min=1e-6))
    bound = condition_bound_by_inverse(d, U, V).item()
    condition = torch.linalg.cond(materialise(d, U, V)).item()
    # beyond, both are rounding
    if condition < 1e8:
        assert condition * (1 - 1e-6) <= bound < torch.inf
    assert rho > 0.999 or bound <= condition_bound(d, U, V).item() * (1 + 1e-6)


def test_the_bound_by_the_inverse_is_infinite_without_one():
    U, V = torch.tensor([[1.0], [0], [0]]), torch.tensor([[-1.0], [0], [0]])
    assert condition_bound_by_inverse(torch.ones(3), U, V) == torch.inf
    assert condition_bound_by_inverse(torch.tensor([1.0, 0, 1]), U, V) == torch.inf
    assert condition_bound_by_inverse(torch.ones(3), 2 * U, V) < 10


def test_condition_bound_is_infinite_where_it_says_nothing():
    d, U, V = random(0, (4,), (4, 2), (4, 2))
    assert condition_bound(d * 1e-3, U, V) == torch.inf
    assert condition_bound(d * torch.tensor([0, 1, 1, 1]), 0 * U, V) == torch.inf


def test_alignment_index_is_about_1_for_an_unrelated_update():
    delta, W = random(0, (200, 50), (200, 50))
    assert 0.8 < alignment_index(delta, W) < 1.2


@law
@given(seeds, sizes, sizes, dtypes)
def test_alignment_index_is_I_for_scaled_rows(seed, O, I, dtype):
    a, W = random(seed, (O, 1), (O, I), dtype=dtype)
    assert alignment_index(a * W, W).item() == pytest.approx(I, rel=10 * EXACT[dtype])


def test_alignment_index_sees_a_diagonal_in_noise():
    a, W, noise = random(0, (60, 1), (60, 40), (60, 40))
    assert alignment_index(0.3 * a * W + noise, W) > 2
    # the scaling of rows hardly shows in the columns
    assert alignment_index((a * W).mT, W.mT) < 4 < alignment_index(a * W, W)


def test_alignment_index_of_zeros_and_half_precision():
    delta, W = random(0, (6, 8), (6, 8))
    W[2] = 0
    assert alignment_index(delta, W).isfinite()
    assert alignment_index(torch.zeros_like(delta), W) == 0
    half = alignment_index(delta.bfloat16(), W.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(alignment_index(delta, W).item(), rel=0.05)


def test_alignment_index_rejects_unequal_shapes():
    with pytest.raises(ValueError, match=r"delta \(2, 3\) and W \(3, 2\); pass"):
        alignment_index(torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.parametrize("r", [0, 1, 2])
@pytest.mark.parametrize("scalar", [False, True])
class TestGradients:
    @staticmethod
    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.requires_grad_() for t in tensors]

    @pytest.mark.parametrize(("p", "q"), [(4, 4), (3, 5), (5, 3)])
    def test_apply_and_materialise(self, p, q, r, scalar):
        x, d, U, V = self.leaves(*random(0, (2, q), (1 if scalar else min(p, q),), (p, r), (q, r)))
        assert torch.autograd.gradcheck(apply, (x, d, U, V))
        assert torch.autograd.gradcheck(materialise, (d, U, V))

    def test_collapse(self, r, scalar):
        assert torch.autograd.gradcheck(collapse, self.leaves(*random(0, (3, 1 if scalar else 4), *[(3, 4, r)] * 2)))

    def test_inverse(self, r, scalar):
        d, U, V = random(0, (1 if scalar else 4,), (4, r), (4, r))
        assert torch.autograd.gradcheck(inverse, self.leaves(away_from_zero(d), U, V))

    def test_slogdet(self, r, scalar):
        d, U, V = random(0, (1 if scalar else 4,), (4, r), (4, r))
        assert torch.autograd.gradcheck(lambda *t: slogdet(*t)[1], self.leaves(away_from_zero(d), U, V))

    def test_condition_bound(self, r, scalar):
        d, U, V = random(0, (1 if scalar else 4,), (4, r), (4, r))
        assert torch.autograd.gradcheck(condition_bound, self.leaves(away_from_zero(d), 0.01 * U, V))

    def test_condition_bound_by_inverse(self, r, scalar):
        d, U, V = random(0, (1 if scalar else 4,), (4, r), (4, r))
        assert torch.autograd.gradcheck(condition_bound_by_inverse, self.leaves(away_from_zero(d), 0.1 * U, V))


def test_slogdet_has_the_dense_gradient_at_a_zero_in_d():
    d, U, V = random(0, (5,), (5, 2), (5, 2))
    d[2] = 0
    leaves = [t.requires_grad_() for t in (d, U, V)]
    got = torch.autograd.grad(slogdet(*leaves)[1], leaves)
    want = torch.autograd.grad(torch.linalg.slogdet(materialise(*leaves))[1], leaves)
    assert all(relative(g, w) < 1e-10 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("function", [materialise, inverse, slogdet, condition_bound, condition_bound_by_inverse])
def test_arguments_are_not_changed(function):
    arguments = random(0, (5,), (5, 2), (5, 2))
    copies = [t.clone() for t in arguments]
    function(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("function", [inverse, slogdet, condition_bound, condition_bound_by_inverse])
def test_square_and_precision_are_required(function):
    with pytest.raises(ValueError, match="U has 5 rows and V has 4; only a square"):
        function(torch.ones(4), torch.ones(5, 2), torch.ones(4, 2))
    with pytest.raises(TypeError, match=rf"{function.__name__}: got torch.bfloat16, needs .*convert first"):
        function(*(t.bfloat16() for t in random(0, (5,), (5, 2), (5, 2))))


def test_spectral_norm_requires_precision():
    with pytest.raises(TypeError, match=r"spectral_norm: got torch.float16"):
        spectral_norm(torch.ones(3, 1).half(), torch.ones(3, 1).half())


@given(seeds, sizes, ranks, st.booleans(), st.integers(0, 3), dtypes)
@law
def test_an_invertible_matrix_is_one_and_loses_it_with_a_row(seed, n, r, scalar, num_zero, dtype):
    d, U, V = random(seed, (1 if scalar else n,), (n, r), (n, r), dtype=dtype)
    d = away_from_zero(d)
    if not scalar:
        d[:num_zero] = 0
    M = materialise(d, U, V).double()
    sizes = torch.linalg.svdvals(M)
    assume(sizes[-1] > 1e-4 * sizes[0] or sizes[-1] < 1e-14 * sizes[0])
    assert is_invertible(d, U, V) == bool(sizes[-1] > 1e-4 * sizes[0])


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_invertible_whatever_the_sizes(size):
    d = torch.tensor([1.0, 0.0, 1e-18], dtype=torch.float64)
    e = torch.eye(3, dtype=torch.float64)
    assert not is_invertible(d, size * e[:, :1], e[:, :1] / size)
    assert is_invertible(d, size * e[:, 1:2], e[:, 1:2] / size)
    assert not is_invertible(d + 1, -size * e[:, :1] * 2, e[:, :1] / size / 2 * 2)
    assert not is_invertible(torch.ones(1, dtype=torch.float64), -size * e[:, :1], e[:, :1] / size)
    assert not is_invertible(d, e[:, :0], e[:, :0])
    assert is_invertible(d + 1, e[:, :0], e[:, :0])


@given(seeds, sizes, sizes, ranks, dtypes)
@law
def test_singular_values_are_the_dense_ones(seed, p, q, r, dtype):
    U, V = random(seed, (p, r), (q, r), dtype=dtype)
    got = singular_values(U, V)
    assert got.shape == (min(p, q, r),)
    assert relative(got, torch.linalg.svdvals(U @ V.mT)[: len(got)]) < EXACT[dtype]


def test_effective_rank_counts_equal_values_and_ignores_small_ones():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert 1 < effective_rank(torch.tensor([1.0, 1e-3])).item() < 1.02
    assert effective_rank(torch.zeros(3)) == effective_rank(torch.zeros(0)) == 0
