"""A = F_K ... F_1, A = c I + sum_k U_k V_k^T: dense matrices as products and sums of diagonal plus low rank.

Shapes: A (n, n) for products, (p, q) for sums
    d (K, n), U (K, n, r), V (K, n, r)   stacks of K factors of rank r, the factor that meets the data first in front

Inputs are float32 or float64 and are not changed; results have their dtype and device and carry no gradient.
Source: arXiv 2605.05659, the theorems that width and depth of such terms reach any matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .maths import DLoR, require_float


@torch.no_grad()
def factorise_product(A: Tensor, r: int, c: float | None = None, tolerance: float | None = None) -> DLoR:
    """A = F_K ... F_2 F_1, F_k = diag(d_k) + U_k V_k^T, with K = max(1, ceil(rank(A - cI) / r)).

    Any square A: singular, orthogonal, defective. c (default 1) is any number but 0, and sits in F_1: d_1 = c, the
    other d_k = 1. Columns that are not needed are zero. The error relative to max(||A||, |c|) is about
    eps (1 + ||A||/|c|), so give c the size of ||A|| where that is far from 1. The rank counts the singular values of
    A - cI above tolerance * max(||A - cI||_2, |c|); tolerance is n eps(A.dtype) by default, and what it cuts off is
    the error. Computes in float64 on the CPU; O(n^3).

    With E = A/c - I, Q an orthonormal basis of range(E) and G = E^T Q, A/c = I + Q G^T. In the basis where
    T = Q^T (A/c) Q = I + G^T Q is a real Schur form, G_k^T Q_j = 0 for blocks k > j of columns, so that
    (I + Q_K G_K^T) ... (I + Q_1 G_1^T) has no cross terms. Where a block ends inside a complex pair, one entry
    T[i+1, i] is left between the two factors: it is removed by replacing row i+1 of G^T.
    """
    require_float("reconstruct.factorise_product", A)
    _require_rank("reconstruct.factorise_product", r, 1)
    n = A.shape[0]
    if A.shape != (n, n):
        raise ValueError(
            f"dlor_peft.reconstruct.factorise_product: A is {tuple(A.shape)}; pass a square one, or use factorise_sum"
        )
    c = 1.0 if c is None else float(c)
    _require_finite("reconstruct.factorise_product", A, c)
    if c == 0:
        raise ValueError(
            "dlor_peft.reconstruct.factorise_product: c = 0 leaves low-rank factors alone, which lose rank; "
            "pass another c"
        )
    schur = _import_schur()

    scaled = A.to("cpu", torch.float64) / c
    E = scaled - _eye_like(scaled)
    left, sizes, _ = torch.linalg.svd(E)
    m = _rank(sizes, 1.0, tolerance, A)
    Q, G = left[:, :m], torch.zeros_like(left[:, :m])
    if m > 0:
        form, rotation, *_ = schur((Q.mT @ scaled @ Q).numpy(), output="real")
        T = form.tolist()
        Q = Q @ torch.from_numpy(rotation)
        G = E.mT @ Q
        for i in range(r - 1, m - 1, r):
            a, below = T[i][i], T[i + 1][i]
            if below == 0:
                continue
            # the pivot must not be small beside what it removes: a rotation by 90 degrees has a = 0 in every
            # orthonormal basis, while this shear makes |pivot| = |a| + |below|
            shear = -math.copysign(1.0, a * below)
            pivot = a - shear * below
            Q[:, i + 1] += shear * Q[:, i]
            G[:, i] -= shear * G[:, i + 1]
            G[:, i + 1] -= below / pivot * G[:, i]

    U, V = _in_blocks(Q, r), _in_blocks(G, r)
    d = U.new_ones(len(U), n)
    d[0] *= c
    U[0] *= c
    return d.to(A), U.to(A), V.to(A)


@torch.no_grad()
def factorise_sum(
    A: Tensor, r: int, c: float | None = None, tolerance: float | None = None
) -> tuple[float, Tensor, Tensor]:
    """A = c I + sum_k U_k V_k^T, with K = max(1, ceil(rank(A - cI) / r)): (c, U (K, p, r), V (K, q, r)).

    For A (p, q) the I is rectangular. c (default 1) is any number. The blocks come in decreasing order of size, each
    split evenly between U_k and V_k; tolerance and padding are those of factorise_product. O(p q min(p, q)).
    """
    require_float("reconstruct.factorise_sum", A)
    _require_rank("reconstruct.factorise_sum", r, 1)
    c = 1.0 if c is None else float(c)
    _require_finite("reconstruct.factorise_sum", A, c)
    left, sizes, right = torch.linalg.svd(A - c * _eye_like(A), full_matrices=False)
    m = _rank(sizes, abs(c), tolerance, A)
    root = sizes[:m].sqrt()
    return c, _in_blocks(left[:, :m] * root, r), _in_blocks(right[:m].mT * root, r)


def _in_blocks(columns: Tensor, r: int) -> Tensor:
    """(n, m) -> (K, n, r): r columns at a time, the last block padded with zeros, and at least one block."""
    n, m = columns.shape
    num_blocks = max(1, math.ceil(m / r))
    return F.pad(columns, (0, num_blocks * r - m)).reshape(n, num_blocks, r).transpose(0, 1).contiguous()


def _rank(sizes: Tensor, c: float, tolerance: float | None, A: Tensor) -> int:
    if tolerance is None:
        tolerance = max(A.shape) * torch.finfo(A.dtype).eps
    # |c| too: where A = cI up to rounding, the noise in A - cI has full rank
    return int((sizes > tolerance * max(sizes[0].item(), c)).sum())


def _eye_like(A: Tensor) -> Tensor:
    return torch.eye(*A.shape, dtype=A.dtype, device=A.device)


def _require_rank(name: str, r: int, least: int) -> None:
    if r < least:
        raise ValueError(
            f"dlor_peft.{name}: r = {r}; r, the number of columns of U and of V, must be at least {least}"
        )


def _require_finite(name: str, A: Tensor, c: float) -> None:
    if not math.isfinite(c):
        raise ValueError(f"dlor_peft.{name}: c = {c}; pass a finite number")
    if not A.isfinite().all():
        raise ValueError(f"dlor_peft.{name}: A has entries that are not finite; pass a matrix without inf and nan")


def _import_schur():
    try:
        from scipy.linalg import schur
    except ImportError as error:
        raise ImportError(
            "dlor_peft.reconstruct.factorise_product needs scipy for the real Schur form: "
            "install dlor-peft with its extra 'factorise'"
        ) from error
    return schur
