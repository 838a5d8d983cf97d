"""LoRA as Unsloth and axolotl write it: one autograd function a layer, added in place by addmm_, which keeps only x.

Written anew after unsloth/kernels/fast_lora.py (LoRA_W) and axolotl/kernels/lora.py. T tokens, I and O features in and
out, r rank; W (O, I), A (r, I), B (O, r) as PEFT stores them, s the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class _AddmmLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float, keeps_xA: bool
    ) -> Tensor:
        out_TO = nn.functional.linear(x, W, b)
        xA_TR = x @ A.to(x.dtype).T
        out_TO.addmm_(xA_TR, B.to(x.dtype).T, alpha=s)
        ctx.save_for_backward(x, A, B, xA_TR if keeps_xA else None)
        ctx.W, ctx.s = W, s
        return out_TO

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, A, B, xA_TR = ctx.saved_tensors
        A, B = A.to(x.dtype), B.to(x.dtype)
        xA_RT = A @ x.T if xA_TR is None else xA_TR.T
        # Unsloth forms this product twice
        gB_TR = g @ B
        dA_IR = x.new_empty(A.T.shape).addmm_(x.T, gB_TR, alpha=ctx.s, beta=0)
        dB_RO = x.new_empty(B.T.shape).addmm_(xA_RT, g, alpha=ctx.s, beta=0)
        dx_TI = (g @ ctx.W).addmm_(gB_TR, A, alpha=ctx.s)
        return dx_TI, None, None, dA_IR.T, dB_RO.T, None, None


class AddmmLoRA(nn.Module):
    """Computes what PEFT's LoRA layer `lora` does, with its tensors; the factors are cast to the dtype of x.

    With `keeps_xA` x A^T is kept for the backward pass, and else formed once more there, as Unsloth and axolotl do.
    """

    def __init__(self, lora: LoraLayer, keeps_xA: bool) -> None:
        super().__init__()
        self.lora = lora
        self.keeps_xA = keeps_xA

    def forward(self, x: Tensor) -> Tensor:
        base, (name,) = self.lora.get_base_layer(), self.lora.active_adapters
        A, B = self.lora.lora_A[name].weight, self.lora.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        out = _AddmmLoRA.apply(flat, base.weight, base.bias, A, B, self.lora.scaling[name], self.keeps_xA)
        return out.reshape(*x.shape[:-1], out.shape[-1])
