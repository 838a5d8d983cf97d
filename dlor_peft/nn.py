"""Layers without a dense weight: y = F_L ... F_2 F_1 x + b, F_k = diag(1 + delta_k) + U_k V_k^T, trained from scratch.

I in_features, O out_features, n = max(I, O), L depth, r rank
    delta (S, n) or (S, 1), U (S, n, r), V (S, n, r)                    the S square factors
    end_delta (min(I, O),) or (1,), end_U (O, r), end_V (I, r)          where I != O, the one that is rectangular
S = L where I = O. Otherwise S = L - 1, and the rectangular factor, whose I is the rectangular identity, comes first
where the layer widens (I < O) and last where it narrows, so that all others act on the wider side. On the narrower one
they could not turn the subspace that the rectangular factor keeps.

Source: arXiv 2605.05659, networks of matrices alpha I + U V^T, with alpha = 1 + delta. Stored is the deviation from 1,
as adapters store it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .kernels import is_autocast, update
from .maths import collapse, materialise
from .reconstruct import factorise_product

DIAGONALS = ("vector", "scalar", "none")
WRITTEN_EXACTLY = {torch.float64: 1e-10, torch.float32: 1e-5}
"""dtype -> the relative error from which on factors are not those of a weight."""


class DLoRLinear(nn.Module):
    """y = F_L ... F_1 x + b for x (..., I), with about L (2 r + 1) max(I, O) parameters in the place of I O.

    Each factor is applied by the kernels of the adapters, square ones collapsed to one diagonal plus rank S r first,
    which costs O(n (S r)^2) a call: where L r nears n a dense layer is faster. dtypes, autocast, memory and gradients
    are those of `kernels.update`.

    Args:
        in_features, out_features: I and O.
        r: rank of each factor, at least 1.
        depth: L. Linear factors add no expressive power over one of rank L r; they change how it is trained.
        diagonal: "vector"; "scalar", the alpha of the paper; or "none", alpha = 1, which is not trained.
        bias: whether there is a b (O,), which starts at 0.
    """

    delta: Tensor | None
    U: Tensor
    V: Tensor
    end_delta: Tensor | None
    end_U: Tensor
    end_V: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        depth: int = 1,
        diagonal: str = "vector",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, r, depth, diagonal)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.depth, self.diagonal = r, depth, diagonal
        n, is_square = max(in_features, out_features), in_features == out_features
        self.num_square = depth if is_square else depth - 1

        def declare(name: str, wanted: bool, *shape: int) -> None:
            value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, value)

        has_diagonal, width = diagonal != "none", None if diagonal == "vector" else 1
        S = self.num_square
        declare("delta", bool(S) and has_diagonal, S, width or n)
        declare("U", bool(S), S, n, r)
        declare("V", bool(S), S, n, r)
        declare("end_delta", not is_square and has_diagonal, width or min(in_features, out_features))
        declare("end_U", not is_square, out_features, r)
        declare("end_V", not is_square, in_features, r)
        declare("bias", bias, out_features)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors that keep the mean square of a feature, from x to y.

        In expectation over the factors, where the features of x are of one size. With e = 1 / (2 L): V_k of variance
        1 / (number of rows), U_k of variance e / r, and alpha = sqrt(1 - e), so that alpha^2 + r (e / r) = 1. Where
        the layer widens, U of the rectangular factor has the variance (1 - (1 - e) I / O) / r, for the features that
        its diagonal does not reach. The mean square of a gradient, from y to x, is multiplied by O / I, as it is by a
        dense layer of variance 1 / I. With diagonal "none" alpha is 1, and each factor adds e: in all the mean square
        grows by exp(1 / 2) at most. b is 0.
        """
        e = 1 / (2 * self.depth)
        start = math.sqrt(1 - e) - 1
        if self.num_square:
            nn.init.normal_(self.U, 0, math.sqrt(e / self.r))
            nn.init.normal_(self.V, 0, 1 / math.sqrt(self.V.shape[1]))
            if self.delta is not None:
                nn.init.constant_(self.delta, start)
        if self.in_features != self.out_features:
            reached = min(1, self.in_features / self.out_features)
            nn.init.normal_(self.end_U, 0, math.sqrt((1 - (1 - e) * reached) / self.r))
            nn.init.normal_(self.end_V, 0, 1 / math.sqrt(self.in_features))
            if self.end_delta is not None:
                nn.init.constant_(self.end_delta, start)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"dlor_peft.nn: DLoRLinear takes floating-point numbers, not {x.dtype}: convert them.")
        device = x.device.type
        if is_autocast(device) and x.dtype is not torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        if self.in_features < self.out_features:
            wide = F.pad(x, (0, self.out_features - self.in_features))
            y = self._square(update(wide, x, self.end_delta, self.end_U, self.end_V))
        elif self.in_features > self.out_features:
            h = self._square(x)
            y = update(h[..., : self.out_features], h, self.end_delta, self.end_U, self.end_V)
        else:
            y = self._square(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """`to_dense()` at its cost, for models that look at the weight of a layer, as T5 at that of its `wo`."""
        return self.to_dense()

    def _square(self, x: Tensor) -> Tensor:
        return update(x, x, self.delta, self.U, self.V) if self.num_square else x

    def to_dense(self) -> Tensor:
        """The matrix (O, I) that multiplies x, in the dtype of the factors. Differentiable; O(n^2 L r)."""
        square = end = None
        if self.num_square:
            square = materialise(*collapse(_alpha(self.delta, self.U), self.U, self.V))
        if self.in_features != self.out_features:
            end = materialise(_alpha(self.end_delta, self.end_U), self.end_U, self.end_V)
        if square is None or end is None:
            matrix = end if square is None else square
            assert matrix is not None
            return matrix
        return square @ end if self.in_features < self.out_features else end @ square

    @classmethod
    def from_dense(cls, linear: nn.Linear, r: int, c: float = 1.0) -> Self:
        """The same map as `linear`, exactly, in K = max(1, ceil(rank(W - c I) / r)) factors with scalar diagonals.

        By `reconstruct.factorise_product` of the square matrix that has W in its corner and c I elsewhere. A W without
        structure has the full rank, and the factors then more parameters than it: this is a start, not a compression.
        The rank is that of the singular values above n eps (float64) or 4 eps (float32) of the largest.

        c is where alpha starts: with 1 few factors give I plus a low rank, and with the size of W, where that is far
        from 1, the error is small.

        Raises:
            TypeError: `linear` is no nn.Linear, or W neither float64 nor float32, whose factors would be rounded too
                far to give W.
            ValueError: W is on the meta device or not finite; or its factors, once rounded, differ from it by more
                than 1e-5 (float32) or 1e-10 (float64) of its norm, since c is far from its size.
            ValueError, ImportError: as of `factorise_product`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"dlor_peft.nn: from_dense takes an nn.Linear, not {type(linear).__name__}. Copy its weight (O, I) "
                "and bias into one; that of Conv1D is (I, O)."
            )
        W = linear.weight.detach()
        if W.dtype not in WRITTEN_EXACTLY:
            raise TypeError(
                f"dlor_peft.nn: from_dense takes a layer in float64 or float32, not {W.dtype}: convert it, and "
                "the new layer back where its rounded factors are good enough."
            )
        if W.is_meta:
            raise ValueError("dlor_peft.nn: from_dense needs the weight's values, and it is on the meta device.")
        O, I = W.shape
        n = max(I, O)
        square = c * torch.eye(n, dtype=torch.float64)
        square[:O, :I] = W
        # rounding to float32 gives a matrix of low rank singular values of at most sqrt(rank) eps / 2 of the largest
        tolerance = (n if W.dtype == torch.float64 else 4) * torch.finfo(W.dtype).eps
        d, U, V = factorise_product(square, r, c, tolerance)
        layer = cls(I, O, r, len(U), "scalar", linear.bias is not None, W.device, W.dtype)
        delta = d[:, :1] - 1
        with torch.no_grad():
            if I != O:
                end = 0 if I < O else -1
                values = {"end_delta": delta[end], "end_U": U[end][:O], "end_V": V[end][:I]}
                for name, value in values.items():
                    getattr(layer, name).copy_(value)
                delta, U, V = (part[1:] if I < O else part[:-1] for part in (delta, U, V))
            if layer.num_square:
                for name, value in {"delta": delta, "U": U, "V": V}.items():
                    getattr(layer, name).copy_(value)
            if layer.bias is not None:
                assert linear.bias is not None
                layer.bias.copy_(linear.bias)
            norm = W.norm().item()
            error = (layer.to_dense() - W).norm().item() / (norm or abs(c))
        if not error <= WRITTEN_EXACTLY[W.dtype]:
            raise ValueError(
                f"dlor_peft.nn: from_dense with c = {c} gives the weight to a relative error of {error:.1e} only, "
                f"since c is far from its size: give c that of its singular values, here up to "
                f"{torch.linalg.matrix_norm(W, 2).item():.2g}, scale the weight towards 1, or take float64."
            )
        return layer

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, depth={self.depth}, "
            f"diagonal={self.diagonal!r}, bias={self.bias is not None}"
        )


def replace_linear_layers(
    model: nn.Module,
    r: int,
    depth: int = 1,
    diagonal: str = "vector",
    exclude: Collection[str] = (),
) -> list[str]:
    """Put a new DLoRLinear in the place of every linear layer of `model`; their names.

    The model then has no dense projection, and is trained from scratch: what the layers had learned is gone. Layers
    whose name, or its last parts, is in `exclude` stay. Weights that stack several projections and are no layers, as
    those of experts, of nn.MultiheadAttention and of nn.LSTM, have to be named there too. A layer that stands in
    several places is replaced by one layer in all of them, or stays in all. The model is saved and loaded as any whose
    code makes the same replacement before it loads the safetensors file.

    Raises:
        TypeError: `exclude` is a string.
        ValueError: the model is a linear layer itself, or has adapters; a layer shares its weight or bias with another
            module, computes its weight from other parameters, or is of a kind that may be used without being called;
            weights are stacked; a name of `exclude` or the whole model matches nothing. The model is as it was then.
    """
    if isinstance(exclude, str):
        raise TypeError(f"dlor_peft.nn: exclude is the string {exclude!r}; give a list, exclude=[{exclude!r}].")
    places = dict(model.named_modules(remove_duplicate=False))
    if adapted := [name for name, module in places.items() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(f"dlor_peft.nn: {adapted[0]} has an adapter: replace the layers before there is one.")
    layers = {name: layer for name, layer in places.items() if isinstance(layer, (nn.Linear, Conv1D))}
    if "" in layers:
        raise ValueError("dlor_peft.nn: the model is a linear layer itself; make a DLoRLinear in its place.")
    stacked = [name for name, p in model.named_parameters() if _is_stacked(model, name, p)]
    kept = {word: [name for name in (*layers, *stacked) if f".{name}".endswith(f".{word}")] for word in exclude}
    if unmatched := [word for word, names in kept.items() if not names]:
        raise ValueError(
            f"dlor_peft.nn: exclude names no linear layer: {', '.join(map(repr, unmatched))}. The model has "
            f"{', '.join(list(layers)[:8]) or 'none'}{', ...' if len(layers) > 8 else ''}."
        )
    spared = {name for names in kept.values() for name in names}
    spared_layers = {layers[name] for name in spared if name in layers}
    replaced = {name: layer for name, layer in layers.items() if layer not in spared_layers}
    if not replaced:
        raise ValueError("dlor_peft.nn: the model has no linear layer to replace.")
    if dense := [name for name in stacked if name not in spared]:
        raise ValueError(
            f"dlor_peft.nn: {dense[0]} stacks the weights of several projections, which are no linear layers. Keep it "
            f"with exclude={list(dict.fromkeys(name.rpartition('.')[2] for name in dense))}."
        )
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    new: dict[nn.Module, DLoRLinear] = {}
    for name, layer in replaced.items():
        if type(layer) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"dlor_peft.nn: {name} is a {type(layer).__name__}, which may not be called as a layer is. Keep it "
                "with exclude."
            )
        if layer.weight not in owners:
            raise ValueError(
                f"dlor_peft.nn: the weight of {name} is computed from other parameters, as by weight_norm or pruning. "
                "Remove that, or keep the layer with exclude."
            )
        if shared := [part for part in ("weight", "bias") if owners.get(getattr(layer, part), 0) > 1]:
            raise ValueError(
                f"dlor_peft.nn: {name} shares its {shared[0]} with another module, as tied embeddings do. Keep it "
                "with exclude, or build the model with tie_word_embeddings=False."
            )
        if layer not in new:
            O, I = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
            device, dtype = layer.weight.device, layer.weight.dtype
            new[layer] = DLoRLinear(I, O, r, depth, diagonal, layer.bias is not None, device, dtype)
    for name, layer in replaced.items():
        model.set_submodule(name, new[layer])
    return list(replaced)


def _is_stacked(model: nn.Module, name: str, p: Tensor) -> bool:
    """Whether it may be several projections in one."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.MultiheadAttention, nn.RNNBase)):
        return p.ndim == 2
    # (experts, ., .), and no kernel of a convolution or our factors
    return p.ndim == 3 and len(p) > 1 and not isinstance(owner, (_ConvNd, DLoRLinear))


def _alpha(delta: Tensor | None, U: Tensor) -> Tensor:
    return U.new_ones(*U.shape[:-2], 1) if delta is None else 1 + delta


def _check(in_features: int, out_features: int, r: int, depth: int, diagonal: str) -> None:
    counts = {"in_features": in_features, "out_features": out_features, "r": r, "depth": depth}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"dlor_peft.nn: {name} = {value!r}; it must be a whole number, at least 1.")
        if value < 1:
            raise ValueError(f"dlor_peft.nn: {name} = {value}; it must be at least 1.")
    if diagonal not in DIAGONALS:
        raise ValueError(f"dlor_peft.nn: diagonal {diagonal!r} is none of {', '.join(map(repr, DIAGONALS))}.")
