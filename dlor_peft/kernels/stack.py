"""A stack of factors as one diagonal plus low rank, and the way back for its gradients: no tokens are met here.

L depth, n features, r rank; dimensions after L are a batch of stacks
    delta (L, n) or (L, 1) or None, U and V (L, n, r)
    F_k = diag(1 + delta_k) + U_k V_k^T,  F_L ... F_1 - I = diag(q) + U' V'^T
    q (n,) or (1,) or None, U' and V' (n, L r)
All in float32 or wider.
"""

from itertools import accumulate

import torch
from torch import Tensor

from ..maths import collapse, compose

Collapsed = tuple[Tensor | None, Tensor, Tensor]


def collapse_stack(delta: Tensor | None, U: Tensor, V: Tensor) -> Collapsed:
    """q, U', V'. Differentiable."""
    d, U, V = _widened(delta, U, V)
    _, U, V = collapse(d, U, V)
    if delta is None:
        return None, U, V
    # the product of the 1 + delta_k, less 1: formed without the 1, in which a small delta would round away
    delta = delta.to(U.dtype)
    q = delta[0]
    for step in delta[1:]:
        q = q + step + q * step
    return q, U, V


def collapse_stack_backward(
    delta: Tensor | None, U: Tensor, V: Tensor, dq: Tensor | None, dU: Tensor, dV: Tensor
) -> Collapsed:
    """The gradients of delta, U and V, given those of q, U' and V'; the steps of `maths.compose` are taken anew."""
    d, U, V = _widened(delta, U, V)
    factors = list(zip(d, U, V, strict=True))
    states = list(accumulate(factors[:-1], compose))
    gd = torch.zeros_like(d[0]) if dq is None else dq
    gradients = []
    for (d1, U1, V1), (d2, _, V2) in zip(reversed(states), reversed(factors), strict=False):
        dU, dU2 = dU.tensor_split([U1.shape[-1]], dim=-1)
        dV, dV2 = dV.tensor_split([V1.shape[-1]], dim=-1)
        dS = V1.mT @ dV2
        gradients.append((_over_rows(dU * U1, gd) + gd * d1, dU2, d1.unsqueeze(-1) * dV2 + U1 @ dS))
        gd = gd * d2 + _over_rows(dV2 * V2, gd)
        dV = dV + dV2 @ (V2.mT @ U1)
        dU = d2.unsqueeze(-1) * dU + V2 @ dS.mT
    gradients.append((gd, dU, dV))
    ddelta, dU, dV = (torch.stack(parts[::-1]) for parts in zip(*gradients, strict=True))
    return None if delta is None else ddelta, dU, dV


def _over_rows(products: Tensor, like: Tensor) -> Tensor:
    rows = products.sum(-1)
    return rows if like.shape == rows.shape else rows.sum(-1, keepdim=True)


def _widened(delta: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(U.dtype, torch.float32)
    d = U.new_ones(*U.shape[:-2], 1, dtype=dtype) if delta is None else 1 + delta.to(dtype)
    return d, U.to(dtype), V.to(dtype)
