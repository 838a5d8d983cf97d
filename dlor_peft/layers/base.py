"""What DLoR does on a layer of any kind: parameters, the order of several adapters, merge and unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import DLoRConfig
from ..form import Form, Residual
from .parts import StackedWeight
from .quantised import Snapshot, dequantised, refusal, write


class DLoRLayer(nn.Module, BaseTunerLayer):
    """The adapters of one layer: their tensors, form, scale and dropout, by adapter name.

    A kind of layer says which form a config means on it, how its weight is read as a matrix (`fan_in_fan_out`,
    `_as_matrix`, `_as_stored`), and how the adapters act when it is called (`_adapted_forward`).
    """

    adapter_layer_names = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
    other_param_names = ("r", "form", "scaling", "tied_to", "shares_weight", "dlor_dropout")

    base_layer: nn.Module
    # the adapted parameter of the base layer
    parameter_name = "weight"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        depth: int,
        config: DLoRConfig,
        tied_to: DLoRLayer | None = None,
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._refuse_tensor_parallel()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = self._features()
        self.dlor_diag = nn.ModuleDict()
        self.dlor_diag_in = nn.ModuleDict()
        self.dlor_U = nn.ModuleDict()
        self.dlor_V = nn.ModuleDict()
        self.dlor_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.form: dict[str, Form] = {}
        self.scaling: dict[str, float] = {}
        self.tied_to: dict[str, DLoRLayer] = {}
        self.shares_weight: dict[str, bool] = {}
        self._merged_adapters: list[str] = []
        self._unmerged: Tensor | Snapshot | None = None
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, depth, config, tied_to)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in_features, out_features)."""
        return False

    def _refuse_tensor_parallel(self) -> None:
        base_layer = self.get_base_layer()
        weight = getattr(base_layer, self.parameter_name, None)
        mesh = set(weight.device_mesh.mesh_dim_names or ()) if isinstance(weight, DTensor) else set()
        # FSDP2 shards what is stored and computes with the whole; any other mesh computes with a part
        if getattr(base_layer, "_hf_tp_plan", None) or not mesh <= {"fsdp"}:
            raise ValueError(
                f"dlor_peft.layers: the {self.parameter_name} of this {type(base_layer).__name__} is split over "
                "devices that each compute a part of the layer (tensor parallelism), where a diagonal and factors of "
                "the whole do not fit. Load the model without tp_plan, adapt it, and shard it by FSDP2 or ZeRO."
            )

    def get_base_layer(self) -> Any:
        """The innermost base layer; which attributes it has depends on its kind."""
        return super().get_base_layer()

    def _features(self) -> tuple[int, int]:
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None
        assert out_features is not None
        return in_features, out_features

    def resolve_form(self, config: DLoRConfig, r: int, depth: int) -> Form:
        """The form that `config` means on this layer; ValueError where the layer cannot have it."""
        return Form.resolve(config, r, depth, self.in_features, self.out_features)

    def update_layer(
        self, adapter_name: str, r: int, depth: int, config: DLoRConfig, tied_to: DLoRLayer | None = None
    ) -> None:
        """Add an adapter of the form that `config` means for this layer, as the exact identity.

        Args:
            adapter_name: the name it is stored under; an adapter of that name is replaced.
            r: rank on this layer.
            depth: number of stacked factors on this layer.
            config: everything else.
            tied_to: a layer whose weight is this layer's, to share the tensors of its adapter of that name.
        """
        if tied_to is None:
            form = self.resolve_form(config, r, depth)
            factors = {name: StackedWeight(shape) for name, shape in form.shapes.items()}
        else:
            form = tied_to.form[adapter_name]
            if self.fan_in_fan_out != tied_to.fan_in_fan_out:
                form = form.transpose()
            factors = {name: getattr(tied_to, name)[adapter_name] for name in form.shapes}
            self.tied_to[adapter_name] = tied_to
            self.shares_weight[adapter_name] = self._weight_owner is not self
        self.r[adapter_name], self.form[adapter_name], self.scaling[adapter_name] = r, form, 1.0
        self.dlor_dropout[adapter_name] = nn.Dropout(config.dlor_dropout) if config.dlor_dropout else nn.Identity()
        for name in self.adapter_layer_names:
            tensors = getattr(self, name)
            if adapter_name in tensors:
                del tensors[adapter_name]
            if name in factors:
                tensors[adapter_name] = factors[name]
        if tied_to is None:
            self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """delta = 0, U = 0 and V uniform in +-1/sqrt(rows), as LoRA starts; or, for tests, all of them random."""
        for name in self.adapter_layer_names:
            if adapter_name not in getattr(self, name):
                continue
            weight = getattr(self, name)[adapter_name].weight
            if init_weights and name != "dlor_V":
                weight.zero_()
            else:
                bound = 0.1 if name.startswith("dlor_diag") else weight.shape[-2] ** -0.5
                weight.uniform_(-bound, bound)

    def residual(self, adapter_name: str) -> Residual:
        """The adapter's tensors as one diagonal plus low rank. Differentiable."""
        tensors = {name: getattr(self, name) for name in self.adapter_layer_names}
        return self.form[adapter_name].residual(
            {name: factors[adapter_name]() for name, factors in tensors.items() if adapter_name in factors}
        )

    @torch.no_grad()
    def set_residual(self, adapter_name: str, residual: Residual) -> None:
        """Overwrite the tensors of a fresh adapter of depth 1. A scalar fills a vector diagonal; columns of U and V
        beyond those given stay as they started, so that they add nothing and can still be trained."""
        if adapter_name in self.tied_to:
            # the tensors are those of another layer, and are written there
            return
        values = {"dlor_diag": residual.q, "dlor_diag_in": residual.q_in, "dlor_U": residual.U, "dlor_V": residual.V}
        for name in self.form[adapter_name].shapes:
            value, weight = values[name], getattr(self, name)[adapter_name].weight
            new = torch.zeros_like(weight) if name.startswith("dlor_diag") else weight.detach().clone()
            if value is not None:
                new = new.to(value.dtype)
                filled = new[0] if name.startswith("dlor_diag") else new[0, ..., : value.shape[-1]]
                filled.copy_(value)
            weight.data = new

    @torch.no_grad()
    def pad_rank(self, r: int, adapter_names: Collection[str] | None = None) -> None:
        """Give adapters, all where None, the rank r by columns of zeros in U and V, which add nothing; r = 0 stays."""
        for adapter_name, form in self.form.items():
            if form.r == 0 or adapter_name in self.tied_to or adapter_name not in (adapter_names or self.form):
                continue
            for name in ("dlor_U", "dlor_V"):
                factor = getattr(self, name)[adapter_name]
                factor.weight.data = F.pad(factor.weight.data, (0, r - form.r))
            self.r[adapter_name], self.form[adapter_name] = r, replace(form, r=r)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale s of one adapter: W' = W + s (W'(1) - W). 1 is the trained adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter, or set it back to 1."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

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
        owner = self._weight_owner
        if owner is not self:
            names = self.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in self.form and name not in self.merged_adapters]
            self._check_tied(names)
            if names:
                owner.merge(safe_merge, names)
            return
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.form]
        if not adapter_names:
            return
        self.check_mergeable()
        stored = self.get_base_weight()
        W = self._as_matrix(stored).to(torch.promote_types(stored.dtype, torch.float32))
        for name in adapter_names:
            W = W + self._delta(name, W)
            if safe_merge and not W.to(stored.dtype).isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self._unmerged is None:
            self._unmerged = stored if self.quantization_backend is None else Snapshot(self)
        self.set_base_weight(self._as_stored(W).to(stored.dtype).contiguous())
        self.merged_adapters.extend(adapter_names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W <- the weight before the first merge, bit for bit."""
        if self._weight_owner is not self:
            if self.merged:
                self._weight_owner.unmerge()
            return
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if isinstance(self._unmerged, Snapshot):
            self._unmerged.restore(self)
        elif self._unmerged is not None:
            # the model may have been moved or cast while it was merged
            self.set_base_weight(self._unmerged.to(self.get_base_weight()))
        self._unmerged = None
        self.merged_adapters.clear()

    def check_mergeable(self) -> None:
        """ValueError where the base weight cannot be written: by its quantisation backend, or because it is computed,
        or because layers share it that do not share the adapter."""
        if self._weight_owner is not self:
            self._check_tied([name for name in self.active_adapters if name in self.form])
        backend = self.quantization_backend
        base_layer = self.get_base_layer()
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
        return getattr(self.get_base_layer(), self.parameter_name).data

    def set_base_weight(self, weight_data: Tensor) -> None:
        if self.quantization_backend is not None:
            write(self, self.quantization_backend, weight_data)
        else:
            getattr(self.get_base_layer(), self.parameter_name).data = weight_data

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
        stored = getattr(self.get_base_layer(), self.parameter_name)
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
        return self.form[adapter].delta_weight(self.residual(adapter), W, self.scaling[adapter])

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """The base weight as it is stored -> (..., out_features, in_features)."""
        return stored.mT if self.fan_in_fan_out else stored

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `_as_matrix`."""
        return matrix.mT if self.fan_in_fan_out else matrix

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if self.shares_weight.get(adapter_name) and self._weight_owner is self:
            # PEFT saves embeddings too and, with low_cpu_mem_usage, assigns what it loads: to each tied layer its own
            self.get_base_layer().weight = self.tied_to[adapter_name].get_base_layer().weight

    @property
    def merged_adapters(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the merged adapters in their order; layers that have one weight have one such list."""
        return self._weight_owner._merged_adapters

    @property
    def _weight_owner(self) -> DLoRLayer:
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

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a parameter called weight
        if self.parameter_name == "weight":
            return super()._get_base_layer_device_and_dtype(base_layer)
        weight = getattr(self.get_base_layer(), self.parameter_name)
        return weight.device, weight.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x W'^T + b of the active adapters in their order, each applied to the weight that those before it made.

        Args:
            x: what the base layer takes first.
            *args: passed to the base layer.
            **kwargs: passed to the base layer, but for `adapter_names`: one name for each row of x, "__base__" for
                none, where one batch mixes adapters.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names:
            return self._mixed_batch_forward(x, adapter_names, args, kwargs)
        active = [name for name in self.active_adapters if name in self.form]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted_forward(x, active, args, kwargs)

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str] | None) -> None:
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT converts the weights of linear layers, and takes W' - W for one whatever the layer is
        return False

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}"
        quantisation = quantization_extra_repr(self)
        return f"{features}, {quantisation}" if quantisation else features

    def __repr__(self) -> str:
        return "dlor." + super().__repr__()
