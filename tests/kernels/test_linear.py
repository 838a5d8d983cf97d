"""linear() and its gradients against a dense float64 reference."""

import pytest
import torch
from dense import TOLERANCE, draw, draw_q, largest_error, rectangular, wide
from torch import Tensor

from dlor_peft.kernels import choice, linear

PLACES = {"additive": ("q_add",), "input": ("q_in",), "output": ("q_out",), "both": ("q_in", "q_out"), "none": ()}
SIZES = [
    (0, 8, 5, 2),
    (1, 9, 31, 1),
    (7, 12, 12, 0),
    (63, 17, 17, 8),
    (100, 33, 20, 3),
    (257, 19, 24, 16),
    (20, 70, 66, 64),
]


@pytest.fixture(params=[False, True], ids=["product first", "prefill"])
def order(request, monkeypatch):
    """Both orders, whichever is faster on this device."""
    monkeypatch.setattr(choice, "prefills", lambda x: request.param)
    monkeypatch.setattr("dlor_peft.kernels.autograd.prefills", lambda x: request.param)


def dense(x: Tensor, W: Tensor, b: Tensor | None, U: Tensor, V: Tensor, scale: float, **diagonals: Tensor) -> Tensor:
    """x W'^T + b with the matrix W' written out."""
    O, I = W.shape
    q = {name: diagonals.get(name) for name in ("q_add", "q_in", "q_out")}
    left, right = (torch.eye(n).to(x) + scale * rectangular(q[at], n, n) for n, at in ((O, "q_out"), (I, "q_in")))
    W_adapted = left @ W @ right + scale * (rectangular(q["q_add"], O, I) + U @ V.T)
    return x @ W_adapted.T + (0 if b is None else b)


def tensors(T, I, O, r, place, diagonal, dtype, has_bias):
    x, W, U, V = (draw(*shape, dtype=dtype, seed=k) for k, shape in enumerate([(T, I), (O, I), (O, r), (I, r)]))
    widths = {"q_add": min(I, O), "q_in": I, "q_out": O}
    diagonals = {name: draw_q(diagonal, widths[name], dtype, seed=9) for name in PLACES[place]}
    b = draw(O, dtype=dtype, seed=5).detach() if has_bias else None
    return x, W.detach(), b, U, V, diagonals


@pytest.mark.usefixtures("order", "implementation")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("T", "I", "O", "r"), SIZES)
def test_forward_and_every_gradient_match_the_dense_reference(T, I, O, r, place, dtype):
    for diagonal, has_bias, scale in (("vector", True, 1.0), ("scalar", False, 0.7)):
        x, W, b, U, V, diagonals = tensors(T, I, O, r, place, diagonal, dtype, has_bias)
        exact_x, exact_W, exact_b, exact_U, exact_V = wide(x, W, b, U, V)
        exact = dict(zip(diagonals, wide(*diagonals.values()), strict=True))
        g = draw(T, O, dtype=dtype, seed=7).detach()
        out = linear(x, W, b, U=U, V=V, scale=scale, **diagonals)
        expected = dense(exact_x, exact_W, exact_b, exact_U, exact_V, scale, **exact)
        out.backward(g)
        expected.backward(g.double())
        assert out.dtype is dtype
        assert largest_error(out, expected.detach()) < TOLERANCE[dtype]
        pairs = {"x": (x, exact_x), "U": (U, exact_U), "V": (V, exact_V)}
        pairs |= {name: (q, exact[name]) for name, q in diagonals.items()}
        for name, (got, reference) in pairs.items():
            assert got.grad.dtype is dtype, name
            assert largest_error(got.grad, reference.grad) < 3 * TOLERANCE[dtype], name


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("place", PLACES)
def test_gradcheck(place):
    x, W, b, U, V, diagonals = tensors(5, 4, 6, 2, place, "vector", torch.float64, True)

    def of(x, U, V, *q):
        return linear(x, W, b, U=U, V=V, scale=0.5, **dict(zip(diagonals, q, strict=True)))

    assert torch.autograd.gradcheck(of, (x, U, V, *diagonals.values()))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("trained", ["x", "U", "V", "q", "nothing"])
def test_each_gradient_alone_is_what_it_is_among_all(place, trained):
    def gradients(of):
        x, W, b, U, V, diagonals = tensors(9, 6, 4, 2, place, "vector", torch.float64, True)
        every = {"x": [x], "U": [U], "V": [V], "q": list(diagonals.values()), "nothing": []}
        for t in (t for ts in every.values() for t in ts):
            t.requires_grad_(of is None)
        for t in [] if of is None else every[of]:
            t.requires_grad_()
        out = linear(x, W, b, U=U, V=V, **diagonals)
        if out.requires_grad:
            out.square().sum().backward()
        return out.detach(), [t.grad for t in every["nothing" if of is None else of]], every

    out, alone, _ = gradients(trained)
    expected_out, _, among_all = gradients(None)
    torch.testing.assert_close(out, expected_out)
    for got, want in zip(alone, among_all[trained], strict=True):
        torch.testing.assert_close(got, want.grad)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("place", PLACES)
def test_no_input_is_written_to_and_only_what_gradients_need_is_kept(place):
    T, I, O, r = 50, 20, 30, 3
    x, W, b, U, V, diagonals = tensors(T, I, O, r, place, "vector", torch.float32, True)
    before = [t.detach().clone() for t in (x, W, b, U, V, *diagonals.values())]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear(x, W, b, U=U, V=V, **diagonals)
    g = torch.ones(1, 1).expand(T, O)
    out.backward(g, retain_graph=True)
    first = x.grad.clone()
    out.backward(g)
    assert torch.equal(x.grad, 2 * first)
    for t, original in zip((x, W, b, U, V, *diagonals.values()), before, strict=True):
        assert torch.equal(t, original)
    of_tokens = sorted(tuple(t.shape) for t in saved if t.shape[0] == T)
    assert of_tokens == sorted([(T, r), (T, I)] + [(T, O)] * (place in ("output", "both")))
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_autocast_gives_what_torch_gives_for_the_frozen_layer():
    x, W, b, U, V, _ = tensors(8, 6, 5, 2, "none", "none", torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x, W, b, U=torch.zeros_like(U, requires_grad=True), V=V)
        frozen = torch.nn.functional.linear(x, W, b)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, frozen)
    out.sum().backward()
    assert x.grad.dtype is torch.float32


def test_gradients_are_the_same_in_every_run():
    runs = []
    for _ in range(2):
        x, W, b, U, V, diagonals = tensors(257, 33, 17, 5, "both", "vector", torch.bfloat16, True)
        linear(x, W, b, U=U, V=V, **diagonals).sum().backward()
        runs.append([t.grad for t in (x, U, V, *diagonals.values())])
    assert all(map(torch.equal, *runs))
