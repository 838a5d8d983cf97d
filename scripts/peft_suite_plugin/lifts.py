"""What stands between the suite's tests and DLoR, changed by name in the module that uses it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from peft.tuners import lora
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, save_and_load

from dlor_peft import DLoRLayer, DLoRModel

from .renaming import LAYERS
from .stand_in import LoraConfig, stand_in


@contextmanager
def _offline(model_id: str) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _download(*args: Any, cache_dir: Any = None, **kwargs: Any) -> str:
    # a cache of its own starts empty, and nothing can be fetched into it
    if cache_dir is not None:
        shutil.copytree(constants.HF_HUB_CACHE, cache_dir, symlinks=True, dirs_exist_ok=True)
    return hf_hub_download(*args, cache_dir=cache_dir, **kwargs)


def _transposed(part: str, layer: DLoRLayer) -> dict[str, torch.Tensor]:
    return {name: weight().T for name, weight in getattr(layer, part).items()}


def _is_on_hub(repo_id: str, filename: str, revision: str | None = None, **kwargs: Any) -> bool:
    return isinstance(try_to_load_from_cache(repo_id, filename, revision=revision), str)


# what a test compares with LoRA's classes, and what it asks of LoRA's layers, holds for DLoR's
_IN_PLACE_OF_LORA = {
    peft.LoraConfig: LoraConfig,
    peft.LoraModel: DLoRModel,
    lora.LoraLayer: DLoRLayer,
    lora.layer.ParamWrapper: LAYERS["ParamWrapper"],
}
_BY_NAME = {
    # goes online for the first use of every model; the stand-ins are the cache
    "hub_online_once": _offline,
    # always asks `isinstance(class, BeftConfig)`, so that it skips Llama and Gemma3 for every method, not for BEFT
    "check_beft_config": _nothing,
    # skips LoRA on grouped convolutions, which DLoR merges
    "_skip_if_merging_not_supported": _nothing,
    # skips LoRA with two adapters on a parameter, which DLoR takes
    "_skip_tests_with_multiple_adapters_with_target_parameters": _nothing,
}


# These stay: a test of merging that sets dropout, which adapters of parameters refuse, and the warning about trained
# biases of a disabled adapter, which PEFT tests for no method (it asks whether a class is none of two by "or"), with a
# list of warnings that it could not read; tests/peft_behaviour/test_training.py has the second.
def _skip(reason: str = "", **kwargs: Any) -> None:
    # LoRA parametrises the modules that hold the parameters, which clashes with sharding; DLoR does not
    if not reason.startswith("Skipping FSDP + target_paramters"):
        pytest.skip(reason, **kwargs)


def _raises(*args: Any, match: Any = None, **kwargs: Any) -> AbstractContextManager[Any]:
    # PEFT adds up no adapters of parameters, and DLoR does
    if match == "add_weighted_adapter does not support targeting nn.Parameter":
        return nullcontext()
    return pytest.raises(*args, match=match, **kwargs)


# names of other methods by which a module makes exceptions that DLoR needs, too
_MEANING_DLOR = {
    # the tolerance for merging into grouped convolutions
    "testing_common": ("LoHaConfig",),
    "test_custom_models": ("LoHaConfig",),
}
CONVERTED = ("LoKrConfig", "LoHaConfig", "C3AConfig")
"""The methods that tests of the conversion to LoRA start from."""


def apply(module: ModuleType) -> None:
    """Put DLoR in LoRA's place in one of the suite's modules and in those that its tests share."""
    peft.config.hf_hub_download = _download
    # asks the Hub whether the base model has a config, and compares no vocabularies where it cannot
    save_and_load.check_file_exists_on_hf_hub = _is_on_hub
    # tests patch the mapping of the method that they test, which was copied from LoRA's
    DLoRModel.target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # what `renaming` puts for LoRA's factors of embeddings
    for part in "UV":
        setattr(DLoRLayer, f"_transposed_{part}", property(partial(_transposed, f"dlor_{part}")))
    package = module.__name__.rpartition(".")[0]
    shared = {value.__module__ for value in vars(module).values() if getattr(value, "__module__", None)}
    for name in shared | {module.__name__}:
        if name.rpartition(".")[0] == package:
            _apply(sys.modules[name])


# takes the output of the stand-in as far as LoKr's random start takes that of the real model
_GAIN = 4.0
_reset_parameters = DLoRLayer.reset_parameters


def _reset_louder(layer: DLoRLayer, adapter_name: str, init_weights: bool) -> None:
    _reset_parameters(layer, adapter_name, init_weights)
    if not init_weights:
        layer.dlor_U[adapter_name].weight.data *= _GAIN


@contextmanager
def conversion(module: ModuleType) -> Iterator[None]:
    """While it lasts, DLoR is in the place of what is converted, and LoRA itself is what it is converted to."""
    patches = {name: stand_in(getattr(peft, name)) for name in CONVERTED if hasattr(module, name)}
    if hasattr(module, "LoraConfig"):
        patches["LoraConfig"] = peft.LoraConfig
    with mock.patch.dict(vars(module), patches), mock.patch.object(DLoRLayer, "reset_parameters", _reset_louder):
        yield


def _apply(module: ModuleType) -> None:
    short = module.__name__.rpartition(".")[2]
    for name, value in list(vars(module).items()):
        if name in _BY_NAME:
            setattr(module, name, _BY_NAME[name])
        elif short == "testing_utils":
            # writes LoRA's init_lora_weights for LoRA, and DLoR's init_weights for all that it does not know
            continue
        elif isinstance(value, type) and value in _IN_PLACE_OF_LORA:
            setattr(module, name, _IN_PLACE_OF_LORA[value])
        elif value is pytest:
            setattr(module, name, SimpleNamespace(**{**vars(pytest), "skip": _skip, "raises": _raises}))
        elif value is lora:
            setattr(module, name, SimpleNamespace(**{**vars(lora), "LoraLayer": DLoRLayer}))
    for name in _MEANING_DLOR.get(short, ()):
        setattr(module, name, LoraConfig)
