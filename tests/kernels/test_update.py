"""update() and its gradients against a dense float64 reference."""

import pytest
import torch
from dense import SIZES, TOLERANCE, draw, draw_q, largest_error, rectangular, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE
from torch import Tensor

from dlor_peft.kernels import update
from dlor_peft.kernels.reference import mul as reference_update

NAMES = ("acc", "x", "q", "U", "V")


def dense(acc: Tensor, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor, scale: float) -> Tensor:
    """acc + scale x M^T with the matrix M = diag(q) + U V^T written out, rectangular where U and V differ in rows."""
    return acc + scale * x @ (U @ V.T + rectangular(q, U.shape[0], V.shape[0])).T


def tensors(T, I, O, r, diagonal, dtype, seed=0):
    shapes = {"acc": (T, O), "x": (T, I), "U": (O, r), "V": (I, r)}
    acc, x, U, V = (draw(*shape, dtype=dtype, seed=seed + k) for k, shape in enumerate(shapes.values()))
    return acc, x, draw_q(diagonal, min(I, O), dtype, seed), U, V


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("diagonal", ["vector", "scalar", "none"])
@pytest.mark.parametrize(("T", "I", "O", "r"), SIZES)
def test_forward_and_every_gradient_match_the_dense_reference(T, I, O, r, diagonal, dtype):
    inputs = tensors(T, I, O, r, diagonal, dtype)
    exact = wide(*inputs)
    g = torch.randn(T, O, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    out, expected = update(*inputs, scale=0.7), dense(*exact, scale=0.7)
    out.backward(g)
    expected.backward(g.double())
    assert out.dtype is dtype
    assert largest_error(out, expected.detach()) < TOLERANCE[dtype]
    for name, got, reference in zip(NAMES, inputs, exact, strict=True):
        if got is not None and got.numel() and (reference.grad is not None):
            assert got.grad.dtype is dtype, name
            assert largest_error(got.grad, reference.grad) < TOLERANCE[dtype], name


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("diagonal", ["vector", "scalar", "none"])
def test_the_residual_form_adds_both_paths_of_the_input_gradient(diagonal, dtype):
    _, x, q, U, V = tensors(31, 19, 19, 4, diagonal, dtype)
    exact = wide(x, q, U, V)
    out, expected = update(x, x, q, U, V, scale=1.3), dense(exact[0], *exact, scale=1.3)
    out.sum().backward()
    expected.sum().backward()
    assert largest_error(out, expected.detach()) < TOLERANCE[dtype]
    for got, reference in zip((x, q, U, V), exact, strict=True):
        if got is not None:
            assert largest_error(got.grad, reference.grad) < 2 * TOLERANCE[dtype]


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(0, 5), I=st.integers(1, 6), O=st.integers(1, 6), r=st.integers(0, 4), seed=st.integers(0, 99),
    scale=st.floats(-3, 3), diagonal=st.sampled_from(["vector", "scalar", "none"]),
)  # fmt: skip
def test_update_is_linear_in_the_residual(T, I, O, r, seed, scale, diagonal):
    acc, x, q, U, V = tensors(T, I, O, r, diagonal, torch.float64, seed)
    whole = update(acc, x, q, U, V, scale=scale) - acc
    torch.testing.assert_close(whole, scale * (update(acc, x, q, U, V) - acc), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole, update(torch.zeros_like(acc), x, q, U, V, scale=scale), rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs = tensors(5, 4, 6, 2, "vector", torch.float64)
    assert torch.autograd.gradcheck(lambda *t: update(*t, scale=0.5), inputs)
    square = tensors(5, 4, 4, 2, "vector", torch.float64)[1:]
    assert torch.autograd.gradcheck(lambda x, q, U, V: update(x, x, q, U, V, scale=0.5), square)


def test_second_derivatives_raise_instead_of_being_wrong():
    _, x, q, U, V = tensors(3, 4, 4, 2, "vector", torch.float64)
    (dx,) = torch.autograd.grad(update(x, x, q, U, V).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_inputs_are_not_written_to_and_the_result_is_new():
    inputs = tensors(6, 5, 5, 0, "none", torch.float32)
    before = [None if t is None else t.detach().clone() for t in inputs]
    out = update(*inputs)
    out.detach().fill_(torch.nan)
    for t, original in zip(inputs, before, strict=True):
        assert t is None or torch.equal(t, original)


def test_leading_dimensions_and_strides_do_not_matter():
    acc, x, q, U, V = tensors(24, 7, 5, 2, "vector", torch.float64)
    flat = update(acc, x, q, U, V)
    strided = x.reshape(2, 3, 4, 7).transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(update(acc.reshape(2, 3, 4, 5), strided, q, U, V).reshape(24, 5), flat)


def test_factors_in_float32_over_bfloat16_activations_keep_their_gradient_dtype():
    acc, x, *_ = tensors(8, 6, 6, 2, "vector", torch.bfloat16)
    *_, q, U, V = tensors(8, 6, 6, 2, "vector", torch.float32)
    out = update(acc, x, q, U, V)
    out.sum().backward()
    assert out.dtype is x.grad.dtype is torch.bfloat16
    assert q.grad.dtype is U.grad.dtype is V.grad.dtype is torch.float32


def test_only_x_and_xV_are_saved_of_the_size_of_the_tokens():
    T, I, r = 50, 20, 3
    _, x, q, U, V = tensors(T, I, I, r, "vector", torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        update(x, x, q, U, V)
    assert sorted(tuple(t.shape) for t in saved if t.shape[0] == T) == [(T, r), (T, I)]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_frozen_factors_save_nothing_of_the_size_of_the_tokens():
    _, x, q, U, V = tensors(50, 20, 20, 3, "vector", torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        update(x, x, q.detach(), U.detach(), V.detach())
    assert all(t.shape[0] != 50 for t in saved)


def test_autocast_takes_the_residual_form_to_the_autocast_dtype():
    _, x, q, U, V = tensors(8, 6, 6, 2, "vector", torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = update(x, x, q, U, V)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert x.grad.dtype is U.grad.dtype is torch.float32


def test_the_reference_returns_xV():
    acc, x, q, U, V = tensors(8, 6, 5, 2, "vector", torch.float64)
    torch.testing.assert_close(reference_update(acc, x, q, U, V)[1], x @ V)


@pytest.mark.parametrize("value", [300.0, 1e-4])
def test_the_gradient_of_the_diagonal_bears_products_beyond_half_precision(value):
    """Above 65504 they are infinite in float16, and below 6e-8 zero; the sums over tokens are neither."""
    T = 4096
    x = torch.full((T, 3), value, dtype=torch.float16, requires_grad=True)
    q = torch.zeros(3, requires_grad=True)
    g = torch.full((T, 3), value, dtype=torch.float16)
    g[: T // 4] *= -1
    update(torch.zeros_like(x), x, q).backward(g)
    want = (g.double() * x.detach().double()).sum(0)
    torch.testing.assert_close(q.grad.double(), want, rtol=1e-3, atol=0)
