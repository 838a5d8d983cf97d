"""Merging the adapters of a whole model: all of its layers, or none."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, onload_layer
from torch import nn

from .layers import DLoRLayer
from .layers.weight import to_merge


class MergingTuner(BaseTuner):
    """The part of a DLoR model that merges, and looks at all layers before the first one changes."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DLoRLayer)}
        names = {key: to_merge(layer, adapter_names) for key, layer in layers.items()}
        _check_shared(layers, names)
        merged = [(layer, names[key]) for key, layer in layers.items() if names[key]]
        for layer, _ in merged:
            layer.check_mergeable()
        for layer, adapters in merged if safe_merge else ():
            with onload_layer(layer):
                layer.check_finite(adapters)


def _check_shared(layers: dict[str, DLoRLayer], names: dict[str, list[str]]) -> None:
    """ValueError where a merge would write to one weight for two layers: each would restore what it found there."""
    writers: dict[nn.Parameter, str] = {}
    for key, layer in layers.items():
        weight = getattr(layer.get_base_layer(), layer.parameter_name, None)
        if layer.is_tied or not (names[key] or layer.merged_adapters) or not isinstance(weight, nn.Parameter):
            continue
        other = writers.setdefault(weight, key)
        if other != key and (names[key] or names[other]):
            raise ValueError(
                f"dlor_peft.merging: {other!r} and {key!r} share one weight, and each adapts it on its own, so that "
                "merging one changes the other. Train them with ensure_weight_tying=True, or untie them first."
            )
