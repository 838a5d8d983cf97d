"""update() and linear(): every mode as one differentiable operation, which keeps x and x V for its gradients.

Shapes as in `reference`. W (O, I) and b (O,) are frozen.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import implementation, prefills
from .stack import collapse_stack, collapse_stack_backward


class _Update(torch.autograd.Function):
    """acc + q * x + (x V) U^T, and x V; `is_residual` says that acc is x itself, acc is None then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor, is_residual: bool
    ) -> tuple[Tensor, Tensor]:
        q, U, V = _cast(x.dtype, q, U, V)
        assert U is not None
        assert V is not None
        return implementation(x, U.shape[1]).mul(x if is_residual else acc, x, q, U, V)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, x, q, U, V, ctx.is_residual = inputs
        _, t = output
        _, _, needs_q, needs_U, needs_V, _ = ctx.needs_input_grad
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_q or needs_V else None, t if needs_U else None, q, U, V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 6
        x, t, *factors = ctx.saved_tensors
        needs_acc, needs_x, *needed, _ = ctx.needs_input_grad
        dx, *gradients = _gradients_of_update(g, x, t, factors, ctx.is_residual, needs_x)
        return g if needs_acc else None, dx, *_as_needed(gradients, factors, needed), None


def _gradients_of_update(
    g: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    factors: Sequence[Tensor | None],
    is_residual: bool,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dq, dU, dV; the factors are q, U and V."""
    q, U, V = _cast(g.dtype, *factors)
    ops = implementation(g, U.shape[1])
    h, dU, _, _ = ops.bwd_rows(g, U, t)
    acc = g if is_residual else None
    dx, dV, dq = ops.bwd_cols(acc, None if q is None else g, h, V, x, q, needs_dx=needs_dx)
    return dx, dq, dU, dV


class _UpdateByStack(torch.autograd.Function):
    """`_Update` by a stack of factors, which is collapsed here, and once more for the gradients.

    So nothing is kept that has the size of the collapsed factors.
    """

    @staticmethod
    def forward(
        acc: Tensor | None, x: Tensor, delta: Tensor | None, U: Tensor, V: Tensor, is_residual: bool
    ) -> tuple[Tensor, Tensor]:
        q, U, V = collapse_stack(delta, U, V)
        return _Update.forward(acc, x, q, U, V, is_residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, x, *stack, ctx.is_residual = inputs
        _, t = output
        _, _, *needed, _ = ctx.needs_input_grad
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        # the gradient of each part of a stack takes those of all parts of what it collapses to
        ctx.save_for_backward(x if any(needed) else None, t if any(needed) else None, *stack)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 6
        x, t, *stack = ctx.saved_tensors
        needs_acc, needs_x, *needed, _ = ctx.needs_input_grad
        q, U, V = collapse_stack(*stack)
        dx, dq, dU, dV = _gradients_of_update(g, x, t, (q, U, V), ctx.is_residual, needs_x)
        gradients: Any = (None,) * 3
        if dU is not None and dV is not None:
            dq = None if dq is None else dq.to(U.dtype)
            gradients = collapse_stack_backward(stack[0], stack[1], stack[2], dq, dU.to(U.dtype), dV.to(V.dtype))
        return g if needs_acc else None, dx, *_as_needed(gradients, stack, needed), None


class _Linear(torch.autograd.Function):
    """(1 + q_out) * ((x + q_in * x) W^T) + q_add * x + (x V) U^T + b, then x V, and x W^T where `keeps_y`.

    q_add and q_out are not both given. `prefills`: the frozen product accumulates onto the adapter's term, rather than
    the term onto it.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        q_add: Tensor | None,
        q_in: Tensor | None,
        q_out: Tensor | None,
        U: Tensor,
        V: Tensor,
        keeps_y: bool,
        prefills: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q_add, q_in, q_out, U, V = _cast(x.dtype, q_add, q_in, q_out, U, V)
        ops = implementation(x, U.shape[1])
        t, z = ops.down(x, V, q_in)
        if q_out is not None:
            y = z @ W.T
            return ops.expand(t, U, y, y, q_out, b, inplace=not keeps_y), t, y if keeps_y else None
        if prefills:
            return ops.expand(t, U, None, x, q_add, b).addmm_(z, W.T), t, None
        return ops.expand(t, U, torch.nn.functional.linear(z, W, b), x, q_add, inplace=True), t, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        x, W, _, q_add, q_in, q_out, U, V, _, ctx.prefills = inputs
        _, t, y = output
        _, _, _, needs_add, needs_in, _, needs_U, needs_V, _, _ = ctx.needs_input_grad
        ctx.mark_non_differentiable(*(inner for inner in (t, y) if inner is not None))
        ctx.set_materialize_grads(False)
        needs_x = needs_add or needs_in or needs_V
        ctx.save_for_backward(x if needs_x else None, W, t if needs_U else None, y, q_add, q_in, q_out, U, V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if g is None:
            return (None,) * 10
        x, W, t, y, *factors = ctx.saved_tensors
        q_add, q_in, q_out, U, V = _cast(g.dtype, *factors)
        needs_x, _, _, *needs_factors, _, _ = ctx.needs_input_grad
        ops = implementation(g, U.shape[1])
        h, dU, gy, dq_out = ops.bwd_rows(g, U, t, q_out, y)
        if q_in is not None:
            # dq_in is of the gradient that comes through W
            e = gy @ W
            dx, dV, dq = ops.bwd_cols(e, e, h, V, x, q_in, inplace=True, needs_dx=needs_x)
        else:
            g_add = None if q_add is None else g
            if not needs_x or ctx.prefills:
                dx, dV, dq = ops.bwd_cols(None, g_add, h, V, x, q_add, needs_dx=needs_x)
                dx = None if dx is None else dx.addmm_(gy, W)
            else:
                dx, dV, dq = ops.bwd_cols(gy @ W, g_add, h, V, x, q_add, inplace=True)
        gradients = (dq if q_in is None else None, None if q_in is None else dq, dq_out, dU, dV)
        return dx, None, None, *_as_needed(gradients, factors, needs_factors), None, None


def _cast(dtype: torch.dtype, *factors: Tensor | None) -> Any:
    return [None if factor is None else factor.to(dtype) for factor in factors]


def _as_needed(gradients: Any, factors: Any, needed: Any) -> list[Tensor | None]:
    """Those that are needed, in the dtype of their factor."""
    return [
        gradient.to(factor.dtype) if needs else None
        for gradient, factor, needs in zip(gradients, factors, needed, strict=True)
    ]


def without_autocast(device: str) -> AbstractContextManager:
    """In it, what is computed on devices of that type has the dtype of its operands."""
    # torch.export keeps the context in its graph
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def is_autocast(device: str) -> bool:
    """Whether autocast is on for devices of that type."""
    # the meta device has none, and asking for it raises
    return device != "meta" and torch.is_autocast_enabled(device)


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
    multiplicative form, whose input gradient is the same operation with U and V swapped. With a dimension L
    in front, q, U and V are those of the factors of a stack, O = I, and F_L ... F_1 - I stands for diag(q) + U V^T.

    dtype: that of acc; x and the factors are cast to it, so that factors kept in float32 over a bfloat16 base cost no
    copy of x. Under autocast acc = x takes the autocast dtype first. Gradients come in the dtype of their tensor,
    products accumulate in float32 for the half-precision types.

    Memory: x and x V are kept for the backward pass, and of a stack, unless it is scaled, nothing else. No input is
    written to, the result is new. Second derivatives raise.
    """
    device = x.device.type
    if U is None or V is None:
        # two tensors: torch.compile refuses one that is passed twice
        U, V = x.new_empty(x.shape[-1], 0), x.new_empty(x.shape[-1], 0)
    function = _Update if U.dim() == 2 else _UpdateByStack
    if scale != 1 and function is _UpdateByStack:
        with without_autocast(device):
            q, U, V = collapse_stack(q, U, V)
        function = _Update
    q, U = _scaled(scale, q), U if scale == 1 else U * scale
    is_residual = acc is x
    if is_residual and is_autocast(device) and x.dtype is not torch.float64:
        acc = x = x.to(torch.get_autocast_dtype(device))
    x = x.to(acc.dtype)
    width = U.shape[-2]
    acc_TO = None if is_residual else acc.reshape(-1, width)
    operation = function.apply if torch.is_grad_enabled() else function.forward
    with without_autocast(device):
        out, _ = operation(acc_TO, x.reshape(-1, x.shape[-1]), q, U, V, is_residual)
    return out.reshape(*x.shape[:-1], width)


def linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    q_add: Tensor | None = None,
    q_in: Tensor | None = None,
    q_out: Tensor | None = None,
    U: Tensor | None = None,
    V: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x W'^T + b with W' = diag(1 + s q_out) W diag(1 + s q_in) + s (diag(q_add) + U V^T), s the scale.

    The update and the frozen product in one operation. Shapes: x (..., I), W (O, I), b (O,) or None, q_add
    (min(I, O),), q_in (I,), q_out (O,), each also (1,) or None, q_add and q_out not both given; U (O, r) and V (I, r),
    or both None. W and b get no gradient.

    dtype: that of x, which is that of W and b; under autocast all three are cast as torch's linear casts them. The
    factors are cast to it. Gradients come in the dtype of their tensor.

    Memory: x and x V are kept for the backward pass, and x W^T where q_out is trained. No input is written to.
    Second derivatives raise.
    """
    if U is None or V is None:
        U, V = W.new_empty(W.shape[0], 0), W.new_empty(W.shape[1], 0)
    q_add, q_in, q_out = _scaled(scale, q_add), _scaled(scale, q_in), _scaled(scale, q_out)
    U = U if scale == 1 else U * scale
    device = x.device.type
    if is_autocast(device) and x.dtype is not torch.float64:
        x, W, b = _cast(torch.get_autocast_dtype(device), x, W, b)
    has_grad = torch.is_grad_enabled()
    operation = _Linear.apply if has_grad else _Linear.forward
    keeps_y = has_grad and q_out is not None and q_out.requires_grad
    with without_autocast(device):
        x_TI = x.reshape(-1, x.shape[-1])
        out, *_ = operation(x_TI, W, b, q_add, q_in, q_out, U, V, keeps_y, prefills(x))
    return out.reshape(*x.shape[:-1], W.shape[0])


def _scaled(scale: float, factor: Tensor | None) -> Tensor | None:
    # outside of the operation, where torch.compile takes it for a variable
    return factor if scale == 1 or factor is None else factor * scale
