"""Layers of DLoR and other methods, nested by `PeftMixedModel`: the outer one adapts what the inner one made."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, onload_layer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm import tqdm

from .config import DLoRConfig
from .layers import DLoRLayer
from .layers.weight import to_merge


def _prepare_model(self: BaseTuner, peft_config: PeftConfig, model: nn.Module) -> None:
    """Refuse an adapter of any method that cannot be nested with those that are there, before the first layer is."""
    config = cast(Any, _maybe_include_all_linear_layers(peft_config, model))
    ours = isinstance(config, DLoRConfig)
    if ours and config.ensure_weight_tying:
        raise ValueError(
            "dlor_peft.mixing: ensure_weight_tying=True is given, and PeftMixedModel ties no layers. Set it to False "
            "and keep the embeddings out of target_modules and modules_to_save, or add the adapter to a PeftModel."
        )
    for name, other in self.peft_config.items():
        parameters = getattr(config, "target_parameters", None) and getattr(other, "target_parameters", None)
        if parameters and isinstance(other, DLoRConfig) != ours:
            raise ValueError(
                f"dlor_peft.mixing: the adapter {name!r} has target_parameters, too, which PeftMixedModel cannot nest "
                "with those of another method. Leave them to one method."
            )
    for key, module in model.named_modules():
        if not self._check_target_module_exists(config, key):
            continue
        base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        is_attention = isinstance(base_layer, nn.MultiheadAttention)
        nested = [*_chain(module), *(_chain(base_layer.out_proj) if is_attention else ())]
        if not any(isinstance(layer, DLoRLayer) != ours for layer in nested):
            continue
        if is_attention or isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"dlor_peft.mixing: {key!r} belongs to nn.MultiheadAttention, which calls none of its projections and "
                "so takes DLoR or another method, not both. Keep it out of this adapter with exclude_modules."
            )
        if not ours and (config.peft_type == PeftType.SHIRA or getattr(config, "use_dora", False)):
            raise ValueError(
                f"dlor_peft.mixing: {key!r} has a DLoR adapter, past which SHiRA and DoRA read the base weight. Add "
                "the SHiRA or DoRA adapter first, or keep this layer out of it with exclude_modules."
            )


def merge_adapter(self: BaseTuner, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Merge nested layers from the inside, as the forward pass applies them.

    PEFT's order is from the outside, which is as good for sums alone.

    Raises:
        ValueError: an adapter would be merged before one that is applied before it.
    """
    _check_order(self.model, adapter_names)
    _merge(self, adapter_names, safe_merge)


def _unload_and_optionally_merge(
    self: BaseTuner,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """The base model, with adapters merged from the inside, or as it was; those that are not named are dropped."""
    if merge:
        _merge(self, adapter_names, safe_merge)
    for parent in tqdm(list(self.model.modules()), disable=not progressbar, desc="Unloading model"):
        for name, child in list(parent.named_children()):
            if isinstance(child, AuxiliaryTrainingWrapper) or not isinstance(parent, BaseTunerLayer):
                setattr(parent, name, _unloaded(child))
    # PEFT warns of a second adaptation where it is left
    if hasattr(self.model, "peft_config"):
        del self.model.peft_config
    return self.model


def _unloaded(module: Any) -> nn.Module:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        unload = getattr(module, "unload_and_optionally_merge_module", None)
        module = (
            cast(Any, module).base_layer
            if unload is None
            else unload(merge=False, safe_merge=False, adapter_names=None)
        )
    return module


def _merge(self: BaseTuner, adapter_names: list[str] | None, safe_merge: bool) -> None:
    self._check_merge_allowed()
    layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        if isinstance(layer, DLoRLayer) and to_merge(layer, adapter_names):
            layer.check_mergeable()
    before = {layer: list(layer.merged_adapters) for layer in layers}
    try:
        for layer in reversed(layers):
            with onload_layer(layer):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
    except Exception:
        _take_back(before)
        raise


def _take_back(before: dict[BaseTunerLayer, list[str]]) -> None:
    """Undo a merge that one of the layers has refused: of nested layers, from the outside."""
    changed = [layer for layer in before if layer.merged_adapters != before[layer]]
    for layer in changed:
        with onload_layer(layer):
            layer.unmerge()
    for layer in reversed(changed):
        if before[layer]:
            with onload_layer(layer):
                layer.merge(adapter_names=before[layer])


def _check_order(model: nn.Module, adapter_names: list[str] | None) -> None:
    """ValueError where nested layers, DLoR among them, would be merged in another order than from the inside."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inner = {layer.base_layer for layer in layers}
    for outermost in (layer for layer in layers if layer not in inner):
        chain = _chain(outermost)
        if len({isinstance(layer, DLoRLayer) for layer in chain}) < 2:
            continue
        unmerged: list[str] = []
        for depth, layer in reversed(list(enumerate(chain))):
            new = to_merge(layer, adapter_names)
            merged = [name for outer in chain[:depth] for name in outer.merged_adapters]
            if new and (unmerged or merged):
                before, after = (unmerged, new) if unmerged else (new, merged)
                raise ValueError(
                    f"dlor_peft.mixing: {', '.join(before)} must be merged before {', '.join(after)}, as the forward "
                    "pass applies them. Unmerge all, and merge them in one call."
                )
            unmerged += [name for name in to_merge(layer, None) if name not in new]


def _chain(module: Any) -> list[BaseTunerLayer]:
    """Nested layers from the outside, without the base layer."""
    chain = []
    while isinstance(module, BaseTunerLayer):
        chain.append(module)
        module = cast(Any, module).base_layer
    return chain
