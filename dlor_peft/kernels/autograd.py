"""update() as one differentiable operation that keeps only x and x V."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference


class _Update(torch.autograd.Function):
    """acc + q * x + (x V) U^T for 2-D tensors, and x V; `is_residual` says that acc is x itself, acc is None then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor, is_residual: bool
    ) -> tuple[Tensor, Tensor]:
        q_cast = None if q is None else q.to(x.dtype)
        return reference.update(x if is_residual else acc, x, q_cast, U.to(x.dtype), V.to(x.dtype))

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
        x, t, q, U, V = ctx.saved_tensors
        needs_acc, needs_x, needs_q, needs_U, needs_V, _ = ctx.needs_input_grad
        dx = dq = dU = dV = gU = None
        if needs_x:
            q_cast = None if q is None else q.to(g.dtype)
            dx, gU = reference.update(g if ctx.is_residual else None, g, q_cast, V.to(g.dtype), U.to(g.dtype))
        elif needs_V:
            gU = g @ U.to(g.dtype)
        if needs_q:
            assert q is not None
            dq = reference.grad_q(g, x, q).to(q.dtype)
        if needs_U:
            dU = reference.grad_U(g, t).to(U.dtype)
        if needs_V:
            assert gU is not None
            dV = reference.grad_V(x, gU).to(V.dtype)
        return g if needs_acc else None, dx, dq, dU, dV, None


def without_autocast(device: str) -> AbstractContextManager:
    """In it, what is computed on devices of that type has the dtype of its operands."""
    # torch.export keeps the context in its graph
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


def _is_autocast(device: str) -> bool:
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
    multiplicative form, whose input gradient is the same operation with U and V swapped.

    dtype: that of acc; x and the factors are cast to it, so that factors kept in float32 over a bfloat16 base cost no
    copy of x. Under autocast acc = x takes the autocast dtype first. Gradients come in the dtype of their tensor,
    products accumulate in float32 for the half-precision types.

    Memory: x and x V are kept for the backward pass, nothing else of the size of x. No input is written to, the result
    is new. Second derivatives raise.
    """
    if U is None or V is None:
        # two tensors: torch.compile refuses one that is passed twice
        U, V = x.new_empty(x.shape[-1], 0), x.new_empty(x.shape[-1], 0)
    if scale != 1:
        # outside of the operation, where torch.compile takes it for a variable
        q, U = None if q is None else q * scale, U * scale
    device = x.device.type
    is_residual = acc is x
    if is_residual and _is_autocast(device) and x.dtype is not torch.float64:
        acc = x = x.to(torch.get_autocast_dtype(device))
    x = x.to(acc.dtype)
    width = U.shape[0]
    acc_TO = None if is_residual else acc.reshape(-1, width)
    operation = _Update.apply if torch.is_grad_enabled() else _Update.forward
    with without_autocast(device):
        out, _ = operation(acc_TO, x.reshape(-1, x.shape[-1]), q, U, V, is_residual)
    return out.reshape(*x.shape[:-1], width)
