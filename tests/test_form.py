"""Every form against the formula of its adapted weight, written out densely in float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from dlor_peft.config import DLoRConfig
from dlor_peft.form import Form

MODES = [("additive", "auto"), *(("scaled", side) for side in ("input", "output", "both", "auto"))]
MODES += [("multiplicative", "input"), ("multiplicative", "output"), ("multiplicative", "auto")]
FORMS = [
    (mode, side, depth, diagonal, r)
    for (mode, side), depth, diagonal, r in itertools.product(MODES, (1, 2, 4), ("vector", "scalar", "none"), (0, 3))
    if (depth == 1 or mode == "multiplicative")
    and (r or diagonal != "none")
    and (diagonal != "none" or side == "auto" or mode == "multiplicative")
]


def make(mode, side, depth, diagonal, r, I=7, O=5, dtype=torch.float64) -> tuple[Form, dict[str, Tensor]]:
    config = DLoRConfig(r=r, mode=mode, side=side, depth=depth, diagonal=diagonal)
    form = Form.resolve(config, r, depth, I, O)
    generator = torch.Generator().manual_seed(0)
    draw = {n: 0.3 * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in form.shapes.items()}
    return form, {name: tensor.to(dtype).requires_grad_() for name, tensor in draw.items()}


def formula(form: Form, tensors: dict[str, Tensor], W: Tensor, s: float) -> Tensor:
    """The table of DLoRConfig, factor by factor, with full matrices."""
    O, I = W.shape
    p, q = form.widths

    def factor(name, k, *default):
        return tensors[name][k] if name in tensors else torch.zeros(*default, dtype=W.dtype)

    low_rank = [factor("dlor_U", k, p, 1) @ factor("dlor_V", k, q, 1).T for k in range(form.depth)]
    delta = [factor("dlor_diag", k, 1) for k in range(form.depth)]
    if form.mode == "additive":
        rectangle = torch.eye(O, I, dtype=W.dtype)
        diagonal = delta[0].expand(min(O, I))
        rectangle[range(min(O, I)), range(min(O, I))] = diagonal
        return W + s * (rectangle + low_rank[0])
    if form.mode == "scaled":
        left = torch.diag((1 + delta[0]).expand(O)) if form.side in ("output", "both") else torch.eye(O, dtype=W.dtype)
        inner = factor("dlor_diag_in", 0, 1) if form.side == "both" else delta[0]
        right = torch.diag((1 + inner).expand(I)) if form.side in ("input", "both") else torch.eye(I, dtype=W.dtype)
        return W + s * (left @ W @ right + low_rank[0] - W)
    P = eye = torch.eye(p, dtype=W.dtype)
    for d, UV in zip(delta, low_rank, strict=True):
        P = (torch.diag((1 + d).expand(p)) + UV) @ P
    P = eye + s * (P - eye)
    return W @ P if form.side == "input" else P @ W


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("mode", "side", "depth", "diagonal", "r"), FORMS)
def test_forward_delta_and_gradients_follow_the_formula(mode, side, depth, diagonal, r, with_bias, scale):
    form, tensors = make(mode, side, depth, diagonal, r)
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    torch.manual_seed(1)
    W, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if with_bias else None
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    x_copy = x.detach().clone().requires_grad_()
    residual = form.residual(tensors)
    inner = None if form.acts_on_output else b
    y = form.forward(residual, x, lambda z: nn.functional.linear(z, W, inner), scale, nn.Identity())
    if inner is not b:
        y = y + b
    expected_weight = formula(form, copies, W, scale)
    expected = nn.functional.linear(x_copy, expected_weight, b)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, x_copy.grad, rtol=1e-11, atol=1e-12)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, copies[name].grad, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        delta = form.delta_weight(form.residual(tensors), W) * scale
    torch.testing.assert_close(W + delta, expected_weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "side", "depth", "diagonal", "r"), FORMS)
def test_float32_stays_within_1e_5_of_float64(mode, side, depth, diagonal, r):
    form, wide = make(mode, side, depth, diagonal, r, I=100, O=63)
    tensors = {name: tensor.detach().float() for name, tensor in wide.items()}
    torch.manual_seed(2)
    W, x = torch.randn(63, 100).div(10), torch.randn(9, 100)
    expected = x.double() @ formula(form, {n: t.double() for n, t in tensors.items()}, W.double(), 1.0).T
    y = form.forward(form.residual(tensors), x, lambda z: z @ W.T, 1.0, nn.Identity())
    assert ((y - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(("mode", "side", "depth", "diagonal", "r"), FORMS)
def test_an_update_far_below_the_weight_is_not_lost_by_cancellation(mode, side, depth, diagonal, r):
    form, wide = make(mode, side, depth, diagonal, r)
    small = {n: t.detach() * (1e-6 if n != "dlor_V" else 1.0) for n, t in wide.items()}
    W = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = formula(form, small, W, 1.0) - W
    tensors = {name: tensor.float() for name, tensor in small.items()}
    delta = form.delta_weight(form.residual(tensors), W.float())
    assert ((delta - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("mode", "side", "I", "O", "resolved"),
    [
        ("scaled", "auto", 7, 5, "output"),
        ("scaled", "auto", 5, 7, "input"),
        ("scaled", "auto", 6, 6, "input"),
        ("multiplicative", "auto", 7, 5, "output"),
        ("additive", "auto", 7, 5, None),
        ("scaled", "both", 7, 5, "both"),
    ],
)
def test_auto_takes_the_smaller_side(mode, side, I, O, resolved):
    assert Form.resolve(DLoRConfig(mode=mode, side=side), 8, 1, I, O).side == resolved


def test_dropout_touches_only_the_update():
    form, tensors = make("multiplicative", "input", 2, "vector", 3)
    x, W = torch.randn(4, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    y = form.forward(form.residual(tensors), x, lambda z: z @ W.T, 1.0, torch.zeros_like)
    torch.testing.assert_close(y, x @ W.T)
