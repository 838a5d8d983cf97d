"""Targets that a config names as they were before transformers 5 fused the weights of experts."""

from __future__ import annotations

import re

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,
    convert_peft_config_for_transformers,
)
from torch import nn

from .config import DLoRConfig

_FORMER_NAMES = {name for names in _MOE_TARGET_MODULE_MAPPING.values() for name in names}


def translate_fused(config: DLoRConfig, model: nn.Module) -> None:
    """Projections of single experts among `target_modules` become the parameters that hold them, as for LoRA.

    For Mixtral, Qwen-MoE and the architectures that take after them, `gate_proj`, `up_proj` and `down_proj` of the
    experts are no modules any more: they are named in `target_parameters` from then on, and the two that are fused
    into one parameter have the sum of their ranks there. "all-linear" means them too, as it did when they were linear
    layers. All other configs stay as they are. PEFT does the same to a LoraConfig, and to no other.

    Raises:
        ValueError: one of two projections is targeted, whose weights are fused with those of the other; or a regex
            names the experts of some layers only, which the names of parameters cannot.
    """
    if config.target_modules is None:
        return
    as_lora = LoraConfig(
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        target_parameters=config.target_parameters,
        r=config.r,
        rank_pattern=dict(config.rank_pattern),
    )
    named_before = set(config.target_parameters or ())
    convert_peft_config_for_transformers(as_lora, model, conversions=None)
    parameters = set(as_lora.target_parameters or ())
    if isinstance(config.target_modules, str) and config.target_modules.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        beyond = _beyond(config.target_modules, as_lora, parameters - named_before, model)
        if beyond and parameters == named_before:
            # nothing is fused, and the regex says better what is meant
            return
        if beyond:
            raise ValueError(
                f"dlor_peft.targets: target_modules={config.target_modules!r} names experts of some layers, whose "
                f"weights are fused into parameters, but not {beyond}, which has the same name. Name the parameters "
                "in full in target_parameters, and the other modules in target_modules."
            )
    config.target_modules = as_lora.target_modules
    config.rank_pattern = as_lora.rank_pattern or {}
    if parameters != named_before:
        config.target_parameters = sorted(parameters)


def is_left_out(config: DLoRConfig, module_name: str) -> bool:
    """Whether a config keeps the parameters of a module out: by exclude_modules, or by layers_to_transform.

    PEFT asks this of the modules that are targeted themselves.
    """
    alone = LoraConfig(
        target_modules=[module_name.rpartition(".")[2]],
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return not check_target_module_exists(alone, module_name)


def _beyond(regex: str, translated: LoraConfig, parameters: set[str], model: nn.Module) -> str | None:
    """A module or parameter of the translated targets that the regex does not match; None if it matches all."""
    for name, _ in model.named_modules():
        if check_target_module_exists(translated, name) and not re.fullmatch(regex, name):
            return name
    for name, _ in model.named_parameters():
        container, _, leaf = name.rpartition(".")
        if leaf in parameters and not any(re.fullmatch(regex, f"{container}.{old}") for old in (leaf, *_FORMER_NAMES)):
            return name
    return None
