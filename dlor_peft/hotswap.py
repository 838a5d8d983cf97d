"""Another adapter in the place of a loaded one, in the same tensors: no new module, and no recompilation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import DLoRConfig
from .form import Form
from .layers import DLoRLayer
from .layers.attention import UncalledLinear


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
    becomes the identity. For one of larger rank the tensors grow, of which the loaded config is told, and for which a
    compiled model is compiled again: `prepare_model_for_compiled_hotswap` makes room before. What is trained in full
    (modules_to_save, trainable tokens) is swapped too. Nothing is changed where an error is raised.

    Args:
        model: holds the adapter; may be compiled.
        state_dict: the other adapter's tensors, under the names that the loaded one has in `model`. Base weights among
            them, as PEFT saves those of adapted embeddings, must be those of `model`.
        adapter_name: the loaded adapter, active or not.
        config: of the other adapter.
        parameter_prefix: not used, PEFT passes it.

    Raises:
        ValueError: the loaded adapter is merged, or the other one has another form or does not fit.
        RuntimeError: one adapts or trains what the other does not.
    """
    layers = {name: layer for name, layer in _layers(model) if adapter_name in layer.form}
    if not layers:
        known = sorted({name for _, layer in _layers(model) for name in layer.form})
        raise ValueError(
            f"dlor_peft.hotswap: there is no DLoR adapter {adapter_name!r}; there are {', '.join(known) or 'none'}. "
            "Name one that is loaded."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. "
            "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()`."
        )
    others = {_plain_name(key): tensor for key, tensor in state_dict.items()}
    new = {layer: _taken(others, name, layer, adapter_name) for name, layer in layers.items()}
    for name, layer in layers.items():
        if adapter_name in layer.tied_to:
            new[layer] = _as_its_source(name, new[layer], new[layer.tied_to[adapter_name]])
        elif new[layer]:
            _check(name, layer, new[layer], adapter_name, config)
    full = _trained_in_full(model, adapter_name, config)
    _check_others(model, others, full)

    for layer, tensors in new.items():
        if "dlor_U" in tensors:
            layer.pad_rank(tensors["dlor_U"].shape[-1], [adapter_name])
        for name in layer.form[adapter_name].shapes:
            weight, new_value = getattr(layer, name)[adapter_name](), tensors.get(name)
            if new_value is None or new_value.shape != weight.shape:
                weight.zero_()
            if new_value is not None:
                weight[tuple(map(slice, new_value.shape))].copy_(new_value)
    for key, tensor in full.items():
        tensor.copy_(others[key])
    _tell_ranks(model)


@torch.no_grad()
def pad_ranks(model: nn.Module, target_rank: int) -> bool:
    """Pad every adapter by zeros to one rank, of which the configs are told. Whether there are DLoR layers.

    ValueError, and nothing is changed, where a rank is larger.
    """
    layers = [layer for _, layer in _layers(model)]
    largest = max((r for layer in layers for r in layer.r.values()), default=0)
    if largest > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({largest}). Pass the largest rank among all adapters."
        )
    for layer in layers:
        layer.pad_rank(target_rank)
    # as PEFT tells those that it is given
    for _, _, config in _configs(model):
        config.r, config.rank_pattern = target_rank, dict.fromkeys(config.rank_pattern, target_rank)
    return bool(layers)


def _layers(model: nn.Module) -> Iterator[tuple[str, DLoRLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, DLoRLayer):
            yield _plain_name(name), module


def _plain_name(name: str) -> str:
    """Without what compilation adds."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def _taken(tensors: dict[str, Tensor], name: str, layer: DLoRLayer, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one layer, taken out of those of all."""
    keys = {part: f"{name}.{part}.{adapter_name}.weight" for part in layer.adapter_layer_names}
    return {part: tensors.pop(key) for part, key in keys.items() if key in tensors}


def _as_its_source(name: str, tensors: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
    same = tensors.keys() == source.keys() and all(torch.equal(tensors[part], source[part]) for part in source)
    if tensors and not same:
        raise ValueError(
            f"dlor_peft.hotswap: the loaded adapter ties {name} to the input embedding, and the other one has tensors "
            "of its own for it. Swap in adapters that were trained with ensure_weight_tying=True, too."
        )
    return source


def _check(name: str, layer: DLoRLayer, tensors: dict[str, Tensor], adapter_name: str, config: DLoRConfig) -> None:
    """ValueError where the tensors of another adapter mean something else on this layer, or do not fit into it."""
    form = layer.form[adapter_name]
    other = _other_form(name, layer, form, config)
    dropout = getattr(layer.dlor_dropout[adapter_name], "p", 0.0)
    if other != form or dropout != config.dlor_dropout:
        raise ValueError(
            f"dlor_peft.hotswap: on {name} the loaded adapter has {_meaning(form, dropout)}, but the other one has "
            f"{_meaning(other, config.dlor_dropout)}. Swap in adapters that agree in these, or load the other one "
            "under a name of its own."
        )
    shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
    r = (0, *shapes.get("dlor_U", ()))[-1]
    depth = (*next(iter(shapes.values())), 0)[0]
    if shapes != replace(form, r=r, depth=depth).shapes or not 0 < depth <= form.depth:
        raise ValueError(
            f"dlor_peft.hotswap: the other adapter's tensors of {name} have the shapes {shapes}, which does not fit "
            f"into {form.shapes}. Load the adapter of the largest depth first, on the same base model."
        )


def _other_form(name: str, layer: DLoRLayer, form: Form, config: DLoRConfig) -> Form:
    """What the other adapter's config means on this layer, but for the rank and the depth."""
    keys = [layer.named_in_config(name)]
    if isinstance(layer, UncalledLinear):
        # the name of attention stands for its out-projection too
        keys.append(keys[0].rpartition(".")[0])
    forms = [layer.resolve_form(config.for_layer(key), form.r, form.depth) for key in keys]
    return form if form in forms else forms[0]


def _meaning(form: Form, dropout: float) -> str:
    return f"mode={form.mode!r}, side={form.side!r}, diagonal={form.diagonal!r}, dlor_dropout={dropout}"


def _trained_in_full(model: nn.Module, adapter_name: str, config: DLoRConfig) -> dict[str, Tensor]:
    """What the loaded adapter trains beside its layers, by the names that PEFT saves it under."""
    for _, name, loaded in _configs(model):
        if name != adapter_name:
            continue
        if {loaded.bias, config.bias} != {"none"}:
            raise ValueError(
                f"dlor_peft.hotswap: the loaded adapter has bias={loaded.bias!r}, the other one bias={config.bias!r}, "
                'and trained biases are not swapped. Train adapters with bias="none" to swap them.'
            )
        if loaded.trainable_token_indices != config.trainable_token_indices:
            raise ValueError(
                f"dlor_peft.hotswap: the loaded adapter trains the tokens {loaded.trainable_token_indices}, the other "
                f"one {config.trainable_token_indices}. Swap in adapters that train the same tokens."
            )
    full = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = module.state_dict()
            for key, inside in module.adapter_state_dict_load_map(adapter_name).items():
                # the wrapper of trained tokens names those of any adapter
                if inside in own:
                    full[_plain_name(f"{name}.{key}")] = own[inside]
    return full


def _check_others(model: nn.Module, others: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> None:
    """RuntimeError or ValueError where tensors that are none of an adapted layer are not those that are expected."""
    missing = sorted(set(full) - set(others))
    if missing:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, missing keys found: {', '.join(missing)}. The loaded adapter "
            "trains these in full (modules_to_save, trainable tokens), and so must the others."
        )
    base = {_plain_name(key): value for key, value in model.state_dict().items()} if others else {}
    unexpected = sorted(key for key in others if key not in full and (key not in base or "dlor_" in key))
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. The adapter "
            "that is loaded first must adapt every layer that the others adapt, and train in full what they do."
        )
    for key, tensor in others.items():
        present = full.get(key, base.get(key))
        assert present is not None
        if tensor.shape != present.shape:
            raise ValueError(
                f"dlor_peft.hotswap: {key} has the shape {tuple(tensor.shape)}, which does not fit into "
                f"{tuple(present.shape)}. Load both adapters on the same base model."
            )
        if key not in full and not torch.equal(tensor.to(present), present):
            raise ValueError(
                f"dlor_peft.hotswap: the other adapter was saved with {key}, of which this model has another one. "
                "Unmerge all adapters, and load both on the same base model; where it is of modules_to_save, the "
                "adapter that is loaded first must have them too."
            )


def _configs(model: nn.Module) -> Iterator[tuple[nn.Module, str, DLoRConfig]]:
    """Base model, adapter and config of all adapters; what wraps a base model has the same configs."""
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict) and not isinstance(module, BaseTuner):
            for adapter_name, config in configs.items():
                if isinstance(config, DLoRConfig):
                    yield module, adapter_name, config


def _tell_ranks(model: nn.Module) -> None:
    """The configs in `model` learn the ranks that its layers have, so that they fit when they are saved."""
    for base_model, adapter_name, config in _configs(model):
        ranks = _ranks(base_model, adapter_name)
        if all(config.for_layer(key).r == r for key, r in ranks.items()):
            continue
        ((config.r, _),) = Counter(ranks.values()).most_common(1)
        others = {key for key, r in ranks.items() if r != config.r}
        # a key matches all names that end with it too, and the first match counts
        named = [key for key in ranks if key in others or any(key.endswith(f".{other}") for other in others)]
        config.rank_pattern = {re.escape(key): ranks[key] for key in sorted(named, key=len, reverse=True)}


def _ranks(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """The rank on each layer, by the name that a config has for it."""
    ranks: dict[str, int] = {}
    for name, layer in _layers(model):
        if adapter_name not in layer.form or adapter_name in layer.tied_to:
            continue
        key, r = layer.named_in_config(name), layer.form[adapter_name].r
        # the name of attention stands for its out-projection too
        if not isinstance(layer, UncalledLinear) or ranks.get(key.rpartition(".")[0]) != r:
            ranks[key] = r
    return ranks
