"""Adapters of a model of which accelerate offloads a part: what can be trained there, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import DLoRConfig
from .layers.placement import fetch, offload_hook


def refuse_offloaded(tuner: BaseTuner, config: DLoRConfig) -> None:
    """ValueError where a config trains offloaded tensors in place: what is trained or loaded there is lost."""
    tokens = config.trainable_token_indices
    embeddings = [] if tokens is None or isinstance(tokens, dict) else [tuner.model.get_input_embeddings()]  # pyright: ignore[reportCallIssue]
    for name, module in tuner.model.named_modules():
        if offload_hook(module) is None:
            continue
        is_embedding = module in embeddings or (isinstance(tokens, dict) and name.endswith(tuple(tokens)))
        has_bias = config.bias != "none" and getattr(module, "bias", None) is not None
        trains_bias = has_bias and (config.bias == "all" or bool(tuner._check_target_module_exists(config, name)))
        if is_embedding or trains_bias:
            field = "trainable_token_indices" if is_embedding else "bias"
            raise ValueError(
                f"dlor_peft.offload: {field}={getattr(config, field)!r} trains tensors of {name!r}, which are "
                f"offloaded. Leave {field} out, or give the module a device in device_map."
            )


def fetch_saved(model: nn.Module, config: PeftConfig, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Put what is offloaded into `state_dict`, but for that which is not saved with an adapter."""
    trained = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    embeddings = list(_embeddings(model))
    biases = getattr(config, "bias", "none") != "none"
    for name, module in model.named_modules():
        if offload_hook(module) is None:
            continue
        is_embedding = any(module is layer for layer in embeddings)
        whole = is_embedding or prefix in name or name.startswith(tuple(trained))
        for tensor in (*module._parameters, *module._buffers):
            key = f"{name}.{tensor}"
            if (whole or (biases and tensor == "bias")) and key in state_dict and state_dict[key].is_meta:
                state_dict[key] = fetch(module, tensor)


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for kind in ("input", "output"):
        try:
            layer = getattr(model, f"get_{kind}_embeddings", lambda: None)()
        except NotImplementedError:
            # a model of images
            continue
        if layer is not None:
            yield getattr(layer, "base_layer", layer)
