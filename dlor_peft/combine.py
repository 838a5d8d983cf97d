"""A weighted combination of adapters as one new adapter: W' = W + sum_i w_i (W'_i - W), exactly or nearly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

from .config import DLoRConfig
from .form import Residual
from .layers import DLoRLayer, ParamWrapper
from .weighted import Combination, combine_tokens


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """W' = W + sum_i w_i (W'_i - W) as a new, frozen, inactive adapter; the scale of each W'_i counts.

    Trained tokens are combined so in any case. For the rest, how exact that is depends on `combination_type`:

    - "cat" is exact, of the rank that the adapters have together (depth * r each). It needs one mode and one side
      other than "both".
    - "svd" keeps the exact sum of the diagonals and truncates that of the U V^T to svd_rank.
    - "linear" adds up diagonals, U and V, as LoRA does: the diagonal is exact, U V^T has cross terms. It needs one
      mode, one side and on each layer one rank. With side "both", products of two diagonals are cross terms, too.
    - "ties", "dare_linear", "dare_ties" and "magnitude_prune" are "linear" with each tensor pruned before.
    - With "_svd", these prune diagonals and products U V^T, and truncate the sum of the products to svd_rank.

    Where the adapters have not one mode and one side, or the side is "both", those by SVD combine the dense W'_i - W,
    to an adapter of mode "additive" without a diagonal. Those with "dare" draw from torch's global generator.

    Args:
        model: the tuner; this function is its method.
        adapters: names of existing adapters.
        weights: one w_i for each, of any sign.
        adapter_name: name of the new adapter.
        combination_type: see above.
        svd_rank: the rank that SVD truncates to; where None, the largest of the adapters (depth * r).
        svd_clamp: clamp the U and V that come from SVD to this quantile, above 0.5 and up to 1, of their entries and
            the negatives of these.
        svd_full_matrices: passed to torch.linalg.svd. It makes no difference to the result, of which only the leading
            singular vectors count, and little to the cost: what is decomposed is a small core.
        svd_driver: passed to torch.linalg.svd, on CUDA only: "gesvd", "gesvdj" or "gesvda".
        density: the share of the values of each tensor that pruning keeps, above 0 and up to 1. Diagonals are not
            pruned on layers where an adapter has a scalar.
        majority_sign_method: how "ties" elects the sign of a value: "total" by the sum of the adapters' values,
            "frequency" by the number of adapters.

    Raises:
        ValueError: an unknown adapter or combination_type; an option that is out of range, or that the type does not
            take (a density that is not needed only warns); adapters of a form that the type cannot combine; adapters
            that train biases, or save one module in full (modules_to_save), or of which only some tie their layers.
    """
    how = Combination(
        combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
    )
    _check(model, adapters, weights, adapter_name)
    layers, tied = _adapted_layers(model, adapters)
    common = _common_fields(model, adapters, layers)
    two_sided = any(
        layer.form[adapter].side == "both" for layer in layers.values() for adapter in _on(layer, adapters)
    )
    closed = common is not None and not two_sided
    _check_forms(how, adapters, layers, common, closed)
    by_residual = closed or how.by_tensor
    rank = svd_rank or max(_rank(layer, adapter) for layer in layers.values() for adapter in _on(layer, adapters))
    if how.by_svd and rank == 0 and not closed:
        raise ValueError("dlor_peft.combine: adapters of rank 0 suggest no rank for their sum: pass svd_rank.")
    # layer by layer: a dense sum is as large as its weight
    sums = {name: _combine(how, layer, adapters, weights, rank, by_residual) for name, layer in layers.items()}
    if not how.by_svd:
        rank = max(residual.U.shape[-1] for residual in sums.values())
    tokens = _token_layers(model, adapters)
    config = _config(model, adapters, rank, common if by_residual else None)
    config.target_modules = _pattern({**layers, **tied}, bool(tied)) or []
    config.ensure_weight_tying |= bool(tied)
    config.trainable_token_indices = {
        name: sorted({token for adapter in _on(layer, adapters) for token in layer.token_indices[adapter]})
        for name, layer in tokens.items()
    } or None
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    # PEFT looks for no targets inside of adapted modules, and does not find again what was tied and is adapted by now
    for name, residual in sums.items():
        if adapter_name not in layers[name].form:
            layers[name].update_layer(adapter_name, rank, 1, config.for_layer(layers[name].named_in_config(name)))
        layers[name].set_residual(adapter_name, residual)
    for layer in tied.values():
        if adapter_name not in layer.tied_to:
            layer.update_layer(adapter_name, rank, 1, config, tied_to=layer.tied_to[_on(layer, adapters)[0]])
    for wrapper in _saved_modules(model):
        for adapter in _on(wrapper, adapters):
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[adapter].state_dict())
    for layer in tokens.values():
        combine_tokens(layer, adapters, weights, adapter_name)
    model.set_requires_grad(adapter_name, False)


@torch.no_grad()
def _combine(
    how: Combination,
    layer: DLoRLayer,
    adapters: Sequence[str],
    weights: Sequence[float],
    rank: int,
    by_residual: bool,
) -> Residual:
    here = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in layer.form]
    if by_residual:
        scaled = [weight * layer.scaling[adapter] for adapter, weight in here]
        return how.of_residuals([layer.residual(adapter) for adapter, _ in here], scaled, rank)
    return how.of_updates([layer.delta_matrix(adapter) for adapter, _ in here], [weight for _, weight in here], rank)


def _check(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise ValueError(f"dlor_peft.combine: adapter {adapter_name!r} exists already: choose another adapter_name.")
    unknown = [adapter for adapter in adapters if adapter not in model.peft_config]
    if unknown or not adapters:
        raise ValueError(
            f"dlor_peft.combine: adapters={list(adapters)!r} must name existing adapters; there are "
            f"{', '.join(map(repr, model.peft_config))}."
        )
    if len(adapters) != len(weights):
        raise ValueError(f"dlor_peft.combine: {len(adapters)} adapters need as many weights, but got {len(weights)}.")
    if any(config.bias != "none" for config in _configs(model, adapters)):
        raise ValueError(
            "dlor_peft.combine: adapters that train biases (bias) cannot be combined: those biases belong to the "
            "base model."
        )
    twice = [wrapper for wrapper in _saved_modules(model) if len(_on(wrapper, adapters)) > 1]
    if twice:
        # in PEFT's words
        raise ValueError(
            "dlor_peft.combine: Cannot add weighted adapters if they target the same module with modules_to_save, but "
            f"found {len(twice)} such instance(s). Of {', '.join(_on(twice[0], adapters))}, one at most may save it."
        )


def _check_forms(
    how: Combination,
    adapters: Sequence[str],
    layers: dict[str, DLoRLayer],
    common: dict[str, Any] | None,
    closed: bool,
) -> None:
    remedy = f"""Use combination_type="{f"{how.kind}_svd" if how.prunes else "svd"}"."""
    if how.kind == "cat" and not closed:
        raise ValueError(
            f'dlor_peft.combine: "cat" needs adapters of one mode and one side other than "both", whose sum has that '
            f"form again; {', '.join(adapters)} have not. {remedy}"
        )
    if how.by_tensor and common is None:
        raise ValueError(
            f'dlor_peft.combine: "{how.kind}" acts on diagonals, U and V one by one, and needs adapters of one mode '
            f"and one side, in which these mean the same; {', '.join(adapters)} have not. {remedy}"
        )
    for name, layer in layers.items():
        ranks = {adapter: _rank(layer, adapter) for adapter in _on(layer, adapters)}
        if how.by_tensor and len(set(ranks.values())) > 1:
            listed = ", ".join(f"{rank} ({adapter})" for adapter, rank in ranks.items())
            raise ValueError(
                f'dlor_peft.combine: "{how.kind}" acts on U and V one by one, and needs one rank (depth * r) on each '
                f"layer, but on {name!r} it is {listed}. {remedy}"
            )
        if how.svd_driver is not None and not all(factor.is_cuda for factor in layer.dlor_U.parameters()):
            raise ValueError(
                f"dlor_peft.combine: svd_driver={how.svd_driver!r} names a method of CUDA, but {name!r} is not on a "
                "CUDA device. Leave svd_driver out, or move the model there."
            )


def _adapted_layers(model: BaseTuner, adapters: Sequence[str]) -> tuple[dict[str, DLoRLayer], dict[str, DLoRLayer]]:
    """The layers with tensors of their own for the adapters, and those that share the tensors of one of them."""
    layers, tied = {}, {}
    for name, layer in model.model.named_modules():
        here = _on(layer, adapters) if isinstance(layer, DLoRLayer) else []
        if not here:
            continue
        sources = [layer.tied_to[adapter] for adapter in here if adapter in layer.tied_to]
        if not sources:
            layers[name] = layer
        elif len(sources) == len(here) and _on(sources[0], adapters) == here:
            tied[name] = layer
        else:
            raise ValueError(
                f"dlor_peft.combine: {name!r} shares its weight and its adapter with the input embedding in some of "
                f"{', '.join(adapters)} (ensure_weight_tying), not in all. Train all of them tied, or merge the "
                "adapters one after the other."
            )
    return layers, tied


def _rank(layer: DLoRLayer, adapter: str) -> int:
    return layer.form[adapter].r * layer.form[adapter].depth


def _configs(model: BaseTuner, adapters: Sequence[str]) -> list[DLoRConfig]:
    return [cast(DLoRConfig, model.peft_config[adapter]) for adapter in adapters]


def _saved_modules(model: BaseTuner) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _token_layers(model: BaseTuner, adapters: Sequence[str]) -> dict[str, TrainableTokensLayer]:
    """The embeddings of which one of the adapters trains tokens, less those that are tied to another."""
    wrappers = {
        name: module.token_adapter
        for name, module in model.model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None
    }
    return {name: layer for name, layer in wrappers.items() if _on(layer, adapters)}


def _on(module: DLoRLayer | ModulesToSaveWrapper | TrainableTokensLayer, adapters: Sequence[str]) -> list[str]:
    if isinstance(module, DLoRLayer):
        present = module.form
    else:
        present = module.modules_to_save if isinstance(module, ModulesToSaveWrapper) else module.token_indices
    return [adapter for adapter in adapters if adapter in present]


def _common_fields(model: BaseTuner, adapters: Sequence[str], layers: dict[str, DLoRLayer]) -> dict[str, Any] | None:
    """The fields of a config that mean on each layer the mode and the side that all adapters have there, if any do."""
    forms = [layer.form[adapter] for layer in layers.values() for adapter in _on(layer, adapters)]
    modes, sides = {form.mode for form in forms}, {form.side for form in forms} - {None}
    for layer in layers.values():
        here = [layer.form[adapter] for adapter in _on(layer, adapters)]
        if len({form.mode for form in here}) > 1 or len({form.side for form in here} - {None}) > 1:
            return None
    fields = ("mode", "side", "mode_pattern", "side_pattern")
    first, *others = [{field: getattr(config, field) for field in fields} for config in _configs(model, adapters)]
    if all(other == first for other in others):
        return first
    if len(modes) > 1 or len(sides) > 1:
        return None
    return {"mode": modes.pop(), "side": sides.pop() if sides else "auto", "mode_pattern": {}, "side_pattern": {}}


def _config(model: BaseTuner, adapters: Sequence[str], rank: int, common: dict[str, Any] | None) -> DLoRConfig:
    """What the adapters' configs have in common with their combination; which layers it adapts is left open."""
    configs = _configs(model, adapters)
    diagonals = {config.diagonal for config in configs}
    diagonal = next(kind for kind in ("vector", "scalar", "none") if kind in diagonals)
    dense = {"mode": "additive", "side": "auto", "mode_pattern": {}, "side_pattern": {}}
    saved = sorted({module for config in configs for module in config.modules_to_save or ()})
    return replace(
        configs[0],
        r=rank,
        **(common or dense),
        diagonal=diagonal if common else "none",
        depth=1,
        # a layer that cannot have dropout has none in any adapter
        dlor_dropout=min(config.dlor_dropout for config in configs),
        init_weights=True,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        depth_pattern={},
        modules_to_save=saved or None,
        # where there are any, they are the same
        target_parameters=next((config.target_parameters for config in configs if config.target_parameters), None),
        ensure_weight_tying=any(
            config.ensure_weight_tying and bool(config.modules_to_save or config.trainable_token_indices)
            for config in configs
        ),
    )


def _pattern(layers: dict[str, DLoRLayer], tied: bool) -> str:
    """A regex of the whole names that the layers have in the base model, whatever patterns found them."""
    names = [name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)]
    patterns = [re.escape(name).replace(r"\.base_layer", r"(\.base_layer)?") for name in names]
    # PEFT ties layers if the targets match this very name
    return "|".join(dict.fromkeys([*patterns, "lm_head"] if tied else patterns))
