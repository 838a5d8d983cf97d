"""Stacks of factors: update() by one, and the gradients of its collapse, against the dense product in float64."""

import pytest
import torch
from dense import TOLERANCE, draw, draw_q, largest_error, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from dlor_peft.kernels import collapse_stack, update
from dlor_peft.kernels.stack import collapse_with_gradient

SIZES = [(0, 5, 2, 2), (1, 9, 1, 4), (7, 12, 0, 2), (63, 17, 8, 4), (100, 20, 3, 2), (257, 24, 16, 1), (20, 33, 16, 4)]


def stack(L, n, r, diagonal, dtype, seed=0):
    """delta, U and V of L factors that do not blow up."""
    parts = [
        None if diagonal == "none" else 0.3 * torch.stack([draw_q(diagonal, n, dtype, seed + k) for k in range(L)]),
        0.5 * draw(L, n, r, dtype=dtype, seed=seed + 20),
        0.5 * draw(L, n, r, dtype=dtype, seed=seed + 40),
    ]
    return [None if part is None else part.detach().requires_grad_() for part in parts]


def dense_residual(delta, U, V):
    """F_L ... F_1 - I written out."""
    n = U.shape[1]
    product = identity = torch.eye(n).to(U)
    for k in range(len(U)):
        scaled = identity if delta is None else torch.diag((1 + delta[k]).expand(n))
        product = (scaled + U[k] @ V[k].T) @ product
    return product - identity


@settings(deadline=None, max_examples=60)
@given(
    L=st.integers(1, 5), n=st.integers(1, 6), r=st.integers(0, 3), seed=st.integers(0, 99),
    diagonal=st.sampled_from(["vector", "scalar", "none"]),
)  # fmt: skip
def test_a_collapsed_stack_is_the_product_and_its_gradients_are_those_of_autograd(L, n, r, diagonal, seed):
    delta, U, V = stack(L, n, r, diagonal, torch.float64, seed)
    q, U_all, V_all = collapsed = collapse_stack(delta, U, V)
    matrix = U_all @ V_all.T + (0 if q is None else torch.diag(q.expand(n)))
    torch.testing.assert_close(matrix, dense_residual(delta, U, V), rtol=1e-10, atol=1e-10)
    gradients = [None if part is None else torch.randn_like(part) for part in collapsed]
    given_to = [part for part in (delta, U, V) if part is not None]
    want = torch.autograd.grad(
        [part for part in collapsed if part is not None],
        given_to,
        [part for part in gradients if part is not None],
        allow_unused=True,
        materialize_grads=True,
    )
    with torch.no_grad():
        again, gradient = collapse_with_gradient(delta, U, V)
        got = gradient(*gradients)
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(again, collapsed, strict=True))
    for one, other in zip([part for part in got if part is not None], want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("diagonal", ["vector", "scalar", "none"])
@pytest.mark.parametrize(
    ("T", "n", "r", "L"), [(63, 17, 5, 4), (100, 20, 3, 2), (1, 9, 1, 4), (7, 12, 0, 2), (0, 5, 2, 2)]
)
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_update_by_a_stack_matches_the_dense_product(T, n, r, L, diagonal, dtype, scale):
    x, parts = draw(T, n, dtype=dtype, seed=3), stack(L, n, r, diagonal, dtype)
    (exact_x, *exact), g = wide(x, *parts), draw(T, n, dtype=dtype, seed=7).detach()
    out, expected = update(x, x, *parts, scale=scale), exact_x + scale * exact_x @ dense_residual(*exact).T
    out.backward(g)
    expected.backward(g.double())
    assert out.dtype is dtype
    assert largest_error(out, expected.detach()) < 3 * TOLERANCE[dtype]
    for got, reference in zip((x, *parts), (exact_x, *exact), strict=True):
        if got is not None and got.numel() and reference.grad is not None:
            assert got.grad.dtype is dtype
            assert largest_error(got.grad, reference.grad) < 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_parts_that_are_frozen_do_not_change_the_gradient_of_the_others(trained):
    gradients = []
    for others in (True, False):
        x, parts = draw(9, 6, dtype=torch.float64).detach(), stack(3, 6, 2, "vector", torch.float64)
        for number, part in enumerate(parts):
            part.requires_grad_(others or number == trained)
        update(x, x, *parts).square().sum().backward()
        gradients.append(parts[trained].grad)
    torch.testing.assert_close(*gradients)


def test_what_is_kept_does_not_grow_with_the_depth():
    T, n, r = 50, 20, 2
    for L in (2, 6):
        x, parts = draw(T, n, dtype=torch.float32), stack(L, n, r, "vector", torch.float32)
        resident = {part.untyped_storage().data_ptr() for part in parts}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            update(x, x, *parts)
        shapes = sorted(tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in resident)
        assert shapes == sorted([(T, n), (T, L * r)])
