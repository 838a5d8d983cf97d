"""M = diag(d) + U V^T: the algebra of diagonal-plus-low-rank matrices, on plain tensors.

Shapes: M (p, q), n = min(p, q), r columns (r = 0 is allowed everywhere), L factors
    d (n,) or (1,) for a scalar; diag(d) is (p, q), zero outside its leading n x n square
    U (p, r)
    V (q, r)
    x (..., q)

No function changes its arguments, and all are differentiable. Functions that solve or decompose take float32 and
float64 only. Source: arXiv 2605.05659 for the form diag(d) + U V^T.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

DLoR = tuple[Tensor, Tensor, Tensor]


def apply(x: Tensor, d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """y = M x = d * x + U (V^T x), for each x of the last dimension: (..., q) -> (..., p), O(r (p + q)) a vector.

    Batches: x (..., E, T, q) with d (..., E, 1, n), U (..., E, p, r) and V (..., E, q, r).
    """
    p, n = U.shape[-2], min(U.shape[-2], V.shape[-2])
    return F.pad(x[..., :n] * d, (0, p - n)) + (x @ V) @ U.mT


def materialise(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """M = diag(d) + U V^T as a dense (p, q) tensor."""
    p, q = U.shape[0], V.shape[0]
    n = min(p, q)
    return F.pad(torch.diag(d.expand(n)), (0, q - n, 0, p - n)) + U @ V.mT


def collapse(d: Tensor, U: Tensor, V: Tensor) -> DLoR:
    """F_L ... F_2 F_1 = diag(d') + U' V'^T, where F_k = diag(d_k) + U_k V_k^T and F_1 meets the data first.

    Stacks d (L, n) or (L, 1), U and V (L, n, r), L >= 1, give d' (n,) or (1,), U' and V' (n, L r), with the columns
    of F_1 first. Dimensions after L, the same in all three, are a batch of stacks. O(n (L r)^2), in the dtype given.
    L = 1 returns views of the one factor.
    """
    return reduce(compose, zip(d, U, V, strict=True))


def compose(first: DLoR, second: DLoR) -> DLoR:
    """(D2 + U2 V2^T)(D1 + U1 V1^T) = D2 D1 + [D2 U1, U2] [V1, D1 V2 + V1 (U1^T V2)]^T, both square."""
    (d1, U1, V1), (d2, U2, V2) = first, second
    V = torch.cat([V1, d1.unsqueeze(-1) * V2 + V1 @ (U1.mT @ V2)], dim=-1)
    return d2 * d1, torch.cat([d2.unsqueeze(-1) * U1, U2], dim=-1), V


def inverse(d: Tensor, U: Tensor, V: Tensor) -> DLoR:
    """M^-1 = D^-1 - D^-1 U S^-1 V^T D^-1, S = I + V^T D^-1 U (Woodbury): again diagonal + rank r.

    Square M only; O(n r^2). ValueError where d holds a zero (the inverse then has no such form) or S (r, r) is
    singular: its smallest singular value is within rounding of the sum I + V^T D^-1 U.
    """
    require_float("maths.inverse", d, U, V)
    _require_square("maths.inverse", U, V)
    if (d == 0).any():
        zeros = (d == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"dlor_peft.maths.inverse: d is zero at {zeros[:8]}, so Woodbury does not apply; shift d away from zero, "
            "or invert materialise(d, U, V)"
        )
    V_scaled = V / d[:, None]  # (n, r)
    low_rank = V_scaled.mT @ U  # (r, r)
    S = _plus_identity(low_rank)
    if _is_singular(S, low_rank):
        raise ValueError(
            "dlor_peft.maths.inverse: the capacitance I + V^T D^-1 U is singular, so the matrix is singular although "
            "d has no zero; scale U or V down, see condition_bound"
        )
    return 1 / d, torch.linalg.solve(S, -U / d[:, None], left=False), V_scaled


def slogdet(d: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """det M = prod(d) det(I + V^T D^-1 U), as (sign, log|det M|).

    Square M only. The z entries with |d_i| <= eps^(1/4) ||U_i|| ||V_i|| (rows i), zeros among them, are never divided
    by: they stay in the bordered matrix [[diag(d_z), -U_z], [V_z^T, I + V_o^T D_o^-1 U_o]] (o: the others), whose
    determinant is det M / prod(d_o) exactly. O(n r^2 + (z + r)^3). A singular M gives sign 0 and -inf up to rounding.
    """
    require_float("maths.slogdet", d, U, V)
    _require_square("maths.slogdet", U, V)
    S, d_other = _bordered(d, U, V)
    sign, logabsdet = torch.linalg.slogdet(S)
    return sign * d_other.sign().prod(), logabsdet + d_other.abs().log().sum()


@torch.no_grad()
def is_invertible(d: Tensor, U: Tensor, V: Tensor) -> bool:
    """Whether M is invertible: whether the bordered matrix of `slogdet` is, up to the rounding of what it sums.

    Square M only; O(n r^2 + (z + r)^3). U and V, and the rows in z, may be of very different sizes.
    """
    require_float("maths.is_invertible", d, U, V)
    _require_square("maths.is_invertible", U, V)
    size_U, size_V = U.norm(dim=0), V.norm(dim=0)
    balance = (size_V / size_U).sqrt().where((size_U > 0) & (size_V > 0), 1)
    S, _ = _bordered(d, U * balance, V / balance)
    z = S.shape[0] - U.shape[1]
    least = torch.finfo(S.dtype).tiny
    if z:
        S[:z] /= S[:z].abs().amax(1, keepdim=True).clamp_min(least)
        S[:, :z] /= S[:, :z].abs().amax(0).clamp_min(least)
    summed = S.clone()
    summed[z:, z:] -= torch.eye(U.shape[1], dtype=S.dtype, device=S.device)
    return not _is_singular(S, summed)


def _bordered(d: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The bordered matrix of `slogdet`, rows in z first, and d_o."""
    d = d.expand(U.shape[0])
    with torch.no_grad():
        tiny = d.abs() <= torch.finfo(d.dtype).eps ** 0.25 * U.norm(dim=1) * V.norm(dim=1)
    d_other = d[~tiny]
    S = _plus_identity((V[~tiny] / d_other[:, None]).mT @ U[~tiny])
    if tiny.any():
        S = torch.cat([torch.cat([d[tiny].diag(), -U[tiny]], dim=1), torch.cat([V[tiny].mT, S], dim=1)])
    return S, d_other


@torch.no_grad()
def singular_values(U: Tensor, V: Tensor) -> Tensor:
    """Those of U V^T that may differ from 0, (min(p, q, r),), largest first, by R_U R_V^T as in `spectral_norm`.

    Their squares sum to ||U V^T||_F^2. O((p + q) r^2).
    """
    require_float("maths.singular_values", U, V)
    return torch.linalg.svdvals(torch.linalg.qr(U)[1] @ torch.linalg.qr(V)[1].mT)


def effective_rank(sizes: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i), p_i = sizes_i / sum(sizes), of singular values >= 0: between 1 and their number.

    A scalar tensor; 0 where all of them are. Source: Roy & Vetterli, EUSIPCO 2007.
    """
    total = sizes.sum()
    if total == 0:
        return torch.zeros_like(total)
    return torch.special.entr(sizes / total).sum().exp()


def spectral_norm(U: Tensor, V: Tensor) -> Tensor:
    """||U V^T||_2 = sigma_max(R_U R_V^T) = sqrt(lambda_max((U^T U)(V^T V))), with U = Q_U R_U and V = Q_V R_V.

    A scalar tensor, or one for each of a batch, U (..., p, r) and V (..., q, r). O((p + q) r^2): no p x q matrix, and
    no squaring of the condition number. Its gradient is u v^T in U V^T (u, v the leading singular vectors): finite
    also at U = 0, where it is one of the subgradients. First derivatives only.
    """
    require_float("maths.spectral_norm", U, V)
    if U.shape[-1] == 0:
        return U.new_zeros(U.shape[:-2])
    with torch.no_grad():
        Q_U, R_U = torch.linalg.qr(U)
        Q_V, R_V = torch.linalg.qr(V)
        left, _, right = torch.linalg.svd(R_U @ R_V.mT, full_matrices=False)
        u, v = Q_U @ left[..., :1], Q_V @ right[..., :1, :].mT  # (..., p, 1), (..., q, 1)
    return ((u.mT @ U) @ (v.mT @ V).mT)[..., 0, 0]


def condition_bound(d: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """cond_2(M) <= (max|d| + rho min|d|) / ((1 - rho) min|d|), where rho = ||U V^T||_2 / min|d| < 1.

    A scalar tensor; inf where rho >= 1 or d holds a zero: then the bound says nothing. Square M only; O(n r^2).
    """
    require_float("maths.condition_bound", d, U, V)
    _require_square("maths.condition_bound", U, V)
    size = d.abs()
    norm = spectral_norm(U, V)
    # negated, so that nan also gives inf
    if not norm < size.min():
        return torch.full_like(norm, torch.inf)
    return (size.max() + norm) / (size.min() - norm)


def condition_bound_by_inverse(d: Tensor, U: Tensor, V: Tensor, norm: Tensor | None = None) -> Tensor:
    """cond_2(M) <= (max|d| + ||U V^T||_2) (1 / min|d| + ||U' V'^T||_2), where M^-1 = diag(1/d) + U' V'^T.

    A scalar tensor, never above `condition_bound`, and finite for every M that `inverse` inverts: inf for the others.
    `norm` is ||U V^T||_2 where it is known.
    Square M only; O(n r^2).
    """
    require_float("maths.condition_bound_by_inverse", d, U, V)
    _require_square("maths.condition_bound_by_inverse", U, V)
    try:
        d_inverse, U_inverse, V_inverse = inverse(d, U, V)
    except ValueError:
        return U.new_full((), torch.inf)
    if not all(part.isfinite().all() for part in (d_inverse, U_inverse, V_inverse)):
        return U.new_full((), torch.inf)
    norm = spectral_norm(U, V) if norm is None else norm
    return (d.abs().max() + norm) * (d_inverse.abs().max() + spectral_norm(U_inverse, V_inverse))


def alignment_index(delta: Tensor, W: Tensor) -> Tensor:
    """I sum_i(<delta_i, W_i>^2 / ||W_i||^2) / ||delta||_F^2 over the rows i of delta and W, both (O, I).

    A scalar tensor between 0 and I: about 1 for an update unrelated to W, well above 2 where scaling the rows of W
    explains much of it. Zero rows of W count as unaligned; delta = 0 gives 0. For columns pass delta.T and W.T.
    Accumulates in float32, or in float64 where an input has it.
    """
    if delta.shape != W.shape:
        shapes = f"delta {tuple(delta.shape)} and W {tuple(W.shape)}"
        raise ValueError(
            f"dlor_peft.maths.alignment_index: got {shapes}; pass an update and its weight, of equal shapes"
        )
    dtype = torch.promote_types(torch.promote_types(delta.dtype, W.dtype), torch.float32)
    delta, W = delta.to(dtype), W.to(dtype)
    return alignment_of_sums((delta * W).sum(1), W.square().sum(1), delta.square().sum(), W.shape[1])


def alignment_of_sums(products: Tensor, squares: Tensor, total: Tensor, width: int) -> Tensor:
    """`alignment_index` from <delta_i, W_i> (O,), ||W_i||^2 (O,) and ||delta||_F^2, for W of `width` columns."""
    along = products.square() / squares.where(squares > 0, 1)
    return width * along.sum() / total.where(total > 0, 1)


def row_coefficients(delta: Tensor, W: Tensor) -> Tensor:
    """a_i = <delta_i, W_i> / ||W_i||^2 (O,), the least-squares a in delta = diag(a) W; 0 where W_i = 0."""
    squared = W.square().sum(1)
    return (delta * W).sum(1) / squared.where(squared > 0, 1)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _is_singular(S: Tensor, low_rank: Tensor) -> bool:
    if S.shape[0] == 0:
        return False
    with torch.no_grad():
        # against the terms of the sum I + low_rank: at r = 1 S is its own largest singular value
        scale = 1 + torch.linalg.matrix_norm(low_rank, 2)
        return bool(torch.linalg.svdvals(S)[-1] <= 16 * torch.finfo(S.dtype).eps * scale)


def _require_square(name: str, U: Tensor, V: Tensor) -> None:
    if U.shape[0] != V.shape[0]:
        raise ValueError(
            f"dlor_peft.{name}: U has {U.shape[0]} rows and V has {V.shape[0]}; only a square matrix has one, pass "
            "equal sizes"
        )


def require_float(name: str, *tensors: Tensor) -> None:
    """TypeError unless every tensor is float32 or float64: LAPACK knows no half precision."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"dlor_peft.{name}: got {tensor.dtype}, needs torch.float32 or torch.float64; convert first, as by "
                ".float()"
            )
