"""Whom the benchmarks compare: DLoR, and the methods of PEFT beside it, on every linear layer of a module.

All of them get random weights, so that no factor is zero. HRA, OFT and BOFT have no rank in LoRA's sense. "Equal rank"
gives them r reflections (HRA, which changes the weight by rank r) or blocks of size r (OFT, BOFT); "equal parameters"
the number of reflections or the block size that brings them nearest to LoRA's count, where a block size divides the
in_features of every layer. DoRA has LoRA's parameters and one a row more: as many as DLoR "scaled" on the output.

"base dtype" keeps PEFT from holding the adapter in float32 over a half-precision base. A side that is not named is
"auto", which is the input of a square layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dlor_peft import DLoRConfig

from .addmm_lora import AddmmLoRA

Shapes = list[tuple[int, int]]  # (in_features, out_features) of each layer


@dataclass(frozen=True)
class Contestant:
    config: Callable[[Shapes, int], PeftConfig]
    is_float32: bool = True  # whether PEFT holds the adapter in float32 over a half-precision base
    is_compiled: bool = False
    replace: Callable[[LoraLayer], nn.Module] | None = None

    def adapt(self, module: nn.Module, r: int) -> nn.Module:
        """A copy of `module`, on the same frozen weights, all its linear layers but the output layer adapted."""
        adapted = copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters()})
        head = getattr(adapted, "get_output_embeddings", lambda: None)()
        linears = {
            name: layer
            for name, layer in adapted.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
        }
        config = self.config([(layer.in_features, layer.out_features) for layer in linears.values()], r)
        config.target_modules = set(linears)  # pyright: ignore[reportAttributeAccessIssue]
        get_peft_model(adapted, config, autocast_adapter_dtype=self.is_float32)
        for name in linears:
            layer = adapted.get_submodule(name)
            assert isinstance(layer, BaseTunerLayer)
            if self.replace is not None:
                adapted.set_submodule(name, self.replace(layer))
            if self.is_compiled:
                layer.compile()
        # BOFT's permutations start on the CPU, and would be copied in every pass
        return adapted.to(next(module.parameters()).device)


def _dlor(**settings: Any) -> Callable[[Shapes, int], PeftConfig]:
    return lambda shapes, r: DLoRConfig(r=r, init_weights=False, **settings)


def _lora(**settings: Any) -> Callable[[Shapes, int], PeftConfig]:
    return lambda shapes, r: LoraConfig(r=r, lora_alpha=r, init_lora_weights=False, **settings)


def _hra(r: int) -> PeftConfig:
    return HRAConfig(r=r, init_weights=False)


def _oft(size: int) -> PeftConfig:
    return OFTConfig(oft_block_size=size, init_weights=False)


def _boft(size: int) -> PeftConfig:
    return BOFTConfig(boft_block_size=size, init_weights=False)


def _equal_rank(method: Callable[[int], PeftConfig]) -> Callable[[Shapes, int], PeftConfig]:
    return lambda shapes, r: method(r)


def _equal_parameters(
    method: Callable[[int], PeftConfig],
    sizes: Callable[[Shapes], Iterable[int]],
    count: Callable[[int, int, int], int],
) -> Callable[[Shapes, int], PeftConfig]:
    """`count` is the number of parameters of a layer, by in_features, out_features and the size to be found."""

    def config(shapes: Shapes, r: int) -> PeftConfig:
        wanted = sum(r * (I + O) for I, O in shapes)
        return method(min(sizes(shapes), key=lambda size: abs(wanted - sum(count(I, O, size) for I, O in shapes))))

    return config


def _block_sizes(shapes: Shapes) -> list[int]:
    common = math.gcd(*(I for I, _ in shapes))
    return [size for size in range(2, common + 1) if common % size == 0]


def _ranks(shapes: Shapes) -> range:
    return range(1, min(I for I, _ in shapes) + 1)


CONTESTANTS = {
    "DLoR scaled": Contestant(_dlor()),
    "DLoR scaled, input": Contestant(_dlor(side="input")),
    "DLoR scaled, output": Contestant(_dlor(side="output")),
    "DLoR scaled, both": Contestant(_dlor(side="both")),
    "DLoR additive": Contestant(_dlor(mode="additive")),
    "DLoR multiplicative, depth 1": Contestant(_dlor(mode="multiplicative")),
    "DLoR multiplicative, depth 2": Contestant(_dlor(mode="multiplicative", depth=2)),
    "DLoR multiplicative, depth 4": Contestant(_dlor(mode="multiplicative", depth=4)),
    "DLoR multiplicative, output, depth 4": Contestant(_dlor(mode="multiplicative", side="output", depth=4)),
    "DLoR scaled, compiled": Contestant(_dlor(), is_compiled=True),
    "PEFT LoRA": Contestant(_lora()),
    "PEFT LoRA, base dtype": Contestant(_lora(), is_float32=False),
    "PEFT LoRA, compiled": Contestant(_lora(), is_compiled=True),
    "addmm_ LoRA": Contestant(_lora(), replace=partial(AddmmLoRA, keeps_xA=False)),
    "addmm_ LoRA, x A kept": Contestant(_lora(), replace=partial(AddmmLoRA, keeps_xA=True)),
    "PEFT DoRA": Contestant(_lora(use_dora=True)),
    "PEFT OFT, equal rank": Contestant(_equal_rank(_oft)),
    "PEFT OFT, equal parameters": Contestant(
        _equal_parameters(_oft, _block_sizes, lambda I, O, size: I * (size - 1) // 2)
    ),
    "PEFT BOFT, equal rank": Contestant(_equal_rank(_boft)),
    "PEFT BOFT, equal parameters": Contestant(_equal_parameters(_boft, _block_sizes, lambda I, O, size: I * size + O)),
    "PEFT HRA, equal rank": Contestant(_equal_rank(_hra)),
    "PEFT HRA, equal parameters": Contestant(_equal_parameters(_hra, _ranks, lambda I, O, size: I * size)),
}
