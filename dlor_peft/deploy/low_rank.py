"""W' as diag(1 + gain) W + B A, exactly where its form has that, and the nearest B A to a given update.

W (O, I) frozen weight, W' adapted, Delta = W' - W; B (O, k), A (k, I), gain (O,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..form import Form, Residual

_DENSE = 1024
"""Up to this smaller side all singular values are computed, above it the largest by subspace iteration."""

_OVERSAMPLING = 32
_ITERATIONS = 2


def gain(form: Form, residual: Residual) -> Tensor | None:
    """The gain (O,) with which W' = diag(1 + gain) W + B A at scale 1; None where W' is not of that kind.

    A diagonal on the columns of W is a gain only where all its entries are equal, and one that is added to W only
    where they are zero. Where the gain is zero W' is a LoRA, and where 1 + gain is positive a DoRA.
    """
    q, U, _, q_in = residual
    zero = U.new_zeros(form.out_features)
    if form.mode == "additive":
        return None if q is not None and q.any() else zero
    rows, columns = (None, q) if form.side == "input" else (q, q_in)
    of_rows = zero if rows is None else zero + rows
    if columns is None:
        return of_rows
    if (columns != columns[0]).any():
        return None
    return of_rows + columns[0] + of_rows * columns[0]


def reads_weight(form: Form) -> bool:
    """Whether B or A of `product` depend on W."""
    return form.mode == "multiplicative" and form.r > 0


def product(form: Form, residual: Residual, W: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """B and A of a form that has a `gain`, without an SVD: k is the rank of the collapsed factors.

    W is used where the form `reads_weight`.
    """
    U, V = residual.U, residual.V
    if form.r == 0:
        # of a multiplicative form both have the rows of one side
        return U.new_zeros(form.out_features, 0), U.new_zeros(0, form.in_features)
    if not reads_weight(form):
        return U, V.mT
    assert W is not None
    return (U, V.mT @ W) if form.side == "output" else (W @ U, V.mT)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of B A, largest first, in float64: O((O + I) k^2)."""
    return torch.linalg.svdvals(_core(B, A)[1])


def nearest_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A with `rank` columns, by QR and the SVD of a k x k matrix, in float64."""
    Q_B, core, Q_A = _core(B, A)
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    root = sigma[:rank].sqrt()
    return (Q_B @ left[:, :rank] * root).to(B.dtype), (root[:, None] * (right[:rank] @ Q_A.mT)).to(A.dtype)


def _core(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.mT.double())
    return Q_B, R_B @ R_A.mT, Q_A


def nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """B, A and the singular values of the best approximation of a dense update with at most `rank` columns.

    Its squared error is ||delta||_F^2 less the sum of the squared singular values, also where they come from subspace
    iteration: the approximation is then Q Q^T delta, truncated, with Q orthonormal. The same on every run.
    """
    if min(delta.shape) <= _DENSE:
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        columns = min(rank + _OVERSAMPLING, *delta.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sigma, right = torch.svd_lowrank(delta, q=columns, niter=_ITERATIONS)
        right = right.mT
    root = sigma[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank], sigma[:rank]


def squared(tensor: Tensor) -> float:
    """||tensor||_F^2, accumulated in float64."""
    return tensor.square().sum(dtype=torch.float64).item()
