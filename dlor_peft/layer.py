"""DLoR on the layers of a model: parameters, forward, merge and unmerge."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import DLoRConfig
from .form import Form, Map, Residual


class StackedWeight(nn.Module):
    """One stacked tensor as `.weight`, the leaf module that sharding and hot-swapping look for. Calls return it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.weight


class DLoRLayer(BaseTunerLayer):
    """The adapters of one layer: their tensors, form, scale and dropout, by adapter name."""

    adapter_layer_names = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
    other_param_names = ("r", "form", "scaling", "dlor_dropout")

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None
        assert out_features is not None
        self.in_features, self.out_features = in_features, out_features
        self.dlor_diag = nn.ModuleDict()
        self.dlor_diag_in = nn.ModuleDict()
        self.dlor_U = nn.ModuleDict()
        self.dlor_V = nn.ModuleDict()
        self.dlor_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.form: dict[str, Form] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters = []
        self._unmerged_weight: Tensor | None = None
        self.cast_input_dtype_enabled = True

    def update_layer(self, adapter_name: str, r: int, depth: int, config: DLoRConfig) -> None:
        """Add an adapter of the form that `config` means for this layer, as the exact identity.

        Args:
            adapter_name: the name it is stored under; an adapter of that name is replaced.
            r: rank on this layer.
            depth: number of stacked factors on this layer.
            config: everything else.
        """
        form = Form.resolve(config, r, depth, self.in_features, self.out_features)
        self.r[adapter_name], self.form[adapter_name], self.scaling[adapter_name] = r, form, 1.0
        self.dlor_dropout[adapter_name] = nn.Dropout(config.dlor_dropout) if config.dlor_dropout else nn.Identity()
        for name in self.adapter_layer_names:
            tensors = getattr(self, name)
            if adapter_name in tensors:
                del tensors[adapter_name]
            if name in form.shapes:
                tensors[adapter_name] = StackedWeight(form.shapes[name])
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
                bound = 0.1 if name.startswith("dlor_diag") else weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound)

    def residual(self, adapter_name: str) -> Residual:
        """The adapter's tensors as one diagonal plus low rank. Differentiable."""
        tensors = {name: getattr(self, name) for name in self.adapter_layer_names}
        return self.form[adapter_name].residual(
            {name: factors[adapter_name]() for name, factors in tensors.items() if adapter_name in factors}
        )

    @torch.no_grad()
    def set_residual(self, adapter_name: str, residual: Residual) -> None:
        """Overwrite the tensors of an adapter of depth 1. A scalar fills a vector diagonal; columns of U and V beyond
        those given keep U = 0, so that they add nothing and can still be trained."""
        values = {"dlor_diag": residual.q, "dlor_diag_in": residual.q_in, "dlor_U": residual.U, "dlor_V": residual.V}
        for name in self.form[adapter_name].shapes:
            value, weight = values[name], getattr(self, name)[adapter_name].weight
            new = weight.detach().clone() if name == "dlor_V" else torch.zeros_like(weight)
            if value is not None:
                new = new.to(value.dtype)
                filled = new[0] if value.ndim == 1 else new[0, :, : value.shape[1]]
                filled.copy_(value)
            weight.data = new

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

        The unmerged weight is kept, so that `unmerge` restores it bit for bit.

        Args:
            safe_merge: leave the weight untouched and raise where the merged one is not finite.
            adapter_names: the adapters to merge, in this order; the active ones where None.

        Raises:
            ValueError: the merged weight is not finite (safe_merge), or the base weight is quantised.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.form]
        if not adapter_names:
            return
        if self.quantization_backend is not None:
            raise ValueError(
                f"dlor_peft.layer: cannot merge into a weight quantised by {self.quantization_backend.backend_name}: "
                "rounding would change the model. Load the adapter on the unquantised base model and merge there."
            )
        stored = self.get_base_weight()
        W = self._as_matrix(stored)
        for name in adapter_names:
            W = W + self.form[name].delta_weight(self.residual(name), W, self.scaling[name])
            if safe_merge and not W.to(stored.dtype).isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self._unmerged_weight is None:
            self._unmerged_weight = stored
        self.set_base_weight(self._as_stored(W).to(stored.dtype).contiguous())
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """W <- the weight before the first merge, bit for bit."""
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        # the model may have been moved or cast while it was merged
        self.set_base_weight(self._unmerged_weight.to(self.get_base_weight()))
        self._unmerged_weight = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def delta_matrix(self, adapter: str) -> Tensor:
        """W' - W of one adapter alone, (out_features, in_features), float32 or wider."""
        W = self._as_matrix(self.get_base_weight() if self._unmerged_weight is None else self._unmerged_weight)
        return self.form[adapter].delta_weight(self.residual(adapter), W, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W of one adapter alone, in the orientation in which the base weight is stored; float32 or wider."""
        return self._as_stored(self.delta_matrix(adapter))

    def _as_matrix(self, stored: Tensor) -> Tensor:
        """The base weight as it is stored -> (out_features, in_features), float32 or wider."""
        raise NotImplementedError

    def _as_stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `_as_matrix`, but for the dtype."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, DLoRLayer):
    """DLoR on torch.nn.Linear, or on transformers' Conv1D, whose weight is stored as (in_features, out_features)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        depth: int,
        config: DLoRConfig,
        fan_in_fan_out: bool,
        **quantization_kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        DLoRLayer.__init__(self, base_layer)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, depth, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W'^T + b of the active adapters in their order, each applied to the weight that those before it made.

        Args:
            x: (..., in_features).
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
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted_forward(x, self.active_adapters, args, kwargs)

    def _adapted_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        names = [name for name in adapter_names if name in self.form]
        # adding the bias last keeps it out of what the adapters multiply
        bias = self._bias(x) if any(self.form[name].acts_on_output for name in names) else None
        base: Map = partial(self._base, bias=bias, args=args, kwargs=kwargs)
        for name in names:
            form, scale, dropout = self.form[name], self.scaling[name], self.dlor_dropout[name]
            base = partial(form.forward, self.residual(name), base=base, scale=scale, dropout=dropout)
        y = base(x)
        return y if bias is None else y + bias.to(y.dtype)

    def _base(self, x: Tensor, bias: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """x W^T where a bias is given, else what the base layer returns."""
        layer = self.base_layer
        if bias is None:
            return layer(x, *args, **kwargs)
        if _is_plain(layer) and not args and not kwargs:
            # subtracting the bias again would cost the digits that it covers in half precision
            return x @ self.weight if self.fan_in_fan_out else nn.functional.linear(x, self.weight)
        y = layer(x, *args, **kwargs)
        return y - bias.to(y.dtype)

    def _bias(self, x: Tensor) -> Tensor | None:
        bias = self.bias
        if bias is None or not bias.is_meta or x.is_meta:
            return bias
        # offloaded: the bias exists only while the base layer runs
        return self.base_layer(x.new_zeros(1, self.in_features))[0]

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

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name, []).append(row)
        parts = [self._adapted_forward(x[indices], [name], args, kwargs) for name, indices in rows.items()]
        order = torch.tensor([row for indices in rows.values() for row in indices], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return transpose(stored, self.fan_in_fan_out).to(torch.promote_types(stored.dtype, torch.float32))

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return transpose(matrix, self.fan_in_fan_out)

    def __repr__(self) -> str:
        return "dlor." + super().__repr__()


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` is its weight and bias and nothing else: no hook, no other class, no sharded weight."""
    return (
        type(layer) in (nn.Linear, Conv1D)
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )
