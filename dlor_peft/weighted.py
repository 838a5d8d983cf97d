"""The tensors that several adapters have on one layer as those of one adapter: summed, pruned, truncated.

A stack comes collapsed: each adapter is a diagonal q and U V^T, whose rank is r times the depth. Experts are the
leading dimension of every tensor. All is done in float32 or wider.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from .form import Residual

_PRUNING: dict[str, Callable[..., Tensor]] = {
    "ties": ties,
    "dare_ties": dare_ties,
    "dare_linear": dare_linear,
    "magnitude_prune": magnitude_prune,
}
KINDS = ("svd", "linear", "cat", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))
SIGN_METHODS = ("total", "frequency")
DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Combination:
    """A `combination_type` with its options, as `add_weighted_adapter` takes them; checked when constructed."""

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            close = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            meant = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"dlor_peft.combine: combination_type must be one of {_listed(KINDS)}, but it is {self.kind!r}. "
                f'{meant}Use "cat" for the exact sum, "svd" for a given rank.'
            )
        if not self.by_svd:
            takers = [kind for kind in KINDS if kind.endswith("svd")]
            for name in ("svd_rank", "svd_clamp", "svd_driver"):
                self._check(name, getattr(self, name) is None, f"goes with combination_type {_listed(takers)} only")
        if not self.elects_signs:
            takers = [kind for kind in KINDS if "ties" in kind]
            default = self.majority_sign_method == SIGN_METHODS[0]
            self._check("majority_sign_method", default, f"goes with combination_type {_listed(takers)} only")
        if not self.prunes and self.density is not None:
            # no error: what is written for LoRA hands one density to every type
            warnings.warn(
                f"dlor_peft.combine: density={self.density!r} has no effect, as combination_type {self.kind!r} prunes "
                "nothing.",
                stacklevel=4,
            )
        if self.prunes:
            kept = "must be the share of values to keep, above 0 and up to 1"
            self._check("density", self.density is not None and 0 < self.density <= 1, kept, "Pass 0.5, for example")
        self._check("svd_rank", self.svd_rank is None or self.svd_rank >= 1, "must be at least 1")
        clamp = self.svd_clamp
        self._check("svd_clamp", clamp is None or 0.5 < clamp <= 1, "must be a quantile above 0.5 and up to 1")
        self._check("svd_driver", self.svd_driver in (None, *DRIVERS), f"must be one of {_listed(DRIVERS)}")
        known = self.majority_sign_method in SIGN_METHODS
        self._check("majority_sign_method", known, f"must be one of {_listed(SIGN_METHODS)}")

    def _check(self, option: str, holds: bool, allowed: str, remedy: str = "Leave it out if in doubt") -> None:
        if not holds:
            raise ValueError(
                f"dlor_peft.combine: {option}={getattr(self, option)!r} with combination_type {self.kind!r}: it "
                f"{allowed}. {remedy}."
            )

    @property
    def by_svd(self) -> bool:
        """Whether U V^T is combined as one matrix, of which the leading singular vectors are kept."""
        return self.kind.endswith("svd")

    @property
    def by_tensor(self) -> bool:
        """Whether q is combined with q, U with U and V with V, for which their shapes must agree."""
        return not self.by_svd and self.kind != "cat"

    @property
    def prunes(self) -> bool:
        return self._name in _PRUNING

    @property
    def elects_signs(self) -> bool:
        return self._name.endswith("ties")

    @property
    def _name(self) -> str:
        return self.kind.removesuffix("_svd")

    def of_residuals(self, residuals: Sequence[Residual], weights: Sequence[float], rank: int) -> Residual:
        """The residuals of one form, combined; to U V^T of at most `rank` where it is done by SVD."""
        residuals = _in_one_dtype(residuals)
        Us, Vs = [residual.U for residual in residuals], [residual.V for residual in residuals]
        q = self._merge_diagonals([residual.q for residual in residuals], weights)
        if self.by_tensor:
            q_in = self._merge_diagonals([residual.q_in for residual in residuals], weights)
            # as in LoRA: U V^T of a single adapter is weighted as asked, its sign on one of the two
            roots = [math.sqrt(abs(weight)) for weight in weights]
            signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
            return Residual(q, self._merge(Us, roots), self._merge(Vs, signed), q_in)
        if self.prunes and any(U.shape[-1] for U in Us):
            products = [U @ V.mT for U, V in zip(Us, Vs, strict=True)]
            return self._truncate(q, *_factors(self._merge(products, weights)), rank)
        U, V = torch.cat([weight * U for weight, U in zip(weights, Us, strict=True)], -1), torch.cat(Vs, -1)
        return self._truncate(q, U, V, rank) if self.by_svd else Residual(q, U, V)

    def of_updates(self, deltas: Sequence[Tensor], weights: Sequence[float], rank: int) -> Residual:
        """The dense updates W' - W of any forms, combined, as the nearest U V^T of at most `rank`."""
        return self._truncate(None, *_factors(self._merge(deltas, weights)), rank)

    def _merge(self, tensors: Sequence[Tensor], weights: Sequence[float], density: float | None = None) -> Tensor:
        """What PEFT's helper makes of the tensors; `density` overrides the one that was asked for."""
        tensors = list(tensors)
        of_tensors = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        if not self.prunes:
            return task_arithmetic(tensors, of_tensors)
        options: dict[str, Any] = {"density": density or self.density}
        if self.elects_signs:
            options["majority_sign_method"] = self.majority_sign_method
        with warnings.catch_warnings():
            # that it prunes nothing
            warnings.filterwarnings("ignore", "The density 1", UserWarning)
            return _PRUNING[self._name](tensors, of_tensors, **options)

    def _merge_diagonals(self, diagonals: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
        present = [q for q in diagonals if q is not None]
        if not present:
            return None
        shape = torch.broadcast_shapes(*(q.shape for q in present))
        full = [present[0].new_zeros(shape) if q is None else q.expand(shape) for q in diagonals]
        # of a scalar, no share can be pruned
        scalar = any(q.shape[-1] == 1 for q in present)
        return self._merge(full, weights, density=1.0 if scalar else None)

    def _truncate(self, q: Tensor | None, U: Tensor, V: Tensor, rank: int) -> Residual:
        """The nearest U V^T of the given rank, by the SVD of the small core; the diagonal stays."""
        if 0 in (rank, U.shape[-1]) or (U.shape[-1] <= rank and self.svd_clamp is None):
            return Residual(q, U[..., :rank], V[..., :rank])
        Q_U, R_U = torch.linalg.qr(U)
        Q_V, R_V = torch.linalg.qr(V)
        left, S, right_h = torch.linalg.svd(R_U @ R_V.mT, full_matrices=self.svd_full_matrices, driver=self.svd_driver)
        rank = min(rank, S.shape[-1])
        # as in LoRA: the singular values go to U
        U, V = Q_U @ (left[..., :rank] * S[..., None, :rank]), Q_V @ right_h[..., :rank, :].mT
        if self.svd_clamp is not None:
            bound = _quantile(torch.cat([U.flatten(-2), V.flatten(-2)], -1), self.svd_clamp)[..., None, None]
            U, V = U.clamp(-bound, bound), V.clamp(-bound, bound)
        return Residual(q, U, V)


@torch.no_grad()
def combine_tokens(
    layer: TrainableTokensLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """e + sum_i w_i (e_i - e) for each token of embedding e, over the adapters that train it: exact.

    `adapter_name` is overwritten; it has the tokens of all.
    """
    row = {token: row for row, token in enumerate(layer.token_indices[adapter_name])}
    trained, originals = layer.trainable_tokens_delta, cast(dict[str, Tensor], layer.trainable_tokens_original)
    stored = trained[adapter_name]
    rows = stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    parts = [
        (adapter, weight, [row[token] for token in layer.token_indices[adapter]])
        for adapter, weight in zip(adapters, weights, strict=True)
        if adapter in layer.token_indices
    ]
    # what the new adapter took for the originals are trained tokens where another is merged
    for adapter, _, at in parts:
        rows[at] = originals[adapter].to(rows)
    originals[adapter_name] = rows.to(stored.dtype, copy=True)
    for adapter, weight, at in parts:
        rows[at] += weight * (trained[adapter].to(rows) - originals[adapter].to(rows))
    stored.copy_(rows)


def _quantile(values: Tensor, level: float) -> Tensor:
    """The quantile of the values and their negatives together, (..., n) -> (...); 0.5 < level <= 1.

    A singular vector has no sign of its own. Taken of the values alone, the quantile would hang on the signs that the
    decomposition happens to give.
    """
    n = values.shape[-1]
    # torch.quantile refuses large tensors
    return values.abs().kthvalue(max(1, round((2 * level - 1) * n)), dim=-1).values


def _factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U and V with U V^T the given matrix, (..., m, n): itself, and the identity of the smaller dimension."""
    m, n = matrix.shape[-2:]
    identity = torch.eye(min(m, n)).to(matrix).expand(*matrix.shape[:-2], -1, -1)
    return (matrix, identity) if n <= m else (identity, matrix.mT)


def _in_one_dtype(residuals: Sequence[Residual]) -> list[Residual]:
    dtype = reduce(torch.promote_types, (residual.U.dtype for residual in residuals), torch.float32)
    return [residual.to(dtype) for residual in residuals]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
