"""The five operations of which both Functions are made, in plain PyTorch: the truth for every other implementation.

T tokens, I and O widths of input and output, r rank, m = min(I, O)
x (T, I)  g, y (T, O)  U (O, r)  V (I, r)  t = x V (T, r)  h = g U (T, r)  q (m,) or (1,)  bias (O,)
All of one dtype. Products and sums are taken in float32 or wider, and rounded once.
Gradients of U, V and q stay in that wider dtype.
"""

import torch
from torch import Tensor


def down(x: Tensor, V: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x V, and x + q * x, which is x itself where q is None."""
    x_TI = _wide(x)
    t_TR = (x_TI @ _wide(V)).to(x.dtype)
    return t_TR, x if q is None else (x_TI + _wide(q) * x_TI).to(x.dtype)


def expand(
    t: Tensor,
    U: Tensor,
    acc: Tensor | None = None,
    x: Tensor | None = None,
    q: Tensor | None = None,
    bias: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """acc + q * x + t U^T + bias, without what is None; x may be acc; written to acc where `inplace`, else new.

    Where the widths of x and of the result differ, q multiplies the leading columns of both.
    """
    out_TO = _wide(t) @ _wide(U).T
    if acc is not None:
        out_TO = out_TO + _wide(acc)
    if q is not None:
        assert x is not None
        m = min(x.shape[1], U.shape[0])
        out_TO[:, :m] += _wide(q) * _wide(x)[:, :m]
    if bias is not None:
        out_TO = out_TO + _wide(bias)
    return acc.copy_(out_TO) if inplace and acc is not None else out_TO.to(t.dtype)


def mul(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """acc + q * x + (x V) U^T, and x V: `down` and `expand` of one token after the other."""
    t_TR, _ = down(x, V)
    return expand(t_TR, U, acc, x, q), t_TR


def bwd_rows(
    g: Tensor, U: Tensor, t: Tensor | None = None, q: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """h = g U, dU = g^T t, g + q * g, and sum_t g * y: what the gradient g of the output gives by itself.

    Without t no dU, without q the third is g itself, without y there is no sum; summed to (1,) for a scalar q.
    """
    g_TO = _wide(g)
    dU_OR = None if t is None else g_TO.T @ _wide(t)
    scaled = g if q is None else (g_TO + _wide(q) * g_TO).to(g.dtype)
    dq = None if y is None or q is None else _as_q((g_TO * _wide(y)).sum(0), q)
    return (g_TO @ _wide(U)).to(g.dtype), dU_OR, scaled, dq


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
    """dx = acc + q * g + h V^T, dV = x^T h, and dq = sum_t g * x: what is found column by column of the input.

    g may be acc, and needs q. Without x neither dV nor dq; `inplace` writes dx to acc.
    """
    dV_IR = dq = None
    if x is not None:
        dV_IR = _wide(x).T @ _wide(h)
        if q is not None:
            assert g is not None
            m = min(x.shape[1], g.shape[1])
            dq = _as_q((_wide(g)[:, :m] * _wide(x)[:, :m]).sum(0), q)
    dx = expand(h, V, acc, g, q, inplace=inplace) if needs_dx else None
    return dx, dV_IR, dq


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _as_q(columns: Tensor, q: Tensor) -> Tensor:
    return columns if q.numel() == columns.numel() else columns.sum(0, keepdim=True)
