"""A stack of factors as one diagonal plus low rank, and the way back for its gradients: no tokens are met here.

L depth, n features, r rank; dimensions after L are a batch of stacks, which only `collapse_stack` takes
    delta (L, n) or (L, 1) or None, U and V (L, n, r)
    F_k = diag(1 + delta_k) + U_k V_k^T,  F_L ... F_1 - I = diag(q) + U' V'^T
    q (n,) or (1,) or None, U' and V' (n, L r)
All in float32 or wider.
"""

from collections.abc import Callable
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from ..maths import DLoR, compose

Factors = tuple[Tensor | None, Tensor, Tensor]


def collapse_stack(delta: Tensor | None, U: Tensor, V: Tensor) -> Factors:
    """q, U', V'. Differentiable."""
    return _collapsed(delta, reduce(compose, _split(delta, U, V)))


def collapse_with_gradient(
    delta: Tensor | None, U: Tensor, V: Tensor
) -> tuple[Factors, Callable[[Tensor | None, Tensor, Tensor], Factors]]:
    """q, U', V', and what takes their gradients to those of delta, U and V."""
    factors = _split(delta, U, V)
    states = list(accumulate(factors, compose))

    def gradient(dq: Tensor | None, dU: Tensor, dV: Tensor) -> Factors:
        gd = torch.zeros_like(factors[0][0]) if dq is None else dq
        parts = []
        # back through each `compose`
        for (d1, U1, V1), (d2, _, V2) in zip(states[-2::-1], factors[:0:-1], strict=True):
            dU, dU2 = dU.tensor_split([U1.shape[-1]], dim=-1)
            dV, dV2 = dV.tensor_split([V1.shape[-1]], dim=-1)
            dS = V1.mT @ dV2
            parts.append((_over_rows(dU * U1, gd) + gd * d1, dU2, torch.addcmul(U1 @ dS, d1.unsqueeze(-1), dV2)))
            gd = gd * d2 + _over_rows(dV2 * V2, gd)
            dV = torch.addmm(dV, dV2, V2.mT @ U1)
            dU = torch.addcmul(V2 @ dS.mT, d2.unsqueeze(-1), dU)
        parts.append((gd, dU, dV))
        ddelta, dU, dV = (torch.stack(part[::-1]) for part in zip(*parts, strict=True))
        return None if delta is None else ddelta, dU, dV

    return _collapsed(delta, states[-1]), gradient


def _collapsed(delta: Tensor | None, product: DLoR) -> Factors:
    _, U, V = product
    if delta is None:
        return None, U, V
    # the product of the 1 + delta_k, less 1: formed without the 1, in which a small delta would round away
    delta = delta.to(U.dtype)
    q = delta[0]
    for step in delta[1:]:
        q = q + step + q * step
    return q, U, V


def _split(delta: Tensor | None, U: Tensor, V: Tensor) -> list[DLoR]:
    dtype = torch.promote_types(U.dtype, torch.float32)
    d = U.new_ones(*U.shape[:-2], 1, dtype=dtype) if delta is None else 1 + delta.to(dtype)
    return list(zip(d, U.to(dtype), V.to(dtype), strict=True))


def _over_rows(products: Tensor, like: Tensor) -> Tensor:
    rows = products.sum(-1)
    return rows if like.shape == rows.shape else rows.sum(-1, keepdim=True)
