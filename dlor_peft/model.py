"""DLoRModel: finds the layers that a config names and puts DLoR layers in their place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft import PeftConfig
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_quantization_kwargs,
)
from peft.utils.other import get_pattern_key
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from .combine import add_weighted_adapter
from .config import PATTERNS, DLoRConfig
from .layers import DLoRLayer, ParamWrapper, layer_class
from .layers.attention import MultiheadAttention, UncalledLinear
from .layers.placement import is_fsdp_managed, offload_hook, stay
from .layers.start import loading
from .merging import MergingTuner
from .offload import fetch_saved, refuse_offloaded
from .targets import is_left_out, translate_fused
from .tying import TyingTuner, restore_kind, tied_source

_PREFIX = "dlor_"
# how FSDP 1 names what it wraps
_WRAPPER = "_fsdp_wrapped_module."


class DLoRModel(TyingTuner, MergingTuner):
    """A model whose targeted layers carry DLoR adapters; see [`DLoRConfig`] for their form.

    Made by `get_peft_model(model, DLoRConfig(...))`, not by hand.
    """

    prefix = _PREFIX
    tuner_layer_cls = DLoRLayer  # pyright: ignore[reportAssignmentType]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()
    add_weighted_adapter = add_weighted_adapter

    # key -> shape of the tensors that the adapter being injected will be loaded from, where they are known
    _stored_shapes: Mapping[str, tuple[int, ...]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _check_name(adapter_name)
        config = cast(DLoRConfig, self.peft_config[adapter_name])
        translate_fused(config, model)
        # of the defaults for an architecture, none need match
        asked = {name: getattr(config, name) or () for name in ("target_modules", "target_parameters")}
        self._stored_shapes = {
            key.removeprefix("_orig_mod."): tuple(tensor.shape) for key, tensor in (state_dict or {}).items()
        }
        before = {layer for layer in model.modules() if isinstance(layer, DLoRLayer)}
        try:
            with warnings.catch_warnings(), loading() if state_dict is not None else nullcontext():
                # PEFT compares them with the names of modules only, not with those of parameters
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            _take_back(model, adapter_name, before)
            raise
        finally:
            self._stored_shapes = {}
        if not config.inference_mode and any(
            isinstance(module, DLoRLayer) and adapter_name in module.form and is_fsdp_managed(module.get_base_layer())
            for module in model.modules()
        ):
            warnings.warn(
                f"dlor_peft.model: the adapter {adapter_name!r} is added to layers that FSDP shards already. FSDP "
                "does not average its gradients over the processes: to train it, add it before the model is sharded.",
                stacklevel=2,
            )
        for key in config.modules_to_tie or ():
            restore_kind(cast(ModulesToSaveWrapper, model.get_submodule(key)), adapter_name)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                # in a copy that is offloaded, what is loaded or trained is lost
                stay(module.modules_to_save[adapter_name])
        adapted = [
            name
            for name, module in model.named_modules()
            if isinstance(module, DLoRLayer) and adapter_name in module.form
        ]
        adapted += self.targeted_parameter_names
        # the tensors say what is adapted, where they are given
        if state_dict is None and not config.inference_mode:
            _warn_of_unmatched(asked, adapted)
        for field in PATTERNS.values():
            unmatched = [
                key
                for key in getattr(config, field)
                if not any(get_pattern_key([key], name) == key for name in adapted)
            ]
            if unmatched:
                warnings.warn(
                    f"The following {field} keys did not match any targeted module and were ignored: {unmatched}.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT's guard against layers that Mamba's kernels read without calling them knows LoRA's relatives by name
        try:
            super()._check_target_module_compatiblity(PeftConfig(peft_type="LORA"), model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("PEFT:LORA", "PEFT:DLOR")) from None

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        refuse_offloaded(self, cast(DLoRConfig, config))
        parameters = set(cast(DLoRConfig, config).target_parameters or ())
        for name, other in self.peft_config.items():
            others = set(cast(DLoRConfig, other).target_parameters or ())
            if other is not config and parameters and others and parameters != others:
                # the parameters of one module nest, and the nesting shows in the names of the saved tensors
                raise ValueError(
                    "dlor_peft.model: with target_parameters, all adapters must target the same set of parameters, "
                    f"but the new one has {sorted(parameters)} and {name!r} has {sorted(others)}."
                )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        config = cast(DLoRConfig, peft_config)
        if config.target_modules is None and config.target_parameters:
            # the defaults of an unknown architecture are not asked for
            known = self.target_module_mapping.get(model_config["model_type"])
            if known is None:
                config.target_modules = []
        return super()._prepare_adapter_config(config, model_config)

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
        # PEFT's MixedModel borrows this method
        _check_name(adapter_name)
        if parameter_name is not None and is_left_out(config, current_key.rpartition(".")[0]):
            return
        stored_shapes = getattr(self, "_stored_shapes", {})
        tied_to = tied_source(self, config, adapter_name, current_key)
        config = _for_layer(config, current_key, stored_shapes)
        if isinstance(parent, MultiheadAttention):
            # its out-projection, which it adapts itself
            parent = parent.get_base_layer()
            target = cast(nn.Module, parent.out_proj)
        # a further parameter of one module nests in the wrapper of the first
        nests = isinstance(target, ParamWrapper) and target.parameter_name != parameter_name
        if isinstance(target, DLoRLayer) and not nests:
            target.update_layer(adapter_name, config.r, config.depth, config, tied_to)
            return
        new_module = DLoRModel._create_new_module(
            config,
            adapter_name,
            target,
            current_key,
            parameter_name=parameter_name,
            tied_to=tied_to,
            **get_quantization_kwargs(self.model),
        )
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # its fast path reads weights and calls no layer, unless one of them has a hook
            new_module.register_forward_pre_hook(_do_nothing)
        if offload_hook(cast(DLoRLayer, new_module).get_base_layer()) is None:
            self._replace_module(parent, target_name, new_module, target)
        else:
            # PEFT would move the adapter to where the weight is, the meta device
            setattr(parent, target_name, new_module)

    @staticmethod
    def _create_new_module(
        config: DLoRConfig,
        adapter_name: str,
        target: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        tied_to: DLoRLayer | None = None,
        **quantization_kwargs: Any,
    ) -> nn.Module:
        kwargs = quantization_kwargs
        try:
            if parameter_name is not None:
                cls = ParamWrapper
                kwargs = {**kwargs, "parameter_name": parameter_name}
            else:
                cls = layer_class(target, **quantization_kwargs)
            new_module = cls(target, adapter_name, config.r, config.depth, config, tied_to=tied_to, **kwargs)
        except ValueError as error:
            raise ValueError(f"{error} The target is {current_key!r}.") from None
        if config.fan_in_fan_out and not new_module.fan_in_fan_out:
            kind = type(new_module.get_base_layer()).__name__
            warnings.warn(
                f"fan_in_fan_out=True does not hold for {current_key!r}, a {kind}: its weight is taken as "
                "(out_features, in_features).",
                stacklevel=2,
            )
        return new_module

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        fetch_saved(model, config, state_dict, cls.prefix)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, DLoRLayer)}
        # PEFT goes on to save embeddings from this dict: they are saved as they are without the merged adapters
        for name, layer in layers.items():
            if layer.merged:
                key = f"{name}.base_layer.{layer.parameter_name}"
                unmerged = layer._weight_owner._unmerged
                if isinstance(unmerged, Tensor) and key in state_dict:
                    state_dict[key] = unmerged
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT finds none in modules that FSDP wraps inside of others, whose tensors are named without the wrapper
        wrapped = [name.replace(_WRAPPER, "") for name in layers if _WRAPPER in name]
        factors = {f"{name}.{part}.{adapter_name}" for name in wrapped for part in DLoRLayer.adapter_layer_names}
        selected |= {key: value for key, value in state_dict.items() if key.rpartition(".")[0] in factors}
        _warn_of_shards(selected, adapter_name)
        return selected

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # the base class hands the weight of the old module to a new one that wraps nothing: when an adapted module is
        # unloaded the new one has its own already
        if isinstance(new_module, DLoRLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one for each row of the batch, to every adapted layer for the duration of a call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        for layer in self.modules():
            # the second is read, not called, so that no hook reaches it
            if isinstance(layer, MultiheadAttention | UncalledLinear):
                layer._check_adapter_names(adapter_names, adapter_names)  # pyright: ignore[reportArgumentType]
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


def _check_name(adapter_name: str) -> None:
    if adapter_name == "__base__":
        raise ValueError(
            "dlor_peft.model: the adapter name '__base__' stands for no adapter where a batch mixes adapters "
            "(adapter_names). Choose another, such as 'default'."
        )
    if adapter_name in _PREFIX:
        raise ValueError(
            f"dlor_peft.model: the adapter name {adapter_name!r} is part of the parameter prefix {_PREFIX!r}, which "
            "makes PEFT lose the adapter's weights when it is loaded. Choose another, such as 'default'."
        )


def _take_back(model: nn.Module, adapter_name: str, before: set[DLoRLayer]) -> None:
    """Undo what an adapter that is refused has done to the layers that it came to first."""
    for name, layer in reversed(list(model.named_modules())):
        if not isinstance(layer, DLoRLayer):
            continue
        if layer not in before:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
        elif adapter_name in layer.form:
            layer.delete_adapter(adapter_name)


def _warn_of_unmatched(asked: Mapping[str, Any], adapted: list[str]) -> None:
    for field, names in asked.items():
        # a regex matches something, or PEFT raises
        unmatched = [] if isinstance(names, str) else [n for n in names if not any(_ends(key, n) for key in adapted)]
        if unmatched:
            warnings.warn(
                f"dlor_peft.model: of {field}, {sorted(unmatched)} matched nothing in the model and is not adapted. "
                "Correct the names, or leave them out.",
                RuntimeWarning,
                stacklevel=3,
            )


def _ends(name: str, end: str) -> bool:
    return f".{name.replace('.base_layer', '')}".endswith(f".{end}")


def _for_layer(config: DLoRConfig, key: str, stored: Mapping[str, tuple[int, ...]]) -> DLoRConfig:
    """What the config has for the layer; r and depth are those of the tensors that will be loaded, if they are known.

    Where the two differ, the config learns of it, so that it fits when it is saved.
    """
    layer = config.for_layer(key)
    shape = stored.get(f"{key}.dlor_U.weight", (*stored.get(f"{key}.dlor_diag.weight", ()), 0))
    if len(shape) == 1:
        return layer
    if shape[-1] != layer.r:
        config.rank_pattern = {re.escape(key): shape[-1], **config.rank_pattern}
    if shape[0] != layer.depth:
        config.depth_pattern = {re.escape(key): shape[0], **config.depth_pattern}
    layer.r, layer.depth = shape[-1], shape[0]
    return layer


def _do_nothing(module: nn.Module, args: tuple) -> None:
    pass


def _warn_of_shards(state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """PeftWarning where a tensor that is to be saved is empty or flat, as PEFT warns for LoRA."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if ".dlor_" in key}
    bad = [f"{key}:{shape}" for key, shape in shapes.items() if len(shape) < 2 or 0 in shape]
    if bad:
        more = f" (+{len(bad) - 3} more)" if len(bad) > 3 else ""
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} DLoR tensor(s) have invalid shape: {', '.join(bad[:3])}{more}. A "
            "1-D or zero-sized tensor indicates that DeepSpeed ZeRO-3 / FSDP shards were not gathered before "
            "save_pretrained() and are therefore incomplete. Wrap the save in "
            "deepspeed.zero.GatheredParameters([...], modifier_rank=None) for ZeRO-3, or "
            "torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model) for FSDP, before calling "
            "save_pretrained().",
            PeftWarning,
            stacklevel=2,
        )
