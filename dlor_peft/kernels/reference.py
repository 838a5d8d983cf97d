"""The primitive under every mode, and its gradients, in plain PyTorch.

T tokens, I width of x, O width of the result, r rank, m = min(I, O)
acc (T, O)  x (T, I)  q (m,) or (1,) or None  U (O, r)  V (I, r)  scale a float; all of one dtype.
Products accumulate in float32 for the half-precision types (torch.matmul), sums over tokens likewise.
"""

import torch
from torch import Tensor


def update(
    acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """acc + scale (q * x + (x V) U^T), and x V, both newly allocated; acc None stands for zeros."""
    t_TR = x @ V
    if acc is None:
        out_TO = (t_TR * scale) @ U.T
    elif U.shape[1]:
        out_TO = torch.addmm(acc, t_TR, U.T, alpha=scale)
    else:
        out_TO = acc.clone()
    if q is not None:
        m = min(x.shape[1], out_TO.shape[1])
        out_TO[:, :m].addcmul_(q, x[:, :m], value=scale)
    return out_TO, t_TR


def grad_q(g: Tensor, x: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale sum_t g * x over the leading m columns, (m,); summed to (1,) for a scalar q. float32 or wider."""
    m = min(g.shape[1], x.shape[1])
    dtype = torch.promote_types(g.dtype, torch.float32)
    # not einsum: the product and its sum in two steps are 60 to 120 times faster on a CPU
    columns = (g[:, :m] * x[:, :m]).sum(0, dtype=dtype).mul_(scale)
    return columns if q.numel() == m else columns.sum(0, keepdim=True)


def grad_U(g: Tensor, t: Tensor, scale: float) -> Tensor:
    """scale g^T t, (O, r), t = x V."""
    return (g.T @ t).mul_(scale)


def grad_V(x: Tensor, gU: Tensor, scale: float) -> Tensor:
    """scale x^T (g U), (I, r)."""
    return (x.T @ gU).mul_(scale)
