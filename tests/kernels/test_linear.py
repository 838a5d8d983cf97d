"""linear() and its gradients against a dense float64 reference."""

import pytest
import torch
from dense import SIZES, TOLERANCE, draw, draw_q, largest_error, rectangular, wide
from interpreted import DEVICE
from torch import Tensor

from dlor_peft.kernels import collapse_stack, linear

KINDS = {
    "additive": ("q",),
    "scaled input": ("q_in",),
    "scaled output": ("q",),
    "scaled both": ("q", "q_in"),
    "scaled none": (),
    "input": ("q",),
    "output": ("q",),
}


@pytest.fixture(params=[False, True], ids=["product first", "prefill"])
def order(request, monkeypatch):
    """Both orders, whichever is faster on this device."""
    monkeypatch.setattr("dlor_peft.kernels.autograd.prefills", lambda x: request.param)


def dense(x, W, b, kind, q, U, V, q_in=None, scale=1.0) -> Tensor:
    """x W'^T + b with the matrix W' written out."""
    O, I = W.shape

    def eye(n):
        return torch.eye(n).to(W)

    if kind == "additive":
        W = W + scale * (rectangular(q, O, I) + U @ V.T)
    elif kind == "scaled":
        W = (eye(O) + scale * rectangular(q, O, O)) @ W @ (eye(I) + scale * rectangular(q_in, I, I)) + scale * U @ V.T
    elif kind == "input":
        W = W @ (eye(I) + scale * (rectangular(q, I, I) + U @ V.T))
    else:
        W = (eye(O) + scale * (rectangular(q, O, O) + U @ V.T)) @ W
    return x @ W.T + (0 if b is None else b)


def tensors(T, I, O, r, kind, diagonal, dtype, has_bias):
    """x, W, b and the rest by name; what is trained requires a gradient."""
    rows, columns = {"input": (I, I), "output": (O, O)}.get(kind, (O, I))
    shapes = {"x": (T, I), "W": (O, I), "U": (rows, r), "V": (columns, r)}
    drawn = {name: draw(*shape, dtype=dtype, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    widths = {"q": min(rows, columns) if kind != "scaled output" and kind != "scaled both" else O, "q_in": I}
    q, q_in = (draw_q(diagonal, widths[n], dtype, 9) if n in KINDS[kind] else None for n in ("q", "q_in"))
    b = draw(O, dtype=dtype, seed=5).detach() if has_bias else None
    rest = {"q": q, "U": drawn["U"], "V": drawn["V"], "q_in": q_in}
    return drawn["x"], drawn["W"].detach(), b, kind.split()[0], rest


@pytest.mark.usefixtures("order", "implementation")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "I", "O", "r"), SIZES)
def test_forward_and_every_gradient_match_the_dense_reference(T, I, O, r, kind, dtype):
    for diagonal, has_bias, scale in (("vector", True, 1.0), ("scalar", False, 0.7)):
        x, W, b, kind_only, rest = tensors(T, I, O, r, kind, diagonal, dtype, has_bias)
        exact_x, exact_W, exact_b = wide(x, W, b)
        exact = dict(zip(rest, wide(*rest.values()), strict=True))
        g = draw(T, O, dtype=dtype, seed=7).detach()
        out = linear(x, W, b, kind_only, **rest, scale=scale)
        expected = dense(exact_x, exact_W, exact_b, kind_only, **exact, scale=scale)
        out.backward(g)
        expected.backward(g.double())
        assert out.dtype is dtype
        assert largest_error(out, expected.detach()) < 2 * TOLERANCE[dtype]
        for name, got, reference in [("x", x, exact_x), *((name, rest[name], exact[name]) for name in rest)]:
            if got is not None:
                assert got.grad.dtype is dtype, name
                assert largest_error(got.grad, reference.grad) < 4 * TOLERANCE[dtype], name


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    x, W, b, kind, rest = tensors(5, 4, 6, 2, kind, "vector", torch.float64, True)
    names = [name for name, t in rest.items() if t is not None]

    def of(x, *factors):
        return linear(x, W, b, kind, **{**rest, **dict(zip(names, factors, strict=True))}, scale=0.5)

    assert torch.autograd.gradcheck(of, (x, *(rest[name] for name in names)))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["x", "U", "V", "q", "q_in", "nothing"])
def test_each_gradient_alone_is_what_it_is_among_all(kind, trained):
    results = []
    for among_all in (False, True):
        x, W, b, kind_only, rest = tensors(9, 6, 4, 2, kind, "vector", torch.float64, True)
        of = {"x": x, **rest}
        for name, t in of.items():
            if t is not None:
                t.requires_grad_(among_all or name == trained)
        out = linear(x, W, b, kind_only, **rest)
        if out.requires_grad:
            out.square().sum().backward()
        results.append((out.detach(), None if of.get(trained) is None else of[trained].grad))
    (out, alone), (expected_out, among_all) = results
    torch.testing.assert_close(out, expected_out)
    if among_all is not None:
        torch.testing.assert_close(alone, among_all)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_is_written_to_and_only_what_gradients_need_is_kept(kind):
    T, I, O, r = 50, 20, 30, 3
    x, W, b, kind_only, rest = tensors(T, I, O, r, kind, "vector", torch.float32, True)
    given = [t for t in (x, W, b, *rest.values()) if t is not None]
    before = [t.detach().clone() for t in given]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear(x, W, b, kind_only, **rest)
    g = torch.ones(1, 1).to(x).expand(T, O)
    out.backward(g, retain_graph=True)
    first = x.grad.clone()
    out.backward(g)
    assert torch.equal(x.grad, 2 * first)
    assert all(map(torch.equal, given, before))
    of_tokens = {"output": [(T, O)], "scaled output": [(T, I), (T, O)], "scaled both": [(T, I), (T, O)]}
    assert sorted(tuple(t.shape) for t in saved if t.shape[0] == T) == sorted([(T, r), *of_tokens.get(kind, [(T, I)])])
    assert kind == "output" or any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_stack_is_what_it_collapses_to(kind):
    x, W, b, kind, _ = tensors(9, 6, 4, 2, kind, "vector", torch.float64, True)
    width = 6 if kind == "input" else 4
    stack = [0.3 * draw(3, *shape, dtype=torch.float64).detach() for shape in ((width,), (width, 2), (width, 2))]
    for part in stack:
        part.requires_grad_()
    for scale in (1.0, 0.7):
        results = []
        for factors in (stack, collapse_stack(*stack)):
            out = linear(x, W, b, kind, *factors, scale=scale)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), [x, *stack])))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_autocast_gives_what_torch_gives_for_the_frozen_layer():
    x, W, b, _, rest = tensors(8, 6, 5, 2, "scaled none", "none", torch.float32, True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear(x, W, b, "additive", None, torch.zeros_like(rest["U"], requires_grad=True), rest["V"])
        frozen = torch.nn.functional.linear(x, W, b)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, frozen)
    out.sum().backward()
    assert x.grad.dtype is torch.float32


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_in_every_run(kind):
    runs = []
    for _ in range(2):
        x, W, b, kind_only, rest = tensors(257, 33, 17, 5, kind, "vector", torch.bfloat16, True)
        linear(x, W, b, kind_only, **rest).sum().backward()
        runs.append([t.grad for t in (x, *rest.values()) if t is not None])
    assert all(map(torch.equal, *runs))
