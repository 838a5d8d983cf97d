"""The five operations of `reference`, whose shapes and meanings they have, in as few passes as PyTorch can.

Matrix products accumulate in float32 and are rounded to the dtype of the operands, as every frozen layer's are.
"""

import torch
from torch import Tensor

PIECE_SIZE = 2**17
"""Elements that are widened to float32 at once, on a CPU."""


def down(x: Tensor, V: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    # not x * (1 + q): in half precision the sum loses the digits of a small q
    return _times_factor(x, V), x if q is None else torch.addcmul(x, q, x)


def expand(
    t: Tensor,
    U: Tensor,
    acc: Tensor | None = None,
    x: Tensor | None = None,
    q: Tensor | None = None,
    bias: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    width = U.shape[0]
    # torch 2.11 compiles an operation whose result was written to in place without its gradient
    may_write = not torch.compiler.is_compiling()
    inplace = inplace and may_write
    if q is not None:
        assert x is not None
        acc, inplace = _plus_diagonal(acc, x, q, width, inplace), may_write
    if acc is None:
        acc = bias
    elif bias is not None:
        acc, inplace = acc.add_(bias) if inplace else acc + bias, may_write
    if U.shape[1] and inplace:
        assert acc is not None
        return acc.addmm_(t, U.T)
    if U.shape[1]:
        return t @ U.T if acc is None else torch.addmm(acc, t, U.T)
    if inplace:
        assert acc is not None
        return acc
    acc = t.new_zeros(()) if acc is None else acc
    # torch.export cannot keep the strides of a view of dynamic shape
    return acc.expand(t.shape[0], width).clone(memory_format=torch.contiguous_format)


def mul(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    t_TR, _ = down(x, V)
    return expand(t_TR, U, acc, x, q), t_TR


def bwd_rows(
    g: Tensor, U: Tensor, t: Tensor | None = None, q: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    # t^T g is faster than g^T t: the long rows of g are read in order
    dU_OR = None if t is None else (t.T @ g).T
    dq = None if y is None or q is None else _sum_of_products(g, y, q)
    return _times_factor(g, U), dU_OR, g if q is None else torch.addcmul(g, q, g), dq


def bwd_cols(
    acc: Tensor | None,
    g: Tensor | None,
    h: Tensor,
    V: Tensor,
    x: Tensor | None = None,
    q: Tensor | None = None,
    inplace: bool = False,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dV_IR = dq = None
    if x is not None:
        dV_IR = (h.T @ x).T
        if q is not None:
            assert g is not None
            dq = _sum_of_products(g, x, q)
    return expand(h, V, acc, g, q, inplace=inplace) if needs_dx else None, dV_IR, dq


def _times_factor(x: Tensor, V: Tensor) -> Tensor:
    """x V."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and V.shape[1] <= 16:
        # oneDNN is faster at few rows than at few columns
        return (V.T @ x.T).T
    return x @ V


def _plus_diagonal(acc: Tensor | None, x: Tensor, q: Tensor, width: int, inplace: bool) -> Tensor:
    """acc + q * x on the leading columns, written to acc where `inplace`, else new."""
    m = min(x.shape[1], width)
    if acc is None:
        return torch.nn.functional.pad(q * x[:, :m], (0, width - m))
    if inplace:
        acc[:, :m].addcmul_(q, x[:, :m])
        return acc
    leading = torch.addcmul(acc[:, :m], q, x[:, :m])
    return leading if m == width else torch.cat([leading, acc[:, m:]], dim=1)


def _sum_of_products(g: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """sum_t g * x, (m,), or (1,) for a scalar q; in float32 or wider."""
    m = min(g.shape[1], x.shape[1])
    g, x = g[:, :m], x[:, :m]
    dtype = torch.promote_types(g.dtype, torch.float32)
    if g.device.type == "cpu" and g.numel() and not torch.compiler.is_compiling():
        columns = _by_layer_norm(g, x, dtype)
    else:
        # not einsum, which is slower
        columns = (g.to(dtype) * x).sum(0)
    return columns if q.numel() == m else columns.sum(0, keepdim=True)


def _by_layer_norm(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_t g * x, as a layer norm of mean 0 and deviation 1 has it for its gain: one pass, no product in memory."""
    T, m = g.shape
    # half precision is widened piece by piece in memory that stays in the cache: fresh memory costs more than the sums
    rows = T if g.dtype == dtype else min(T, max(1, PIECE_SIZE // m))
    mean, gain = g.new_zeros(rows, 1, dtype=dtype), g.new_ones(m, dtype=dtype)
    deviation, sums = mean + 1, torch.zeros_like(gain)
    wide = [] if g.dtype == dtype else [g.new_empty(rows, m, dtype=dtype) for _ in range(2)]
    for a, b in zip(g.split(rows), x.split(rows), strict=True):
        size = a.shape[0]
        if wide:
            a, b = wide[0][:size].copy_(a), wide[1][:size].copy_(b)
        backward = torch.ops.aten.native_layer_norm_backward
        sums += backward(a, b, [m], mean[:size], deviation[:size], gain, None, [False, True, False])[1]
    return sums
