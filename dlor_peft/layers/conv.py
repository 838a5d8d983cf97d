"""DLoR on convolutions: the features are the channels.

The weight (O, C, *kernel), C = in_channels / groups, is the matrix (O, C K), K the number of taps. Factors mix
channels: on the input side the C channels of a group, alike in all groups, on the output side all O. The low-rank term
of the additive and scaled modes is U V^T, V (C K, r): a convolution to r channels, then a 1x1 convolution from them.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DLoRConfig
from ..form import Form
from ..kernels import update
from .activation import ActivationLayer


class Conv(ActivationLayer):
    """DLoR on torch.nn.Conv1d, Conv2d and Conv3d."""

    plain_forwards: ClassVar = {kind: kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}

    @property
    def _conv(self) -> nn.Conv2d:
        return self.get_base_layer()

    @property
    def groups(self) -> int:
        """As the base layer has it: PEFT's LoRA asks the layer that it wraps."""
        return self._conv.groups

    def resolve_form(self, config: DLoRConfig, r: int, depth: int) -> Form:
        conv = self._conv
        grouped = conv.groups > 1
        if grouped and config.mode == "additive" and config.diagonal != "none":
            raise ValueError(
                f"dlor_peft.layers.conv: a convolution with groups={conv.groups} has no identity to add a diagonal "
                'to, as each output reads the channels of its group only. Use mode="scaled", or diagonal="none".'
            )
        sides = ("input",) if grouped and config.mode == "multiplicative" else ("input", "output", "both")
        # row-major: the last dimension of the kernel runs fastest
        centre = 0
        for size in conv.kernel_size:
            centre = centre * size + size // 2
        try:
            return Form.resolve(
                config,
                r,
                depth,
                conv.in_channels // conv.groups,
                conv.out_channels,
                sides,
                taps=prod(conv.kernel_size),
                centre=centre,
            )
        except ValueError as error:
            raise ValueError(
                f"dlor_peft.layers.conv: in a convolution with groups={conv.groups} the output channels of different "
                f"groups read different inputs, and mixing them is no convolution of that kind: {error}"
            ) from None

    def _without_bias(self, x: Tensor) -> Tensor:
        return self._conv._conv_forward(x, self._conv.weight, None)

    def _response_to_zero(self, x: Tensor) -> Tensor:
        conv = self._conv
        # as wide as the kernel, and wide enough for the padding to be read off
        widths = zip(conv.dilation, conv.kernel_size, conv._reversed_padding_repeated_twice[::-2], strict=True)
        extent = [d * (k - 1) + 1 + p for d, k, p in widths]
        return self.base_layer(x.new_zeros(1, self.in_features, *extent))[0].flatten(1)[:, 0]

    def _along_features(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * len(self._conv.kernel_size))

    def _mix(
        self,
        acc: Tensor,
        x: Tensor,
        q: Tensor | None,
        U: Tensor | None = None,
        V: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """update() on the channels of each position, group by group where there are fewer factors than channels."""
        dim = -1 - len(self._conv.kernel_size)
        channels = x.shape[dim]
        width = U.shape[-2] if U is not None else channels if q is None or q.numel() == 1 else q.numel()

        def channels_last(t: Tensor) -> Tensor:
            return t.unflatten(dim, (channels // width, width)).movedim(dim, -1)

        x_last = channels_last(x)
        acc_last = x_last if acc is x else channels_last(acc)
        y = update(acc_last, x_last, q, U, V, scale).movedim(-1, dim).flatten(dim - 1, dim)
        # in the layout of x, on which the kernel of the convolution, and so its rounding, depends
        return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)

    def _term(
        self,
        acc: Tensor,
        x: Tensor,
        q: Tensor | None,
        U: Tensor | None = None,
        V: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        assert U is not None
        assert V is not None
        conv, x = self._conv, x.to(acc.dtype)
        if U.shape[1]:
            t = conv._conv_forward(x, self._as_kernel(V).to(x.dtype), None)
            pointwise = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[conv.weight.ndim]
            combine = U.view(*U.shape, *[1] * len(conv.kernel_size)).to(t.dtype)
            acc = acc + scale * pointwise(t, combine, groups=conv.groups).to(acc.dtype)
        if q is None:
            return acc
        # the input that the centre tap reads, at each position of the output
        padded = F.pad(
            x,
            conv._reversed_padding_repeated_twice,
            mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode,
        )
        for dim, (size, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=-len(conv.kernel_size)
        ):
            start = size // 2 * dilation
            positions = torch.arange(acc.shape[dim], device=x.device) * stride + start
            padded = padded.index_select(dim, positions)
        dim = -1 - len(conv.kernel_size)
        y = update(
            acc.movedim(dim, -1),
            padded.movedim(dim, -1),
            q,
            acc.new_empty(acc.shape[dim], 0),
            acc.new_empty(x.shape[dim], 0),
            scale,
        )
        return y.movedim(-1, dim)

    def _as_kernel(self, V: Tensor) -> Tensor:
        """V (C K, r) -> the kernel of a convolution to r channels in each group."""
        conv = self._conv
        return V.mT.unflatten(-1, conv.weight.shape[1:]).repeat(conv.groups, *[1] * (conv.weight.ndim - 1))

    def _read_features(self, z: Tensor, V: Tensor) -> Tensor:
        dim = -1 - len(self._conv.kernel_size)
        return z.to(V).unflatten(dim, (-1, len(V))).movedim(dim, -1) @ V

    def _read_input(self, x: Tensor, V: Tensor) -> Tensor:
        t = self._conv._conv_forward(x.to(V), self._as_kernel(V), None)
        dim = -1 - len(self._conv.kernel_size)
        return t.unflatten(dim, (self._conv.groups, -1)).movedim(dim, -1)

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self._conv.weight.shape[1:])
