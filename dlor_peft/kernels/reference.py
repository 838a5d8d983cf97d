"""The primitive under every mode, and its gradients, in plain PyTorch.

T tokens, I width of x, O width of the result, r rank, m = min(I, O)
acc (T, O)  x (T, I)  q (m,) or (1,) or None  U (O, r)  V (I, r); all of one dtype.
Products accumulate in float32 for the half-precision types (torch.matmul), sums over tokens likewise.
"""

import torch
from torch import Tensor


def update(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """acc + q * x + (x V) U^T, and x V, both newly allocated; acc None stands for zeros."""
    width = U.shape[0]
    m = min(x.shape[1], width)
    t_TR = x @ V
    if not U.shape[1]:
        acc = x.new_zeros(()).expand(x.shape[0], width) if acc is None else acc
        if q is None:
            # torch.export cannot keep the strides of a view of dynamic shape
            return acc.clone(memory_format=torch.contiguous_format), t_TR
        out_TO = torch.addcmul(acc[:, :m], q, x[:, :m])
        return out_TO if m == width else torch.cat([out_TO, acc[:, m:]], dim=1), t_TR
    out_TO = t_TR @ U.T if acc is None else torch.addmm(acc, t_TR, U.T)
    if q is not None:
        out_TO[:, :m].addcmul_(q, x[:, :m])
    return out_TO, t_TR


def grad_q(g: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """sum_t g * x over the leading m columns, (m,); summed to (1,) for a scalar q. float32 or wider."""
    m = min(g.shape[1], x.shape[1])
    dtype = torch.promote_types(g.dtype, torch.float32)
    # the product of two float16 numbers may be none
    g = g.to(dtype) if g.dtype == torch.float16 else g
    # not einsum: the product and its sum in two steps are 60 to 120 times faster on a CPU
    columns = (g[:, :m] * x[:, :m]).sum(0, dtype=dtype)
    return columns if q.numel() == m else columns.sum(0, keepdim=True)


def grad_U(g: Tensor, t: Tensor) -> Tensor:
    """g^T t, (O, r), t = x V."""
    return g.T @ t


def grad_V(x: Tensor, gU: Tensor) -> Tensor:
    """x^T (g U), (I, r)."""
    return x.T @ gU
