"""The frozen weight of an adapted layer: read as a matrix, replaced by W' and restored."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..blocks import Part, write_adapted
from ..form import Form, Residual
from .placement import fetch, is_fsdp_managed, offload_hook, store
from .quantised import Snapshot, dequantised, refusal, write


class WeightLayer(nn.Module, BaseTunerLayer):
    """The part of an adapted layer that knows its base weight. W is (..., out_features, in_features)."""

    # the adapted parameter of the base layer
    parameter_name = "weight"

    quantization_backend: Any
    form: dict[str, Form]
    scaling: dict[str, float]
    tied_to: dict[str, Any]
    dlor_dropout: nn.ModuleDict
    _merged_adapters: list[str]
    _unmerged: Tensor | Snapshot | None

    def residual(self, adapter_name: str) -> Residual:
        raise NotImplementedError

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in_features, out_features)."""
        return False

    def get_base_layer(self) -> Any:
        """The innermost base layer; which attributes it has depends on its kind."""
        return super().get_base_layer()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W', one adapter after the other, in float32 or wider with one rounding to the dtype of W.

        A quantised weight is dequantised, adapted and quantised again. What was there before is kept, so that
        `unmerge` restores it bit for bit.

        Args:
            safe_merge: leave the weight untouched and raise where the merged one is not finite.
            adapter_names: the adapters to merge, in this order; the active ones where None.

        Raises:
            ValueError: the merged weight is not finite (safe_merge), or the quantised weight cannot be written.
        """
        if self.is_tied:
            names = to_merge(self, adapter_names)
            self._check_tied(names)
            if names:
                self._weight_owner.merge(safe_merge, names)
            return
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.form]
        if not adapter_names:
            return
        self.check_mergeable()
        stored = self.get_base_weight()
        merged = self._merged(stored, adapter_names, safe_merge)
        if self._unmerged is None:
            self._unmerged = self._kept(stored) if self.quantization_backend is None else Snapshot(self)
        self.set_base_weight(merged)
        self.merged_adapters.extend(adapter_names)

    def _merged(self, stored: Tensor, adapter_names: list[str], safe_merge: bool) -> Tensor:
        merged = torch.empty_like(stored, memory_format=torch.contiguous_format)
        self.write_merged(stored, merged, adapter_names, is_safe=safe_merge)
        return merged

    def write_merged(self, stored: Tensor, merged: Tensor, adapter_names: list[str], **options: Any) -> list[Any]:
        """merged <- W' of the adapters, one after the other, where W is `stored`; see `blocks.write_adapted`."""
        parts = [Part(name, self.form[name], self.residual(name), self.scaling[name]) for name in adapter_names]
        return write_adapted(self._as_matrix(stored), parts, self._as_matrix(merged), **options)

    @torch.no_grad()
    def check_finite(self, adapter_names: list[str]) -> None:
        """ValueError where `merge` with `safe_merge` would raise it for a weight that is not finite."""
        owner = self._weight_owner
        owner._merged(owner.get_base_weight(), adapter_names, safe_merge=True)

    def _kept(self, stored: Tensor) -> Tensor:
        """Where an offloaded weight has its place while it is merged: not where the layer runs."""
        return stored if offload_hook(self.get_base_layer()) is None else stored.cpu()

    @torch.no_grad()
    def unmerge(self) -> None:
        """W <- the weight before the first merge, bit for bit."""
        if self.is_tied:
            if self.merged:
                self._weight_owner.unmerge()
            return
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_mergeable()
        if isinstance(self._unmerged, Snapshot):
            self._unmerged.restore(self)
        elif self._unmerged is not None:
            # the model may have been moved or cast while it was merged
            self.set_base_weight(self._unmerged.to(self.get_base_weight()))
        self._unmerged = None
        self.merged_adapters.clear()

    def check_mergeable(self) -> None:
        """ValueError where the base weight cannot be written: by its quantisation backend, or because it is computed
        or sharded, or because layers share it that do not share the adapter."""
        if self.is_tied:
            self._check_tied([name for name in self.active_adapters if name in self.form])
        backend = self.quantization_backend
        base_layer = self.get_base_layer()
        if is_fsdp_managed(base_layer):
            raise ValueError(
                f"dlor_peft.layers: cannot write the {self.parameter_name} of this {type(base_layer).__name__}: FSDP "
                "shards it. Save the adapter, load it on a model that is not sharded, and merge there."
            )
        if backend is None and self.parameter_name not in base_layer._parameters:
            raise ValueError(
                f"dlor_peft.layers: cannot merge into the {self.parameter_name} of this {type(base_layer).__name__}: "
                "it is computed from other tensors in every call (a parametrisation, or weight normalisation), and "
                "what is written there is lost. Remove the parametrisation first."
            )
        reason = None if backend is None else refusal(backend, base_layer)
        if backend is not None and reason is not None:
            raise ValueError(
                f"dlor_peft.layers: cannot merge into a weight quantised by {backend.backend_name} "
                f"({type(base_layer).__name__}): {reason}. Load the adapter on the unquantised base model "
                "and merge there."
            )

    def get_base_weight(self) -> Tensor:
        if self.quantization_backend is not None:
            return dequantised(self.quantization_backend, self.get_base_layer())
        return fetch(self.get_base_layer(), self.parameter_name).data

    def set_base_weight(self, weight_data: Tensor) -> None:
        if self.quantization_backend is not None:
            write(self, self.quantization_backend, weight_data)
        else:
            store(self.get_base_layer(), self.parameter_name, weight_data)

    @torch.no_grad()
    def delta_matrix(self, adapter: str) -> Tensor:
        """W' - W of one adapter alone, (..., out_features, in_features), float32 or wider."""
        unmerged = self._weight_owner._unmerged
        if isinstance(unmerged, Snapshot):
            raise ValueError(
                "dlor_peft.layers: the update is relative to the unmerged weight, which is put away in its quantised "
                "form while an adapter is merged. Call unmerge first."
            )
        W = self._as_matrix(self.get_base_weight() if unmerged is None else unmerged)
        return self._delta(adapter, W.to(torch.promote_types(W.dtype, torch.float32)))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W of one adapter alone, as the base weight is stored, in the dtype of the adapter."""
        some = next(iter(self.form[adapter].shapes))
        return self._as_stored(self.delta_matrix(adapter)).to(getattr(self, some)[adapter]().dtype)

    def adapted_weight(self) -> Tensor:
        """W' of the active adapters, as the base weight is stored and in its dtype. Differentiable.

        Where adapters are merged or disabled it is the base weight itself. The sum is formed in the dtype of the
        weight, or in float32 where that is narrower than 16 bits.
        """
        stored = fetch(self.get_base_layer(), self.parameter_name)
        active = [name for name in self.active_adapters if name in self.form]
        if self.merged or self.disable_adapters or not active:
            return stored
        W = self._as_matrix(stored)
        if W.dtype.itemsize < 2:
            W = W.float()
        for name in active:
            W = W + self._delta_after_dropout(name, W)
        return self._as_stored(W).to(stored.dtype)

    def _delta_after_dropout(self, adapter: str, W: Tensor) -> Tensor:
        """Without its input at hand, the update is dropped by features of the input, the same ones for all tokens."""
        delta, dropout = self._delta(adapter, W), self.dlor_dropout[adapter]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return delta * dropout(delta.new_ones(delta.shape[-1]))
        return delta

    def _delta(self, adapter: str, W: Tensor) -> Tensor:
        return self.form[adapter].delta_weight(self.residual(adapter), W) * self.scaling[adapter]

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """The base weight as it is stored -> (..., out_features, in_features)."""
        return stored.mT if self.fan_in_fan_out else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `_as_matrix`."""
        return matrix.mT if self.fan_in_fan_out else matrix

    @property
    def merged_adapters(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the merged adapters in their order; layers that have one weight have one such list."""
        return self._weight_owner._merged_adapters

    @property
    def is_tied(self) -> bool:
        """Whether another layer merges into the weight for this one."""
        return self._weight_owner is not self

    @property
    def _weight_owner(self) -> WeightLayer:
        """The layer that merges into the weight: of tied layers that share it, the one that they are tied to."""
        for source in self.tied_to.values():
            if source.get_base_layer().weight is self.get_base_layer().weight:
                return source
        return self

    def _check_tied(self, adapter_names: list[str]) -> None:
        untied = [name for name in adapter_names if name not in self.tied_to]
        if untied:
            raise ValueError(
                f"dlor_peft.layers: {', '.join(untied)} adapts one of the layers that share a weight, and merging "
                "would change the others. Train it with ensure_weight_tying=True, or untie the layers first."
            )


def to_merge(layer: BaseTunerLayer, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a layer of any method would merge now: of those that are named, or active, those it has."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    there = layer._get_available_adapters()
    return [name for name in names if name in there and name not in layer.merged_adapters]
