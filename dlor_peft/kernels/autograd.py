"""update() and linear(): every mode as one differentiable operation, which keeps x and x V for its gradients.

Shapes as in `reference`. W (O, I) and b (O,) are frozen. Where U and V are a stack, (L, n, r), q is (L, n) or (L, 1):
it is collapsed in the operation, and once more for the gradients, so that nothing of its size is kept.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..maths import apply
from .choice import implementation, prefills
from .stack import collapse_stack, collapse_with_gradient


# forward takes ctx: where there is a setup_context, apply inspects the signature of forward in every call, which takes
# longer than all else that is not arithmetic. What needs a gradient is passed: ctx knows it in forward too, but not
# under the torch.compile of torch 2.11
class _Update(torch.autograd.Function):
    """acc + q * x + (x V) U^T; `is_residual` says that acc is x itself, acc is None then."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        acc: Tensor | None,
        x: Tensor,
        q: Tensor | None,
        U: Tensor,
        V: Tensor,
        is_residual: bool,
        needed: tuple[bool, ...],
    ) -> Tensor:
        out, t = _updated(acc, x, q, U, V, is_residual)
        needs_q, needs_U, needs_V = _needed_at_once(needed, U)
        ctx.is_residual, ctx.needed = is_residual, needed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_q or needs_V else None, t if needs_U else None, q, U, V)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 7
        x, t, *factors = ctx.saved_tensors
        needs_acc, needs_x, *_ = ctx.needs_input_grad
        # the dtype was settled by the forward pass
        with without_autocast(g.device.type):
            single, gradients = _single_with_gradients(g.dtype, factors, ctx.needed)
            dx, *of_single = _update_backward(g, x, t, single, g if ctx.is_residual else None, False, needs_x)
            return g if needs_acc else None, dx, *gradients(of_single), None, None


def _updated(
    acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor, is_residual: bool
) -> tuple[Tensor, Tensor]:
    """The result, and x V."""
    q, U, V = _single(x.dtype, q, U, V)
    return implementation(x, U.shape[1]).mul(x if is_residual else acc, x, q, U, V)


class _Linear(torch.autograd.Function):
    """The frozen product x W^T + b and the update in one, by `kind`.

    additive    x W^T + b + q * x + (x V) U^T
    scaled      (1 + q) * y + (x V) U^T + b,  y = (x + q_in * x) W^T
    input       z W^T + b,                    z = x + q * x + (x V) U^T
    output      y + q * y + (y V) U^T + b,    y = x W^T
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        q: Tensor | None,
        U: Tensor,
        V: Tensor,
        q_in: Tensor | None,
        kind: str,
        prefills: bool,
        needed: tuple[bool, ...],
    ) -> Tensor:
        *factors_needed, needs_in, needs_dx = needed
        needs_q, needs_U, needs_V = _needed_at_once(factors_needed, U)
        needs_y = needs_q if kind == "scaled" else kind == "output" and (needs_q or needs_V)
        needs_x = needs_V or needs_in or (needs_q and kind != "scaled")
        out, t, y = _adapted_product(x, W, b, q, U, V, q_in, kind, prefills, needs_y)
        needs_W = needs_dx or needs_in or kind == "input"
        ctx.kind, ctx.prefills, ctx.needed = kind, prefills, needed
        ctx.set_materialize_grads(False)
        kept_x = x if needs_x and kind != "output" else None
        ctx.save_for_backward(kept_x, W if needs_W else None, t if needs_U else None, y, q, U, V, q_in)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 10
        x, W, t, y, *factors, q_in = ctx.saved_tensors
        *needed, needs_in, needs_x = ctx.needed
        with without_autocast(g.device.type):
            single, gradients = _single_with_gradients(g.dtype, factors, needed)
            dq_in = None
            if ctx.kind == "input":
                e = g @ W
                dx, *of_single = _update_backward(e, x, t, single, e, True, needs_x)
            elif ctx.kind == "output":
                dy, *of_single = _update_backward(g, y, t, single, g, False, needs_x)
                dx = None if dy is None else dy @ W
            elif ctx.kind == "additive":
                acc = g @ W if needs_x and not ctx.prefills else None
                dx, *of_single = _update_backward(g, x, t, single, acc, acc is not None, needs_x)
                dx = _accumulate(dx, g, W) if dx is not None and ctx.prefills else dx
            else:
                narrow = _cast(g.dtype, q_in)
                dx, dq_in, *of_single = _scaled_backward(g, x, W, t, y, single, narrow, ctx.prefills, needs_x)
            dq_in = dq_in.to(q_in.dtype) if needs_in and dq_in is not None else None
            return dx, None, None, *gradients(of_single), dq_in, None, None, None


def _adapted_product(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    q: Tensor | None,
    U: Tensor,
    V: Tensor,
    q_in: Tensor | None,
    kind: str,
    prefills: bool,
    keeps_y: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, x V (or y V), and y where it is kept.

    `prefills`: where no diagonal is on y, the frozen product accumulates onto the term in U, instead of that onto it.
    """
    (q, U, V), q_in = _single(x.dtype, q, U, V), _cast(x.dtype, q_in)
    ops = implementation(x, U.shape[1])
    if kind == "input":
        z, t = ops.mul(x, x, q, U, V)
        return F.linear(z, W, b), t, None
    if kind == "output":
        y = x @ W.T
        t, _ = ops.down(y, V)
    else:
        t, z = ops.down(x, V, q_in)
        if kind == "additive" or q is None:
            if prefills:
                return _accumulate(ops.expand(t, U, None, x, q, b), z, W.T), t, None
            return ops.expand(t, U, F.linear(z, W, b), x, q, inplace=True), t, None
        y = z @ W.T
    return ops.expand(t, U, y, y, q, b, inplace=not keeps_y), t, y if keeps_y else None


Gradients = tuple[Tensor | None, ...]


def _update_backward(
    g: Tensor, x: Tensor | None, t: Tensor | None, factors: Any, acc: Tensor | None, inplace: bool, needs_dx: bool
) -> Gradients:
    """dx, dq, dU, dV of q * x + (x V) U^T; acc is what else there is of dx, and is written to where `inplace`."""
    q, U, V = factors
    ops = implementation(g, U.shape[1])
    h, dU, _, _ = ops.bwd_rows(g, U, t)
    dx, dV, dq = ops.bwd_cols(acc, None if q is None else g, h, V, x, q, inplace, needs_dx)
    return dx, dq, dU, dV


def _scaled_backward(
    g: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    t: Tensor | None,
    y: Tensor | None,
    factors: Any,
    q_in: Tensor | None,
    prefills: bool,
    needs_dx: bool,
) -> Gradients:
    """dx, dq_in, dq, dU, dV; W is None where neither of the first two is needed."""
    q, U, V = factors
    ops = implementation(g, U.shape[1])
    h, dU, gy, dq = ops.bwd_rows(g, U, t, q, y)
    if q_in is not None and W is not None:
        # dq_in is of the gradient that comes through W
        e = gy @ W
        dx, dV, dq_in = ops.bwd_cols(e, e, h, V, x, q_in, True, needs_dx)
        return dx, dq_in, dq, dU, dV
    through_W = gy @ W if W is not None and not prefills else None
    dx, dV, _ = ops.bwd_cols(through_W, None, h, V, x, None, not prefills, needs_dx)
    return _accumulate(dx, gy, W) if dx is not None and W is not None and prefills else dx, None, dq, dU, dV


def _accumulate(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """acc + a b, written to acc; under torch.compile it is new, see `eager.expand`."""
    return torch.addmm(acc, a, b) if torch.compiler.is_compiling() else acc.addmm_(a, b)


def _cast(dtype: torch.dtype, factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.to(dtype)


def _single(dtype: torch.dtype, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """q, U and V of one factor, in that dtype."""
    if U.dim() == 3:
        q, U, V = collapse_stack(q, U, V)
    return _cast(dtype, q), U.to(dtype), V.to(dtype)


def _single_with_gradients(dtype: torch.dtype, factors: Sequence[Any], needed: Sequence[bool]) -> tuple[Any, Any]:
    """q, U and V of one factor, and what takes their gradients to those that are needed of the factors as given."""
    single, through_stack = factors, None
    if factors[1].dim() == 3:
        single, through_stack = collapse_with_gradient(*factors)

    def gradients(of_single: Sequence[Tensor | None]) -> list[Tensor | None]:
        if not any(needed):
            return [None] * 3
        if through_stack is not None:
            dq, dU, dV = of_single
            assert dU is not None
            assert dV is not None
            wide = single[1].dtype
            of_single = through_stack(_cast(wide, dq), dU.to(wide), dV.to(wide))
        return [
            gradient.to(factor.dtype) if needs and gradient is not None else None
            for gradient, factor, needs in zip(of_single, factors, needed, strict=True)
        ]

    return [_cast(dtype, factor) for factor in single], gradients


def _need(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(tensor is not None and tensor.requires_grad for tensor in tensors)


def _needed_at_once(needed: Sequence[bool], U: Tensor) -> Sequence[bool]:
    # the gradient of each part of a stack takes those of all parts of what it collapses to
    return [any(needed)] * 3 if U.dim() == 3 else needed


def without_autocast(device: str) -> AbstractContextManager:
    """In it, what is computed on devices of that type has the dtype of its operands."""
    # torch.export keeps the context in its graph
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def is_autocast(device: str) -> bool:
    """Whether autocast is on for devices of that type."""
    # the meta device has none, and asking for it raises
    return device != "meta" and torch.is_autocast_enabled(device)


def is_transformed() -> bool:
    """Whether torch.func is at work, which takes PyTorch's own operations only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def update(
    acc: Tensor,
    x: Tensor,
    q: Tensor | None,
    U: Tensor | None = None,
    V: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """acc + scale (q * x + (x V) U^T), the one operation that every mode is made of.

    Shapes: acc (..., O), x (..., I), q (min(I, O),) or (1,) or None, U (O, r), V (I, r), r >= 0, or both None where
    there is no low-rank part (O = I then). q multiplies the leading min(I, O) features. `acc is x` is the
    multiplicative form, whose input gradient is the same operation with U and V swapped. With a dimension L in front,
    q, U and V are those of the factors of a stack, O = I, and F_L ... F_1 - I stands for diag(q) + U V^T.

    dtype: that of acc; x and the factors are cast to it, so that factors kept in float32 over a bfloat16 base cost no
    copy of x. Under autocast acc = x takes the autocast dtype first. Gradients come in the dtype of their tensor,
    products accumulate in float32 for the half-precision types.

    Memory: x and x V are kept for the backward pass, nothing else of the size of x, and of a stack nothing else at all
    unless it is scaled. No input is written to, the result is new. Second derivatives raise. Under torch.func it is
    made of PyTorch's own operations, and all that autograd keeps is kept.
    """
    if U is None or V is None:
        # two tensors: torch.compile refuses one that is passed twice
        U, V = x.new_empty(x.shape[-1], 0), x.new_empty(x.shape[-1], 0)
    q, U, V = _scaled(scale, q, U, V)
    device = x.device.type
    is_residual = acc is x
    if is_residual and is_autocast(device) and x.dtype is not torch.float64:
        acc = x = x.to(torch.get_autocast_dtype(device))
    x = x.to(acc.dtype)
    width = U.shape[-2]
    acc_TO = None if is_residual else acc.reshape(-1, width)
    if is_transformed():
        with without_autocast(device):
            q, U, V = _single(x.dtype, q, U, V)
            return acc + apply(x, x.new_zeros(1) if q is None else q, U, V)
    with without_autocast(device):
        inputs = acc_TO, x.reshape(-1, x.shape[-1]), q, U, V, is_residual
        out = _Update.apply(*inputs, _need(q, U, V)) if torch.is_grad_enabled() else _updated(*inputs)[0]
    return out.reshape(*x.shape[:-1], width)


def linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    kind: str,
    q: Tensor | None,
    U: Tensor,
    V: Tensor,
    q_in: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x W'^T + b, the frozen product and the update in one operation; s is the scale.

        kind        W'                                                      q, U, V
        "additive"  W + s (diag(q) + U V^T)                                 (min(I, O),), (O, r), (I, r)
        "scaled"    diag(1 + s q) W diag(1 + s q_in) + s U V^T              (O,), (O, r), (I, r), q_in (I,)
        "input"     W (I + s (diag(q) + U V^T))                             (I,), (I, r), (I, r), or a stack of them
        "output"    (I + s (diag(q) + U V^T)) W                             (O,), (O, r), (O, r), or a stack of them

    x (..., I), W (O, I), b (O,) or None; a diagonal is also (1,) or None, r may be 0. Of a stack, which has a
    dimension L in front, F_L ... F_1 - I stands for diag(q) + U V^T. W and b get no gradient.

    dtype: that of x, W and b; under autocast they are cast to the autocast dtype. The factors are cast to it.
    Gradients come in the dtype of their tensor.

    Memory: x (kind "output": x W^T in its place) and x V are kept for the backward pass, and x W^T where "scaled" has
    a q that is trained; W too, which under autocast may be a copy. No input is written to. Second derivatives raise.
    """
    q, U, V = _scaled(scale, q, U, V)
    q_in = q_in if scale == 1 or q_in is None else q_in * scale
    device = x.device.type
    if is_autocast(device):
        dtype = torch.get_autocast_dtype(device)
        x, W, b = x.to(dtype), W.to(dtype), _cast(dtype, b)
    with without_autocast(device):
        inputs = x.reshape(-1, x.shape[-1]), W, b, q, U, V, q_in, kind, prefills(x)
        if torch.is_grad_enabled():
            out = _Linear.apply(*inputs, _need(q, U, V, q_in, x))
        else:
            out, *_ = _adapted_product(*inputs, keeps_y=False)
    return out.reshape(*x.shape[:-1], W.shape[0])


def _scaled(scale: float, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    # outside of the operation, where torch.compile takes the scale for a variable
    if scale == 1:
        return q, U, V
    if U.dim() == 3:
        with without_autocast(U.device.type):
            q, U, V = collapse_stack(q, U, V)
    return None if q is None else q * scale, U * scale, V
