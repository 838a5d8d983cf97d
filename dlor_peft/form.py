"""The form of one adapter on one layer: the adapted weight W', acting on activations and written out as a matrix.

W (O, I) frozen weight, y = x W^T + b; O out_features, I in_features, L depth, r rank.
Stored: dlor_diag (L, d) or (L, 1), dlor_diag_in (L, I) or (L, 1), dlor_U (L, p, r), dlor_V (L, q, r).
A convolution has K taps and the weight (O, I K), I the outer index of a row; its channels are the features.
A weight of E experts, (E, O, I), has tensors of its own for each: every shape above with E after L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .config import DLoRConfig
from .kernels import collapse_stack, linear, update, without_autocast
from .maths import apply

Map = Callable[[Any], Tensor]


class Update(Protocol):
    """acc + scale (q * x + (x V) U^T), as `kernels.update` has it for features in the last dimension."""

    def __call__(
        self,
        acc: Any,
        x: Any,
        q: Tensor | None,
        U: Tensor | None = None,
        V: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor: ...


class Residual(NamedTuple):
    """diag(q) + U V^T: what is added to the weight, or to the identity that scales or multiplies it.

    A stack is collapsed to one; where it is not, L is the first dimension of all. Side "both" has a second diagonal,
    on the input. A part that is switched off is None (diagonals) or has no columns (U, V).
    """

    q: Tensor | None  # (d,) or (1,)
    U: Tensor  # (p, L r)
    V: Tensor  # (q, L r)
    q_in: Tensor | None = None  # (I,) or (1,)

    def to(self, dtype: torch.dtype) -> Residual:
        return Residual(*(None if t is None else t.to(dtype) for t in self))  # pyright: ignore[reportArgumentType]

    def of_expert(self, e: int) -> Residual:
        """That of one expert, where the experts are the first dimension of all."""
        return Residual(*(None if t is None else t[e] for t in self))  # pyright: ignore[reportArgumentType]


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
    taps: int = 1
    centre: int = 0  # the tap that the rectangular identity of mode "additive" stands on
    experts: int | None = None
    # whether the stored tensors are those of the transposed weight: an output layer tied to an embedding
    transposed: bool = False

    @classmethod
    def resolve(
        cls,
        config: DLoRConfig,
        r: int,
        depth: int,
        in_features: int,
        out_features: int,
        sides: Sequence[str] = ("input", "output", "both"),
        **geometry: Any,
    ) -> Form:
        """The form that `config` means for a layer of this shape: "auto" is the smaller side, the input at a tie.

        ValueError where the side is not one of `sides`, those that the layer can be adapted on.
        """
        side: str | None = config.side
        if config.mode == "additive" or (config.mode == "scaled" and config.diagonal == "none"):
            side = None
        elif side == "auto":
            smaller = "output" if out_features < in_features else "input"
            side = smaller if smaller in sides else sides[0]
        if side is not None and side not in sides:
            allowed = " or ".join(map(repr, (*sides, "auto")))
            raise ValueError(f"mode {config.mode!r} takes side={allowed} there, but side is {side!r}.")
        return cls(config.mode, side, config.diagonal, r, depth, in_features, out_features, **geometry)

    @property
    def widths(self) -> tuple[int, int]:
        """(p, q), the number of rows of U and of V."""
        if self.mode != "multiplicative":
            return self.out_features, self.in_features * self.taps
        width = self.in_features if self.side == "input" else self.out_features
        return width, width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the stored tensors; a part that is switched off has none."""
        if self.transposed:
            return self.transpose().shapes
        I, O, r = self.in_features, self.out_features, self.r
        d = min(I, O) if self.mode == "additive" else I if self.side == "input" else O
        p, q = self.widths
        stack = (self.depth,) if self.experts is None else (self.depth, self.experts)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.diagonal != "none":
            shapes["dlor_diag"] = (*stack, d if self.diagonal == "vector" else 1)
        if self.side == "both":
            shapes["dlor_diag_in"] = (*stack, I if self.diagonal == "vector" else 1)
        if r:
            shapes |= {"dlor_U": (*stack, p, r), "dlor_V": (*stack, q, r)}
        return shapes

    def of_experts(self, experts: int) -> Form:
        """The form of a weight (experts, O, I), with tensors of its own for each expert."""
        return replace(self, experts=experts)

    def transpose(self) -> Form:
        """The form of W'^T, with the same tensors."""
        side = {"input": "output", "output": "input"}.get(self.side or "", self.side)
        return replace(
            self,
            side=side,
            in_features=self.out_features,
            out_features=self.in_features,
            transposed=not self.transposed,
        )

    def residual(self, tensors: dict[str, Tensor], collapsed: bool = True) -> Residual:
        """What the stored tensors amount to, differentiable; a stack is collapsed, in float32 or wider.

        Or, for `update`, the stack as it is, its q, U and V with the depth in front: where it is not `collapsed`.
        """
        if self.transposed:
            q, U, V, q_in = self.transpose().residual(tensors, collapsed)
            if self.depth > 1 and not collapsed:
                # the transposed factors multiply in the other order
                return Residual(None if q is None else q.flip(0), V.flip(0), U.flip(0))
            return Residual(q, V, U) if q_in is None else Residual(q_in, V, U, q)
        delta, delta_in = tensors.get("dlor_diag"), tensors.get("dlor_diag_in")
        U, V = self._low_rank(tensors)
        if self.depth == 1:
            # not an index, which has a tensor of zeros to fill for its gradient
            delta, delta_in = (None if part is None else part.squeeze(0) for part in (delta, delta_in))
            return Residual(delta, U.squeeze(0), V.squeeze(0), delta_in)
        if not collapsed:
            return Residual(delta, U, V)
        with without_autocast(U.device.type):
            return Residual(*collapse_stack(delta, U, V))

    def _low_rank(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.r:
            return tensors["dlor_U"], tensors["dlor_V"]
        some = next(iter(tensors.values()))
        stack = (self.depth,) if self.experts is None else (self.depth, self.experts)
        p, q = self.widths
        return some.new_empty(*stack, p, 0), some.new_empty(*stack, q, 0)

    @property
    def acts_on_output(self) -> bool:
        """Whether W x itself, without the bias of the layer, is scaled or multiplied."""
        return self.side in ("output", "both")

    def enter(self, residual: Residual, x: Any, scale: float, dropout: Map, mix: Update = update) -> tuple[Any, Any]:
        """What the frozen weight is applied to, and x after dropout, which `leave` takes."""
        q, U, V, q_in = residual
        dropped = dropout(x)
        if self.mode == "multiplicative" and self.side == "input":
            return mix(x, dropped, q, U, V, scale), dropped
        on_input = q if self.side == "input" else q_in
        if self.mode == "scaled" and on_input is not None:
            return mix(x, dropped, on_input, scale=scale), dropped
        return x, dropped

    def leave(
        self,
        residual: Residual,
        y: Tensor,
        dropped: Any,
        scale: float,
        dropout: Map,
        mix: Update = update,
        term: Update = update,
        bias: Tensor | None = None,
    ) -> Tensor:
        """What becomes of the output y of the frozen layer, which holds `bias`: the adapter acts on y without it."""
        q, U, V, _ = residual
        if self.mode == "additive":
            return term(y, dropped, q, U, V, scale)
        if self.acts_on_output:
            z = y if bias is None else y - bias.to(y.dtype)
            low_rank = (U, V) if self.mode == "multiplicative" else (None, None)
            y = mix(y, dropout(z), q, *low_rank, scale)
        return term(y, dropped, None, U, V, scale) if self.mode == "scaled" and self.r else y

    def forward(
        self,
        residual: Residual,
        x: Any,
        base: Map,
        scale: float,
        dropout: Map,
        mix: Update = update,
        term: Update = update,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x W'^T + bias, with base(x) = x W^T + bias; x (..., I), the result (..., O) has the dtype of base(x).

        `base` may itself be an adapted layer. Dropout acts on the input of the update, never on the path through the
        frozen weight. A layer whose activations are not (..., features) brings its own update: `mix` between the
        features of one activation, `term` from the layer's input to its output.
        """
        if self.calls_twice(scale):
            adapted = self.forward(residual, x, base, 1.0, dropout, mix, term, bias)
            frozen = base(x)
            # not torch.lerp: of its weight, torch.compile makes a constant
            return frozen + scale * (adapted - frozen)
        entered, dropped = self.enter(residual, x, scale, dropout, mix)
        return self.leave(residual, base(entered), dropped, scale, dropout, mix, term, bias)

    def forward_linear(self, residual: Residual, x: Tensor, W: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """`forward` without dropout where base(x) is x W^T + bias and nothing else: one operation.

        Not for a form that `calls_twice`.
        """
        q, U, V, q_in = residual
        if self.mode == "multiplicative":
            assert self.side is not None
            return linear(x, W, bias, self.side, q, U, V, scale=scale)
        if self.mode == "scaled" and self.side == "input":
            q, q_in = None, q
        return linear(x, W, bias, self.mode, q, U, V, q_in, scale)

    def calls_twice(self, scale: float) -> bool:
        """Whether `forward` calls the frozen layer twice: W' of side "both" is no W scaled once where s is not 1."""
        return self.side == "both" and scale != 1

    @property
    def mixes(self) -> str | None:
        """Whether W' mixes the "rows" of W, or its "columns", or neither: W' of the others needs not all of W."""
        if self.mode != "multiplicative":
            return None
        return "rows" if self.side == "output" else "columns"

    def read_by_update(self, W: Tensor) -> Tensor:
        """What U V^T multiplies, or is added to, as rows that V reads: (..., O, I K) -> (..., n, q)."""
        if self.mode != "multiplicative":
            return W
        if self.side == "output":
            return W.mT
        return W.unflatten(-1, (self.in_features, self.taps)).mT.flatten(-3, -2)

    def delta_weight(self, residual: Residual, W: Tensor, start: int = 0) -> Tensor:
        """W' - W at scale 1, (..., O, I K), in the dtype of W, not by subtraction: small updates keep their precision.

        Differentiable in all its arguments. Where W' does not mix the rows, W may be some of them, from `start` on;
        where it does, some columns.
        """
        q, U, V, q_in = residual.to(W.dtype)
        I, O, K = self.in_features, W.shape[-2], self.taps
        if self.mode == "multiplicative":
            d = W.new_zeros(1) if q is None else q.unsqueeze(-2)
            if self.side == "output":
                return apply(W.mT, d, U, V).mT
            channels_last = W.unflatten(-1, (I, K)).mT.flatten(-3, -2)  # (..., O K, I)
            return apply(channels_last, d, V, U).unflatten(-2, (O, K)).mT.flatten(-2)
        delta = U[..., start : start + O, :] @ V.mT
        if q is None:
            return delta
        if self.mode == "additive":
            stop = max(start, min(start + O, self.out_features, I))
            leading = torch.arange(start, stop, device=W.device)
            delta[..., leading - start, leading * K + self.centre] += _rows(q, start, stop)
            return delta
        gain = _rows(q, start, start + O).unsqueeze(-1)
        if self.side == "input":
            gain = _by_column(q, K)
        elif q_in is not None:
            gain_in = _by_column(q_in, K)
            gain = gain + gain_in + gain * gain_in
        return gain * W + delta


def _rows(q: Tensor, start: int, stop: int) -> Tensor:
    return q if q.shape[-1] == 1 else q[..., start:stop]


def _by_column(q: Tensor, taps: int) -> Tensor:
    """(..., I) or (..., 1) -> (..., 1, I taps) or (..., 1, 1)."""
    return (q if q.shape[-1] == 1 else q.repeat_interleave(taps, dim=-1)).unsqueeze(-2)
