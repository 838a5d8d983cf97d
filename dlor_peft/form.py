"""The form of one adapter on one layer: the adapted weight W', acting on activations and written out as a matrix.

W (O, I) frozen weight, y = x W^T + b; O out_features, I in_features, L depth, r rank.
Stored: dlor_diag (L, d) or (L, 1), dlor_diag_in (L, I) or (L, 1), dlor_U (L, p, r), dlor_V (L, q, r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DLoRConfig
from .kernels import update
from .maths import collapse, materialise

Map = Callable[[Tensor], Tensor]


class Residual(NamedTuple):
    """diag(q) + U V^T: what is added to the weight, or to the identity that scales or multiplies it.

    A stack is collapsed to one. Side "both" has a second diagonal, on the input. A part that is switched off is None
    (diagonals) or has no columns (U, V).
    """

    q: Tensor | None  # (d,) or (1,)
    U: Tensor  # (p, L r)
    V: Tensor  # (q, L r)
    q_in: Tensor | None = None  # (I,) or (1,)


@dataclass(frozen=True)
class Form:
    """Mode, side, diagonal, rank and depth, resolved for one layer."""

    mode: str
    side: str | None  # None where no part of the update has a side
    diagonal: str
    r: int
    depth: int
    in_features: int
    out_features: int

    @classmethod
    def resolve(cls, config: DLoRConfig, r: int, depth: int, in_features: int, out_features: int) -> Form:
        """The form that `config` means for a layer of this shape: "auto" is the smaller side, the input at a tie."""
        side: str | None = config.side
        if config.mode == "additive" or (config.mode == "scaled" and config.diagonal == "none"):
            side = None
        elif side == "auto":
            side = "output" if out_features < in_features else "input"
        return cls(config.mode, side, config.diagonal, r, depth, in_features, out_features)

    @property
    def widths(self) -> tuple[int, int]:
        """(p, q), the number of rows of U and of V."""
        if self.mode != "multiplicative":
            return self.out_features, self.in_features
        width = self.in_features if self.side == "input" else self.out_features
        return width, width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the stored tensors; a part that is switched off has none."""
        I, O, L, r = self.in_features, self.out_features, self.depth, self.r
        d = min(I, O) if self.mode == "additive" else I if self.side == "input" else O
        p, q = self.widths
        shapes: dict[str, tuple[int, ...]] = {}
        if self.diagonal != "none":
            shapes["dlor_diag"] = (L, d if self.diagonal == "vector" else 1)
        if self.side == "both":
            shapes["dlor_diag_in"] = (L, I if self.diagonal == "vector" else 1)
        if r:
            shapes |= {"dlor_U": (L, p, r), "dlor_V": (L, q, r)}
        return shapes

    def residual(self, tensors: dict[str, Tensor]) -> Residual:
        """What the stored tensors amount to, differentiable; a stack is collapsed, in float32 or wider."""
        some = next(iter(tensors.values()))
        delta, delta_in = tensors.get("dlor_diag"), tensors.get("dlor_diag_in")
        p, q = self.widths
        U = tensors.get("dlor_U", some.new_empty(self.depth, p, 0))
        V = tensors.get("dlor_V", some.new_empty(self.depth, q, 0))
        if self.depth == 1:
            return Residual(None if delta is None else delta[0], U[0], V[0], None if delta_in is None else delta_in[0])
        dtype = torch.promote_types(some.dtype, torch.float32)
        delta = some.new_zeros(self.depth, 1, dtype=dtype) if delta is None else delta.to(dtype)
        _, U, V = collapse(1 + delta, U.to(dtype), V.to(dtype))
        # the product of the 1 + delta_k, less 1: formed without the 1, in which a small delta would round away
        q = delta[0]
        for step in delta[1:]:
            q = q + step + q * step
        return Residual(None if self.diagonal == "none" else q, U, V)

    @property
    def acts_on_output(self) -> bool:
        """Whether W x itself, without the bias of the layer, is scaled or multiplied."""
        return self.side in ("output", "both")

    def forward(self, residual: Residual, x: Tensor, base: Map, scale: float, dropout: Map) -> Tensor:
        """x W'^T, with base(x) = x W^T; x (..., I), the result (..., O) has the dtype of base(x).

        `base` may itself be an adapted layer, and may add a bias unless the form acts on the output. Dropout acts on
        the input of the update, never on the path through the frozen weight. Side "both" calls `base` a second time
        where scale is not 1.
        """
        q, U, V, q_in = residual
        if self.mode == "additive":
            return update(base(x), dropout(x), q, U, V, scale)
        if self.mode == "multiplicative" and self.side == "input":
            return base(update(x, dropout(x), q, U, V, scale))
        if self.mode == "multiplicative":
            y = base(x)
            return update(y, dropout(y), q, U, V, scale)
        if self.side == "both" and scale != 1:
            return torch.lerp(base(x), self.forward(residual, x, base, 1.0, dropout), scale)
        on_input = q if self.side == "input" else q_in
        on_output = None if self.side == "input" else q
        dropped = dropout(x)
        y = base(x if on_input is None else update(x, dropped, on_input, scale=scale))
        if on_output is not None:
            y = update(y, dropout(y), on_output, scale=scale)
        return update(y, dropped, None, U, V, scale) if self.r else y

    def delta_weight(self, residual: Residual, W: Tensor, scale: float) -> Tensor:
        """W' - W, (O, I), computed in the dtype of W without subtracting: small updates keep their precision."""
        q, U, V, q_in = (None if t is None else t.to(W.dtype) for t in residual)
        assert U is not None
        assert V is not None
        if self.mode == "multiplicative":
            if self.side == "input":
                return update(None, W, q, V, U, scale)
            return update(None, W.T, q, U, V, scale).T
        if self.mode == "additive" or q is None:
            return materialise(W.new_zeros(1) if q is None else q, U, V) * scale
        gain = q if self.side == "input" else q[:, None]
        if q_in is not None:
            gain = gain + q_in + gain * q_in
        return (gain * W + U @ V.T) * scale
