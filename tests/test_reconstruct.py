import math
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlor_peft.maths import apply, collapse, materialise
from dlor_peft.reconstruct import factorise_product, factorise_sum

seeds = st.integers(0, 2**31)
law = settings(deadline=None, max_examples=50)


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def eye(*shape: int) -> Tensor:
    return torch.eye(*shape, dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(random(n, (n, n))[0])[0]


def jordan(n: int, eigenvalue: float) -> Tensor:
    return eigenvalue * eye(n) + torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)


def turns(n: int, radians: float, size: float = 1) -> Tensor:
    """Equal rotations down the diagonal, so complex pairs at every even boundary."""
    cos, sin = size * math.cos(radians), size * math.sin(radians)
    return torch.kron(eye(n // 2 + 1), torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64))[:n, :n]


def complex_jordan(n: int) -> Tensor:
    return turns(n, math.pi / 2) + torch.diag(torch.ones(max(0, n - 2), dtype=torch.float64), 2)[:n, :n]


def low_rank(n: int) -> Tensor:
    left, right = random(n, (n, n // 2), (n // 2, n))
    return left @ right


ZOO = {
    "random": lambda n: random(n, (n, n))[0],
    "negative determinant": lambda n: orthogonal(n) * (1 - 2 * (torch.linalg.det(orthogonal(n)) > 0).double()),
    "singular": low_rank,
    "identity plus low rank": lambda n: eye(n) + low_rank(n),
    "orthogonal": orthogonal,
    "cyclic permutation": lambda n: eye(n).roll(1, 0),
    "random permutation": lambda n: eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(n))],
    "nilpotent Jordan": lambda n: jordan(n, 0),
    "nilpotent Jordan, turned": lambda n: orthogonal(n) @ jordan(n, 0) @ orthogonal(n).mT,
    "Jordan of eigenvalue 1": lambda n: jordan(n, 1),
    "Jordan of eigenvalue -2": lambda n: jordan(n, -2).mT,
    "complex Jordan": complex_jordan,
    "complex Jordan, turned": lambda n: orthogonal(n) @ complex_jordan(n) @ orthogonal(n).mT,
    "90 degrees": lambda n: turns(n, math.pi / 2),
    "-90 degrees": lambda n: turns(n, -math.pi / 2),
    "120 degrees": lambda n: turns(n, 2 * math.pi / 3),
    "a hundredth of a degree": lambda n: turns(n, math.radians(0.01)),
    "tiny complex pairs": lambda n: jordan(n, 0).mT - 1e-14 * jordan(n, 0),
    "identity": eye,
    "minus identity": lambda n: -eye(n),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
}


def num_factors(A: Tensor, r: int, c: float) -> int:
    rank = int((torch.linalg.svdvals(A - c * eye(*A.shape)) > 1e-11).sum())
    return max(1, math.ceil(rank / r))


def dense_product(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    product = torch.eye(U.shape[1], dtype=U.dtype)
    for factor in zip(d, U, V, strict=True):
        product = materialise(*factor) @ product
    return product


def check_product(A: Tensor, r: int, c: float, tolerance: float) -> None:
    d, U, V = factorise_product(A, r, c)
    n, K = len(A), num_factors(A, r, c)
    assert (d.shape, U.shape, V.shape) == ((K, n), (K, n, r), (K, n, r))
    scale = max(A.norm().item(), abs(c))
    assert (materialise(*collapse(d, U, V)) - A).norm() <= tolerance * scale
    assert (dense_product(d, U, V) - A).norm() <= tolerance * scale


def small_cases() -> Iterator[tuple[int, int]]:
    for n in range(1, 13):
        yield from ((n, r) for r in (1, 2, 3, 4, n + 2))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("c", [1.0, -0.7])
def test_product_is_exact_and_meets_the_bound(name, c):
    for n, r in small_cases():
        check_product(ZOO[name](n), r, c, 3e-14)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("r", [1, 3, 16])
def test_product_at_size_64(name, r):
    check_product(ZOO[name](64), r, 1.0, 2e-13)


@law
@given(seeds, st.integers(1, 12), st.integers(1, 5), st.integers(0, 12), st.sampled_from([1.0, -1.0, 0.3, 2.5]))
def test_product_of_an_update_of_any_rank(seed, n, r, rank, c):
    U, V = random(seed, (n, min(rank, n)), (n, min(rank, n)))
    A = c * eye(n) + U @ V.mT / max(1, n)
    d, U, V = factorise_product(A, r, c)
    assert len(d) == max(1, math.ceil(min(rank, n) / r))
    assert (dense_product(d, U, V) - A).norm() <= 1e-13 * max(A.norm().item(), abs(c))


def test_product_holds_c_in_its_first_factor():
    A = random(0, (4, 4))[0]
    d, U, V = factorise_product(A, 2, 3.0)
    assert d.tolist() == [[3.0] * 4, [1.0] * 4]
    x = random(1, (5, 4))[0]
    torch.testing.assert_close(apply(apply(x, d[0], U[0], V[0]), d[1], U[1], V[1]), x @ A.mT)
    assert factorise_product(A, 2)[0].eq(1).all()


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_product_is_as_exact_at_any_scale_with_c_of_that_scale(size):
    check_product(size * random(0, (24, 24))[0], 1, size, 1e-13)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("r", [1, 2, 3])
def test_product_in_float32(name, r):
    A = ZOO[name](9).float()
    d, U, V = factorise_product(A, r)
    assert d.dtype == U.dtype == V.dtype == torch.float32
    assert len(d) <= math.ceil(9 / r)
    assert (dense_product(d, U, V) - A).norm() <= 1e-5 * max(1, A.norm().item())


def test_product_of_float32_does_not_count_rounding_as_rank():
    Q = orthogonal(16).float()
    U, V = random(0, (16, 3), (16, 3))
    assert len(factorise_product(Q @ Q.mT, 1)[0]) == 1
    assert len(factorise_product((eye(16) + U @ V.mT).float(), 1)[0]) == 3


def test_product_tolerance_drops_what_is_below_it():
    A = eye(6) + torch.diag(torch.tensor([0.5, 0.2, 1e-5, 1e-6, 0, 0], dtype=torch.float64))
    assert len(factorise_product(A, 1)[0]) == 4
    d, U, V = factorise_product(A, 1, tolerance=1e-4)
    assert len(d) == 2
    assert (dense_product(d, U, V) - A).norm() < 2e-5


def test_product_needs_a_nonzero_c_a_positive_r_and_a_square_matrix():
    with pytest.raises(ValueError, match="c = 0 leaves low-rank factors alone"):
        factorise_product(eye(3), 1, 0)
    with pytest.raises(ValueError, match=r"r = 0; .* at least 1"):
        factorise_product(eye(3), 0)
    with pytest.raises(ValueError, match=r"A is \(3, 4\); pass a square"):
        factorise_product(eye(3, 4), 1)
    with pytest.raises(TypeError, match=r"factorise_product: got torch.bfloat16.*convert first"):
        factorise_product(eye(3).bfloat16(), 1)


@pytest.mark.parametrize("factorise", [factorise_product, factorise_sum])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_refused(factorise, value):
    A = eye(3)
    with pytest.raises(ValueError, match=f"{factorise.__name__}: c = {value}; pass a finite number"):
        factorise(A, 1, value)
    A[0, 1] = value
    with pytest.raises(ValueError, match=f"{factorise.__name__}: A has entries that are not finite"):
        factorise(A, 1)


def test_product_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(ImportError, match="install dlor-peft with its extra 'factorise'"):
        factorise_product(eye(3), 1)


@law
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 11), st.sampled_from([None, 0.0, -2.0]))
def test_sum_is_exact_and_meets_the_bound(seed, p, q, r, c):
    A = random(seed, (p, q))[0]
    c_used, U, V = factorise_sum(A, r, c)
    assert c_used == (1.0 if c is None else c)
    K = num_factors(A, r, c_used)
    assert (U.shape, V.shape) == ((K, p, r), (K, q, r))
    total = c_used * eye(p, q) + (U @ V.mT).sum(0)
    assert (total - A).norm() <= 1e-13 * max(1, A.norm().item())


@pytest.mark.parametrize("name", ZOO)
def test_sum_and_product_need_equally_many_terms(name):
    for n, r in small_cases():
        A = ZOO[name](n)
        c, U, V = factorise_sum(A, r)
        assert len(U) == len(factorise_product(A, r)[0]) == num_factors(A, r, 1.0)
        assert (c * eye(n) + (U @ V.mT).sum(0) - A).norm() <= 1e-13 * max(1, A.norm().item())


def test_sum_puts_the_largest_terms_first():
    A = random(0, (8, 6))[0]
    _, U, V = factorise_sum(A, 2, 0)
    assert (A - U[0] @ V[0].mT).norm() == pytest.approx(torch.linalg.svdvals(A)[2:].norm().item())


def test_arguments_are_not_changed():
    A = random(0, (5, 5))[0]
    copy = A.clone()
    factorise_product(A, 1)
    factorise_sum(A, 1)
    assert torch.equal(A, copy)
