"""What DLoR does on a layer of any kind: parameters, the order of several adapters, merge and unmerge."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..config import DLoRConfig
from ..form import Form, Residual
from .collapsed import CollapsedStacks
from .parts import StackedWeight
from .placement import execution_device, is_tensor_parallel
from .quantised import Snapshot
from .start import start_from_weight
from .weight import WeightLayer


class DLoRLayer(WeightLayer):
    """The adapters of one layer: their tensors, form, scale and dropout, by adapter name.

    A kind of layer says which form a config means on it, how its weight is read as a matrix (`fan_in_fan_out`,
    `_as_matrix`, `_as_stored`), and how the adapters act when it is called (`_adapted_forward`).
    """

    adapter_layer_names = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
    other_param_names = ("r", "form", "scaling", "tied_to", "shares_weight", "dlor_dropout")

    base_layer: nn.Module

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
        self._collapsed = CollapsedStacks()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, depth, config, tied_to)

    def _refuse_tensor_parallel(self) -> None:
        base_layer = self.get_base_layer()
        if is_tensor_parallel(base_layer, self.parameter_name):
            raise ValueError(
                f"dlor_peft.layers: the {self.parameter_name} of this {type(base_layer).__name__} is split over "
                "devices that each compute a part of the layer (tensor parallelism), where a diagonal and factors of "
                "the whole do not fit. Load the model without tp_plan, adapt it, and shard it by FSDP2 or ZeRO."
            )

    def _features(self) -> tuple[int, int]:
        base_layer = self.get_base_layer()
        if isinstance(base_layer, nn.Linear):
            # PEFT takes those of a shard
            return base_layer.in_features, base_layer.out_features
        in_features, out_features = _get_in_out_features(base_layer)
        assert in_features is not None
        assert out_features is not None
        return in_features, out_features

    def named_in_config(self, name: str) -> str:
        """What the patterns of a config are matched with, where `name` is that of this module in the model."""
        return name.replace(".base_layer", "")

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
            self.shares_weight[adapter_name] = self.is_tied
        self.r[adapter_name], self.form[adapter_name], self.scaling[adapter_name] = form.r, form, 1.0
        self.dlor_dropout[adapter_name] = nn.Dropout(config.dlor_dropout) if config.dlor_dropout else nn.Identity()
        for name in self.adapter_layer_names:
            tensors = getattr(self, name)
            if adapter_name in tensors:
                del tensors[adapter_name]
            if name in factors:
                tensors[adapter_name] = factors[name]
        if tied_to is None:
            self.reset_parameters(adapter_name, bool(config.init_weights))
            if config.init_weights == "svd" and not config.inference_mode:
                start_from_weight(self, adapter_name)
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

    def factor_names(self, adapter_name: str) -> tuple[str, str]:
        """The factor of the low-rank term that starts at 0, and the other, which says where the first step goes."""
        return "dlor_U", "dlor_V"

    def residual(self, adapter_name: str) -> Residual:
        """The adapter's tensors as one diagonal plus low rank. Differentiable."""
        return self.form[adapter_name].residual(self._tensors(adapter_name))

    def _residual_to_apply(self, adapter_name: str) -> Residual:
        """What `update` takes: a stack as it is where it is trained, and else collapsed, once for many calls."""
        form, tensors = self.form[adapter_name], self._tensors(adapter_name)
        if form.depth == 1 or self.training or torch.compiler.is_compiling():
            return form.residual(tensors, collapsed=False)
        return self._collapsed.get(adapter_name, tensors, form)

    def _tensors(self, adapter_name: str) -> dict[str, Tensor]:
        return {name: getattr(self, name)[adapter_name]() for name in self.form[adapter_name].shapes}

    def clear_collapsed(self) -> None:
        """Collapse the stacks anew in the next call. Needed after parameters were written to through `.data`."""
        self._collapsed.clear()

    def train(self, mode: bool = True) -> Self:
        self.clear_collapsed()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # what moves leaves nothing behind
        self.clear_collapsed()
        return super()._apply(fn, recurse)

    def delete_adapter(self, adapter_name: str) -> None:
        self.clear_collapsed()
        super().delete_adapter(adapter_name)

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
        """Give adapters, all where None, at least the rank r by columns of zeros in U and V, which add nothing."""
        for adapter_name, form in self.form.items():
            if form.r >= r or adapter_name not in (adapter_names or self.form):
                continue
            self.r[adapter_name], self.form[adapter_name] = r, replace(form, r=r)
            source = self.tied_to.get(adapter_name)
            if source is not None:
                source.pad_rank(r, [adapter_name])
            some = getattr(self, next(iter(form.shapes)))[adapter_name].weight
            for name in ("dlor_U", "dlor_V"):
                factors = getattr(self, name)
                if source is not None:
                    factors[adapter_name] = getattr(source, name)[adapter_name]
                elif adapter_name in factors:
                    factors[adapter_name].weight.data = F.pad(factors[adapter_name].weight.data, (0, r - form.r))
                else:
                    factor = StackedWeight(self.form[adapter_name].shapes[name]).to(some)
                    nn.init.zeros_(factor.weight)
                    factors[adapter_name] = factor.requires_grad_(some.requires_grad)

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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if self.shares_weight.get(adapter_name) and not self.is_tied:
            # PEFT saves embeddings too and, with low_cpu_mem_usage, assigns what it loads: to each tied layer its own
            self.get_base_layer().weight = self.tied_to[adapter_name].get_base_layer().weight

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a parameter called weight, and would lose the adapter of one that is offloaded with it
        if self.parameter_name == "weight":
            device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        else:
            weight = getattr(self.get_base_layer(), self.parameter_name)
            device, dtype = weight.device, weight.dtype
        return execution_device(self.get_base_layer()) or device, dtype

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

    def explain_kernels(self) -> str:
        """How a call runs, and why."""
        kind = type(self).__name__
        if self.merged or self.disable_adapters:
            return f"{kind}: the base layer alone, {'merged' if self.merged else 'adapters are disabled'}"
        return f"{kind}: {self._explain_adapted()}"

    def _explain_adapted(self) -> str:
        return "W' is formed in each call"

    def __repr__(self) -> str:
        return "dlor." + super().__repr__()


def owned_adapters(model: nn.Module) -> Iterator[tuple[str, DLoRLayer, str]]:
    """(name of the layer, layer, adapter) of every DLoR adapter whose tensors are the layer's own: tied ones once."""
    for name, layer in model.named_modules():
        if isinstance(layer, DLoRLayer):
            for adapter_name in layer.form:
                if adapter_name not in layer.tied_to:
                    yield name, layer, adapter_name
