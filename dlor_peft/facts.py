"""What one adapter does to its layer, in numbers, from its own tensors: on the disk, and while it is trained.

The residual diag(q) + U V^T is that of `form.Residual`, a stack collapsed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .form import Form, Residual
from .maths import condition_bound_by_inverse, effective_rank, is_invertible, singular_values

Map = tuple[Tensor, Tensor, Tensor]
"""diag(d) + U V^T."""


@dataclass(frozen=True)
class LayerFacts:
    """Of experts, norms are over all of them, the effective rank is the mean, and the bound that of the worst.

    diagonal_deviation  ||alpha - 1||: the 2-norm of q, of both diagonals on side "both"; |q| of a scalar
    frobenius_norm      ||U V^T||_F
    spectral_norm       ||U V^T||_2
    effective_rank      of U V^T: `maths.effective_rank`
    condition_bound     of the square map that multiplies the weight, by its inverse: cond(W') <= bound * cond(W), inf
                        where it has none or its diagonal holds a zero. None where there is no such map
    """

    diagonal_deviation: float
    frobenius_norm: float
    spectral_norm: float
    effective_rank: float
    condition_bound: float | None


@torch.no_grad()
def layer_facts(form: Form, residual: Residual) -> LayerFacts:
    """The facts of one layer, whose residual is float32 or float64. O((p + q) r^2) for each expert.

    OverflowError where the factors multiply to more than the dtype holds, or hold what is no number.
    """
    each = residuals(form, residual)
    if any(part is not None and not part.isfinite().all() for part in residual):
        raise OverflowError(f"its factors multiply to more than {residual.U.dtype} holds".replace("torch.", ""))
    sizes = [singular_values(one.U, one.V) for one in each]
    diagonals = [part for part in (residual.q, residual.q_in) if part is not None]
    frobenius_norm = _norm(sizes)
    if not math.isfinite(frobenius_norm):
        raise OverflowError(f"its factors multiply to more than {residual.U.dtype} holds".replace("torch.", ""))
    spectral = [s[0] if len(s) else s.new_zeros(()) for s in sizes]
    bounds = [_condition_bound(form, *pair) for pair in zip(each, spectral, strict=True)] if multiplies(form) else []
    return LayerFacts(
        diagonal_deviation=_norm(diagonals),
        frobenius_norm=frobenius_norm,
        spectral_norm=max(norm.item() for norm in spectral),
        effective_rank=sum(effective_rank(s).item() for s in sizes) / len(sizes),
        condition_bound=max(bounds, default=None),
    )


def multiplies(form: Form) -> bool:
    """Whether all of the update is a square map that multiplies the weight."""
    return form.mode == "multiplicative" or (form.mode == "scaled" and form.r == 0)


def invertible(form: Form, residual: Residual) -> bool | None:
    """Whether the map that multiplies the weight is, of all experts; None where there is no such map."""
    if not multiplies(form):
        return None
    return all(is_invertible(*one) for expert in residuals(form, residual) for one in maps(form, expert))


def residuals(form: Form, residual: Residual) -> list[Residual]:
    """The one residual, or that of each expert."""
    return [residual] if form.experts is None else [residual.of_expert(e) for e in range(form.experts)]


def maps(form: Form, residual: Residual) -> list[Map]:
    """The square maps diag(d) + U V^T whose product multiplies the weight."""
    q, U, V, q_in = residual
    if form.mode == "scaled":
        diagonals = [1 + part for part in (q, q_in) if part is not None]
        return [(d, d.new_zeros(len(d), 0), d.new_zeros(len(d), 0)) for d in diagonals]
    return [(U.new_ones(1) if q is None else 1 + q, U, V)]


def _condition_bound(form: Form, residual: Residual, norm: Tensor) -> float:
    # where there are two maps they are diagonals, and their norm is 0
    return math.prod(condition_bound_by_inverse(*one, norm).item() for one in maps(form, residual))


def _norm(parts: list[Tensor]) -> float:
    # of the norms: the parts have different shapes
    return torch.stack([torch.linalg.vector_norm(part) for part in parts]).norm().item() if parts else 0.0
