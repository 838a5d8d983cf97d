"""DLoRModel: finds the layers that a config names and puts DLoR layers in their place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_config,
    get_quantization_kwargs,
)
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .combine import add_weighted_adapter
from .config import DLoRConfig
from .layer import DLoRLayer, Linear

_PREFIX = "dlor_"


class DLoRModel(BaseTuner):
    """A model whose targeted layers carry DLoR adapters; see [`DLoRConfig`] for their form.

    Made by `get_peft_model(model, DLoRConfig(...))`, not by hand. The layer types it adapts are torch.nn.Linear and
    transformers' Conv1D.
    """

    prefix = _PREFIX
    tuner_layer_cls = DLoRLayer  # pyright: ignore[reportAssignmentType]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
    add_weighted_adapter = add_weighted_adapter

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if adapter_name in _PREFIX:
            raise ValueError(
                f"dlor_peft.model: the adapter name {adapter_name!r} is part of the parameter prefix {_PREFIX!r}, "
                "which makes PEFT lose the adapter's weights when it is loaded. Choose another, such as 'default'."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT does this for rank_pattern
        config = cast(DLoRConfig, self.peft_config[adapter_name])
        adapted = [
            name
            for name, module in model.named_modules()
            if isinstance(module, DLoRLayer) and adapter_name in module.form
        ]
        unmatched = [
            key for key in config.depth_pattern if not any(get_pattern_key([key], name) == key for name in adapted)
        ]
        if unmatched:
            warnings.warn(
                f"The following depth_pattern keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT's guard against layers that Mamba's kernels read without calling them knows LoRA's relatives by name
        try:
            super()._check_target_module_compatiblity(PeftConfig(peft_type="LORA"), model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("PEFT:LORA", "PEFT:DLOR")) from None

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        config: DLoRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.r)
        depth = config.depth_pattern.get(get_pattern_key(list(config.depth_pattern), current_key), config.depth)
        if isinstance(target, DLoRLayer):
            target.update_layer(adapter_name, r, depth, config)
            return
        new_module = self._create_new_module(
            config, adapter_name, target, current_key, r, depth, **get_quantization_kwargs(self.model)
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        config: DLoRConfig,
        adapter_name: str,
        target: nn.Module,
        current_key: str,
        r: int,
        depth: int,
        **quantization_kwargs: Any,
    ) -> nn.Module:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base_layer, Conv1D):
            fan_in_fan_out = True
        elif isinstance(base_layer, nn.Linear):
            fan_in_fan_out = False
            if config.fan_in_fan_out:
                warnings.warn(
                    f"fan_in_fan_out=True does not hold for {current_key!r}, a torch.nn.Linear: its weight is taken "
                    "as (out_features, in_features).",
                    stacklevel=2,
                )
        else:
            raise ValueError(
                f"dlor_peft.model: target module {current_key!r} is a {type(base_layer).__name__}, which DLoR does "
                "not adapt. It adapts torch.nn.Linear and transformers' Conv1D: name only such layers in "
                "target_modules, keep this one out with exclude_modules, or train it in full through modules_to_save."
            )
        return Linear(target, adapter_name, r, depth, config, fan_in_fan_out, **quantization_kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # the base class hands the weight of the old module to a new one that wraps nothing: when an adapted module is
        # unloaded the new one has its own already
        if isinstance(new_module, DLoRLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if get_quantization_config(self.model, method="gptq") is not None:
            raise ValueError(
                "dlor_peft.model: cannot merge into a GPTQ-quantised model. Load the adapter on the unquantised base "
                "model and merge there."
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one for each row of the batch, to every adapted layer for the duration of a call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        num_beams = kwargs.get("num_beams") or 1
        # beam search repeats each row; the encoder of an encoder-decoder runs before that
        repeated = [name for name in adapter_names for _ in range(num_beams)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, DLoRLayer | AuxiliaryTrainingWrapper):
                    names = adapter_names if module in in_encoder else repeated
                    hook = _AdapterNames(names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))  # pyright: ignore
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, DLoRLayer) for name in layer.form}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are: "
                f"{', '.join(sorted(known))}."
            )


class _AdapterNames:
    """Forward pre-hook that adds `adapter_names` to a layer's keyword arguments."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": self.names}
