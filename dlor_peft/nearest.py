"""The DLoR adapter nearest to an update that is given: min ||delta - DLoR(W)||_F, for one matrix, on plain tensors.

Shapes: W (O, I) the former weight, delta (O, I) = W_tuned - W, n = min(O, I)
    q, q_in, U, V   as an adapter stores them (`form.Form.shapes`) at depth 1, without the dimension of the stack

All computing is done in the dtype of the arguments, float32 or float64, on their device; nothing carries a gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .maths import require_float, row_coefficients

SIDES = {"additive": (None,), "scaled": ("output", "input", "both"), "multiplicative": ("input", "output")}
DIAGONALS = ("vector", "scalar", "none")

# a full SVD up to this size; beyond, subspaces that are refined in each sweep: see `_Truncation`
_EXACT = 256
_OVERSAMPLING = 8
_POWER = 3


class Nearest(NamedTuple):
    """The tensors of an adapter, and how well it does."""

    q: Tensor | None
    """(d,), (1,) for diagonal "scalar", None for "none"."""

    U: Tensor
    """(p, r)."""

    V: Tensor
    """(q, r)."""

    q_in: Tensor | None
    """(I,) or (1,) for side "both"."""

    residual: float
    """||delta - what the adapter adds to W||_F / ||delta||_F, of these very tensors; 0 for delta = 0."""

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self[:4] if isinstance(tensor, Tensor))


class _Fit(NamedTuple):
    q: Tensor | None  # of the rows of W
    q_in: Tensor | None  # of its columns
    U: Tensor
    V: Tensor
    residual: float


@torch.no_grad()
def nearest(
    delta: Tensor,
    W: Tensor,
    r: int,
    mode: str,
    side: str | None = None,
    diagonal: str = "vector",
    sweeps: int = 100,
    tolerance: float = 1e-5,
) -> Nearest:
    """min ||delta - D||_F over D = diag(q) + U V^T "additive"; over "scaled" diag(q) W + U V^T "output",
    W diag(q) + U V^T "input", diag(1 + q) W diag(1 + q_in) - W + U V^T "both"; over "multiplicative"
    W (diag(q) + U V^T) "input", (diag(q) + U V^T) W "output".

    Each sweep takes U V^T from a truncated SVD of the remainder, and then each diagonal by least squares, row by row
    or column by column. No step makes the residual grow, and the limit is a stationary point, not always the global
    minimum; so two descents are made, one that starts with the low rank and one that starts with the diagonal, and
    the better counts. Each ends when a sweep lowers the residual by less than the share `tolerance`, or after
    `sweeps`. Hence the residual is at most that of the best diagonal alone, and at most that of the best U V^T of
    rank r alone, LoRA's: up to rounding where n <= 256, and beyond as far as that SVD is found by subspace iteration.

    A product W U spans the columns of W at most. With Q an orthonormal basis of them, the multiplicative problem is
    the scaled one of the same side for Q^T delta and Q^T W, with W U in the place of U: no multiplicative adapter is
    nearer than the scaled one of its side and rank. Of the solutions U the smallest is taken, by the pseudo-inverse.

    Zero rows or columns of W get q = 0. O(sweeps O I (r + 8)), and O(sweeps O I n) where n <= 256 or r is near n;
    multiplicative also O(O I n), once. About four temporaries of the size of W.

    Raises:
        ValueError: unknown mode, side or diagonal; shapes that differ; a NaN or infinite number; r < 0.
        TypeError: a dtype other than float32 and float64.
    """
    _check(delta, W, r, mode, side, diagonal)
    scalar = diagonal == "scalar"
    if mode == "multiplicative" and side == "output":
        fit = _multiply_input(delta.mT, W.mT, r, diagonal, sweeps, tolerance)
        return fit._replace(U=fit.V, V=fit.U)
    if mode == "multiplicative":
        return _multiply_input(delta, W, r, diagonal, sweeps, tolerance)
    rows = diagonal != "none" and side != "input"
    columns = diagonal != "none" and side in ("input", "both")
    base = torch.eye(*W.shape, dtype=W.dtype, device=W.device) if mode == "additive" else W
    fit = _better_of_two(_Scaling(base, rows, columns, scalar), delta, r, sweeps, tolerance)
    q, q_in = (fit.q, fit.q_in) if rows else (fit.q_in, None)
    if mode == "additive" and q is not None:
        q = q[: min(W.shape)]
    return Nearest(q, fit.U, fit.V, q_in, fit.residual)


@torch.no_grad()
def lora_residuals(
    delta: Tensor, nums_parameters: Sequence[int], sweeps: int = 100, tolerance: float = 1e-5
) -> list[float]:
    """||delta - B A||_F / ||delta||_F of the best LoRA with so many parameters, of rank num_parameters / (O + I).

    For each number given. Between whole ranks the squared residual is interpolated linearly: that is what LoRA reaches
    on average over layers of which a share has one rank more. O(sweeps O I k) for the largest rank k.
    """
    require_float("nearest.lora_residuals", delta)
    n, total = min(delta.shape), torch.linalg.norm(delta).item()
    if total == 0:
        return [0.0 for _ in nums_parameters]
    ranks = [min(number / sum(delta.shape), n) for number in nums_parameters]
    largest = math.ceil(max(ranks))
    fit = _descend(_Scaling(delta, False, False, False), delta, None, None, largest, sweeps, tolerance)
    # U and V share each singular value
    shares = (fit.U.norm(dim=0) * fit.V.norm(dim=0) / total).double().square()
    rest = fit.residual**2
    squares = [rest + shares[rank:].sum().item() for rank in range(largest + 1)]
    # nothing is left of all n ranks
    squares[n:] = [0.0] * len(squares[n:])
    whole = [math.floor(rank) for rank in ranks]
    return [
        math.sqrt(squares[k] + (rank - k) * (squares[math.ceil(rank)] - squares[k]))
        for k, rank in zip(whole, ranks, strict=True)
    ]


class _Scaling(NamedTuple):
    """diag(1 + q) W diag(1 + q_in) - W, of which one diagonal or both may be absent."""

    W: Tensor
    rows: bool
    columns: bool
    scalar: bool

    def subtract(self, delta: Tensor, q: Tensor | None, q_in: Tensor | None) -> Tensor:
        """What of delta is left."""
        if q is None and q_in is None:
            return delta
        gain = 0 if q is None else q[:, None]
        if q_in is not None:
            # not (1 + q)(1 + q_in) - 1, which cancels
            gain = gain + q_in + gain * q_in
        return torch.addcmul(delta, gain, self.W, value=-1)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def fit(self, delta: Tensor, q_in: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The least-squares q for that q_in, then q_in for that q."""
        q = None
        if self.rows:
            scaled = self.W if q_in is None else self.W * (1 + q_in)
            q = self._coefficients(self.subtract(delta, None, q_in), scaled)
        if self.columns:
            scaled = self.W if q is None else self.W * (1 + q)[:, None]
            q_in = self._coefficients(self.subtract(delta, q, None).mT, scaled.mT)
        return q, q_in

    def _coefficients(self, delta: Tensor, W: Tensor) -> Tensor:
        if self.scalar:
            delta, W = delta.reshape(1, -1), W.reshape(1, -1)
        return row_coefficients(delta, W)


def _better_of_two(scaling: _Scaling, delta: Tensor, r: int, sweeps: int, tolerance: float) -> _Fit:
    diagonal_alone = _descend(scaling, delta, None, None, 0, sweeps, tolerance)
    if r == 0:
        return diagonal_alone
    starts: list[tuple[Tensor | None, Tensor | None]] = [(None, None)]
    if scaling.rows or scaling.columns:
        starts.append((diagonal_alone.q, diagonal_alone.q_in))
    fits = (_descend(scaling, delta, *start, r, sweeps, tolerance) for start in starts)
    return min(fits, key=lambda fit: fit.residual)


def _descend(
    scaling: _Scaling,
    delta: Tensor,
    q: Tensor | None,
    q_in: Tensor | None,
    r: int,
    sweeps: int,
    tolerance: float,
) -> _Fit:
    total = torch.linalg.norm(delta).item() or 1.0
    truncation = _Truncation(delta, r)
    best = None
    for _ in range(max(1, sweeps)):
        U, V = truncation(scaling.subtract(delta, q, q_in))
        remainder = torch.addmm(delta, U, V.mT, alpha=-1)
        q, q_in = scaling.fit(remainder, q_in)
        residual = torch.linalg.norm(scaling.subtract(remainder, q, q_in)).item() / total
        if best is not None and not residual < best.residual:
            break
        stationary = best is not None and best.residual - residual <= tolerance * best.residual
        best = _Fit(q, q_in, U, V, residual)
        if stationary or residual == 0:
            break
    assert best is not None
    return best


class _Truncation:
    """U V^T of rank r nearest to a matrix, each singular value shared evenly; one object for a sequence of matrices.

    Exact for small matrices. For large ones the row space of the last result, and a few directions more, are the start
    for the next by one step of subspace iteration. Its span holds the least-squares U for the last V, so that the
    distance is at most that of the last U V^T: what makes the residual shrink in each sweep.
    """

    def __init__(self, like: Tensor, r: int) -> None:
        self.r = r
        self.width = r + _OVERSAMPLING
        n = min(like.shape)
        self.exact = n <= _EXACT or 2 * self.width >= n
        self.rows: Tensor | None = None  # (I, width)

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self.r == 0 or 0 in matrix.shape:
            return matrix.new_zeros(matrix.shape[0], self.r), matrix.new_zeros(matrix.shape[1], self.r)
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False) if self.exact else self._iterate(matrix)
        root = sizes[: self.r].sqrt()
        pad = (0, self.r - len(root))
        return F.pad(left[:, : self.r] * root, pad), F.pad(right[: self.r].mT * root, pad)

    def _iterate(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self._start(matrix) if self.rows is None else self.rows
        basis = torch.linalg.qr(matrix @ rows)[0]  # (O, width)
        left, sizes, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        self.rows = right.mT
        return basis @ left, sizes, right

    def _start(self, matrix: Tensor) -> Tensor:
        generator = torch.Generator(matrix.device).manual_seed(0)
        rows = torch.empty(matrix.shape[1], self.width, dtype=matrix.dtype, device=matrix.device)
        rows.normal_(generator=generator)
        for _ in range(_POWER):
            rows = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ rows)[0])[0]
        return rows


def _multiply_input(delta: Tensor, W: Tensor, r: int, diagonal: str, sweeps: int, tolerance: float) -> Nearest:
    Q, R, invert = _column_space(W)
    columns = diagonal != "none"
    fit = _better_of_two(_Scaling(R, False, columns, diagonal == "scalar"), Q.mT @ delta, r, sweeps, tolerance)
    U, V, q = invert(fit.U), fit.V, fit.q_in
    left = delta - (W @ U) @ V.mT
    if q is not None:
        left -= W * q
    residual = torch.linalg.norm(left).item() / (torch.linalg.norm(delta).item() or 1.0)
    return Nearest(q, U, V, None, residual)


def _column_space(W: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """W = Q R, with the columns of Q (O, k) orthonormal, k = rank(W); and A (k, r) -> W^+ Q A, the smallest solution.

    Singular values below max(O, I) eps of the largest count as zero.
    """
    O, I = W.shape
    tolerance = max(O, I) * torch.finfo(W.dtype).eps
    if O >= I:
        Q, R = torch.linalg.qr(W)
        pivots = R.diagonal().abs()
        if pivots.min() > tolerance * pivots.max():
            return Q, R, lambda A: torch.linalg.solve_triangular(R, A, upper=True)
    left, sizes, right = torch.linalg.svd(W, full_matrices=False)
    k = int((sizes > tolerance * sizes[0]).sum())
    left, sizes, right = left[:, :k], sizes[:k, None], right[:k]
    # not sizes * right, whose zero columns are rounding
    return left, left.mT @ W, lambda A: right.mT @ (A / sizes)


def _check(delta: Tensor, W: Tensor, r: int, mode: str, side: str | None, diagonal: str) -> None:
    where = "dlor_peft.nearest.nearest"
    if mode not in SIDES:
        raise ValueError(f"{where}: mode {mode!r} is none of {', '.join(map(repr, SIDES))}; pass one of these")
    # without a diagonal nothing has a side in mode "scaled"
    sides = (None, *SIDES[mode]) if (mode, diagonal) == ("scaled", "none") else SIDES[mode]
    if side not in sides:
        raise ValueError(f"{where}: mode {mode!r} has no side {side!r}; pass one of {', '.join(map(repr, sides))}")
    if diagonal not in DIAGONALS:
        raise ValueError(f"{where}: diagonal {diagonal!r} is none of {', '.join(map(repr, DIAGONALS))}")
    if r < 0:
        raise ValueError(f"{where}: r = {r}; r, the number of columns of U and of V, must be at least 0")
    if delta.dim() != 2 or delta.shape != W.shape:
        raise ValueError(f"{where}: delta {tuple(delta.shape)} and W {tuple(W.shape)}; pass two matrices of one shape")
    require_float("nearest.nearest", delta, W)
    for name, tensor in (("delta", delta), ("W", W)):
        if not tensor.isfinite().all():
            raise ValueError(
                f"{where}: {name} holds a NaN or an infinite number; look for what went wrong in training"
            )
