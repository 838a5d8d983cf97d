"""Another adapter in the place of a loaded one, in the same tensors: no new module, and no recompilation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import DLoRConfig
from .layers import DLoRLayer

# what two adapters must have in common; rank and depth may be smaller than those of the loaded one
CONFIG_KEYS = ("mode", "side", "diagonal", "dlor_dropout")


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: DLoRConfig,
    parameter_prefix: str = "dlor_",
) -> None:
    """Write the tensors of another adapter into those of a loaded one; its scale stays as it was set.

    An adapter of smaller rank or depth is padded by zeros, which are the identity; a layer that it does not adapt
    becomes the identity. For one of larger rank the tensors grow, for which a compiled model is compiled again:
    `prepare_model_for_compiled_hotswap` makes room before. Nothing is changed where an error is raised.

    Args:
        model: holds the adapter; may be compiled.
        state_dict: the other adapter's tensors, under the names that the loaded one has in `model`.
        adapter_name: the loaded adapter.
        config: of the other adapter; compared before by PEFT's `check_hotswap_configs_compatible`.
        parameter_prefix: not used, PEFT passes it.

    Raises:
        ValueError: the loaded adapter is merged, or a tensor of the other one does not fit.
        RuntimeError: the other adapter adapts what the loaded one does not.
    """
    old = _tensors(model, adapter_name)
    if not old:
        known = sorted({name for layer in model.modules() if isinstance(layer, DLoRLayer) for name in layer.form})
        raise ValueError(f"dlor_peft.hotswap: there is no adapter {adapter_name!r}; there are {', '.join(known)}.")
    new = {_plain_name(key): tensor for key, tensor in state_dict.items()}
    unexpected = sorted(set(new) - set(old))
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. The adapter "
            "that is loaded first must adapt every layer that the others adapt."
        )
    for key, tensor in new.items():
        # depth is the first dimension; rank is the last of U and V, and can grow
        is_factor = key.split(".")[-3] in ("dlor_U", "dlor_V")
        widths = slice(1, -1) if is_factor else slice(1, None)
        room = old[key].shape
        if len(tensor.shape) != len(room) or tensor.shape[0] > room[0] or tensor.shape[widths] != room[widths]:
            raise ValueError(
                f"dlor_peft.hotswap: {key} has the shape {tuple(tensor.shape)}, which does not fit into "
                f"{tuple(room)}. Load the adapter of the largest depth first, on the same base model."
            )
    for name, layer in model.named_modules():
        factor = new.get(_plain_name(f"{name}.dlor_U.{adapter_name}.weight"))
        if isinstance(layer, DLoRLayer) and factor is not None and factor.shape[-1] > layer.r[adapter_name]:
            layer.pad_rank(factor.shape[-1], [adapter_name])
    for key, tensor in _tensors(model, adapter_name).items():
        padded = torch.zeros_like(tensor)
        if key in new:
            padded[tuple(map(slice, new[key].shape))] = new[key].to(padded)
        tensor.copy_(padded)


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: DLoRConfig | dict[str, DLoRConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Pad every adapter with zeros to one rank, so that all that will be swapped in have room.

    Args:
        model: holds the adapters, not compiled yet.
        target_rank: the largest rank among the adapters to come; None leaves the ranks as they are.
        config: the config or configs to tell of the new rank.
        check_compiled: of a model that is compiled already: "error", "warn" or "ignore".
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled not in ("error", "warn", "ignore"):
            raise ValueError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
            )
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be "
                "compiled again.",
                stacklevel=2,
            )
    layers = [module for module in model.modules() if isinstance(module, DLoRLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    if target_rank is None:
        return
    largest = max((r for layer in layers for r in layer.r.values()), default=0)
    if largest > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({largest}). Pass the largest rank among all adapters."
        )
    for layer in layers:
        layer.pad_rank(target_rank)
    for each in config.values() if isinstance(config, dict) else [config] if config else []:
        each.r, each.rank_pattern = target_rank, dict.fromkeys(each.rank_pattern, target_rank)


def _tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names without what compilation adds."""
    tensors = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, DLoRLayer) or adapter_name not in layer.form:
            continue
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
                "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()`."
            )
        for name in layer.form[adapter_name].shapes:
            tensors[_plain_name(f"{layer_name}.{name}.{adapter_name}.weight")] = getattr(layer, name)[adapter_name]()
    return tensors


def _plain_name(key: str) -> str:
    return key.replace("_orig_mod.", "")
