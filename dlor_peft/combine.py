"""A weighted sum of adapters as one new adapter: W' = W + sum_i w_i (W'_i - W)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper

from .config import DLoRConfig
from .form import Residual
from .layers import DLoRLayer

COMBINATIONS = ("cat", "svd")


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """W' = W + sum_i w_i (W'_i - W) as a new, frozen, inactive adapter; the scale of each W'_i counts.

    Args:
        model: the tuner; this function is its method.
        adapters: names of existing adapters.
        weights: one w_i for each, of any sign.
        adapter_name: name of the new adapter.
        combination_type: "cat" is exact, of the rank that the adapters have together (depth * r each), and needs
            one mode and one side other than "both". "svd" keeps the exact sum of the diagonals and truncates the
            low-rank part; for adapters of different forms it is the nearest low-rank update of mode "additive".
        svd_rank: rank for "svd"; the largest rank among the adapters where None.

    Raises:
        ValueError: an unknown adapter or combination_type, "cat" on forms that it cannot join, or adapters that
            save one module in full (modules_to_save) or train tokens.
    """
    _check(model, adapters, weights, adapter_name, combination_type, svd_rank)
    layers = {
        name: layer
        for name, layer in model.model.named_modules()
        if isinstance(layer, DLoRLayer) and _on(layer, adapters)
    }
    side = _common_side(model, adapters, layers)
    if combination_type == "cat" and side is None:
        raise ValueError(
            f'dlor_peft.combine: "cat" needs adapters of one mode and one side other than "both", whose sum has that '
            f'form again; {", ".join(adapters)} have not. Use combination_type="svd".'
        )
    ranks = [layer.residual(name).U.shape[1] for layer in layers.values() for name in _on(layer, adapters)]
    rank = svd_rank or max(ranks)
    if combination_type == "svd" and rank == 0 and side is None:
        raise ValueError("dlor_peft.combine: adapters of rank 0 suggest no rank for their sum: pass svd_rank.")
    sums = {}
    with torch.no_grad():
        for name, layer in layers.items():
            add = _sum_of_updates if side is None else _sum_of_residuals
            residual = add(layer, adapters, weights)
            # layer by layer: a dense sum is as large as its weight
            sums[name] = _truncate(residual, rank) if combination_type == "svd" else residual
    model.peft_config[adapter_name] = _config(model, adapters, sums, side)
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    for name, residual in sums.items():
        layer = model.model.get_submodule(name)
        assert isinstance(layer, DLoRLayer)
        layer.set_residual(adapter_name, residual)
    for wrapper in _saved_modules(model):
        for adapter in _on(wrapper, adapters):
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[adapter].state_dict())
    model.set_requires_grad(adapter_name, False)


def _check(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
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
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"dlor_peft.combine: combination_type must be one of {', '.join(map(repr, COMBINATIONS))}, but it is "
            f'{combination_type!r}. Use "cat" for the exact sum, "svd" for a given rank.'
        )
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(
            f'dlor_peft.combine: svd_rank={svd_rank!r} must be at least 1 and goes with combination_type="svd" only.'
        )
    if any(config.bias != "none" for config in _configs(model, adapters)):
        raise ValueError(
            "dlor_peft.combine: adapters that train biases (bias) cannot be combined: those biases belong to the "
            "base model."
        )
    if any(config.trainable_token_indices for config in _configs(model, adapters)):
        raise ValueError(
            "dlor_peft.combine: adapters with trainable_token_indices cannot be combined: their tokens replace, they "
            "do not add. Merge them one after the other instead."
        )
    for wrapper in _saved_modules(model):
        if len(_on(wrapper, adapters)) > 1:
            raise ValueError(
                "dlor_peft.combine: cannot combine adapters that save the same module in full (modules_to_save): "
                f"{', '.join(_on(wrapper, adapters))}."
            )


def _configs(model: BaseTuner, adapters: Sequence[str]) -> list[DLoRConfig]:
    return [cast(DLoRConfig, model.peft_config[adapter]) for adapter in adapters]


def _saved_modules(model: BaseTuner) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _on(module: DLoRLayer | ModulesToSaveWrapper, adapters: Sequence[str]) -> list[str]:
    present = module.form if isinstance(module, DLoRLayer) else module.modules_to_save
    return [adapter for adapter in adapters if adapter in present]


def _common_side(model: BaseTuner, adapters: Sequence[str], layers: dict[str, DLoRLayer]) -> str | None:
    """The `side` of a config under which the sum of the adapters has their form again; None where there is none."""
    sides = []
    for layer in layers.values():
        here = {layer.form[adapter].side for adapter in _on(layer, adapters)} - {None}
        if len(here) > 1 or "both" in here:
            return None
        sides.extend(here)
    configs = _configs(model, adapters)
    if len({config.mode for config in configs}) > 1:
        return None
    if not sides or len({config.side for config in configs}) == 1:
        return configs[0].side
    return sides[0] if len(set(sides)) == 1 else None


def _config(model: BaseTuner, adapters: Sequence[str], sums: dict[str, Residual], side: str | None) -> DLoRConfig:
    configs = _configs(model, adapters)
    diagonals = {config.diagonal for config in configs}
    diagonal = next(kind for kind in ("vector", "scalar", "none") if kind in diagonals)
    saved = sorted({module for config in configs for module in config.modules_to_save or ()})
    return replace(
        configs[0],
        r=max(residual.U.shape[1] for residual in sums.values()),
        mode="additive" if side is None else configs[0].mode,
        side="auto" if side is None or (diagonal == "none" and configs[0].mode == "scaled") else side,
        diagonal="none" if side is None else diagonal,
        depth=1,
        # the whole names of the adapted layers, whatever patterns found them
        target_modules="|".join(map(re.escape, sums)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        depth_pattern={},
        modules_to_save=saved or None,
    )


def _sum_of_residuals(layer: DLoRLayer, adapters: Sequence[str], weights: Sequence[float]) -> Residual:
    """sum_i w_i (diag(q_i) + U_i V_i^T) by adding the diagonals and concatenating the factors: exact."""
    diagonals, Us, Vs = [], [], []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in layer.form:
            q, U, V, _ = layer.residual(adapter)
            weight = weight * layer.scaling[adapter]
            dtype = torch.promote_types(U.dtype, torch.float32)
            Us.append(weight * U.to(dtype))
            Vs.append(V.to(dtype))
            if q is not None:
                diagonals.append(weight * q.to(dtype))
    q = sum(diagonals[1:], start=diagonals[0]) if diagonals else None
    return Residual(q, torch.cat(Us, 1), torch.cat(Vs, 1))


def _sum_of_updates(layer: DLoRLayer, adapters: Sequence[str], weights: Sequence[float]) -> Residual:
    """sum_i w_i (W'_i - W) as a dense U, V the identity."""
    deltas = [
        weight * layer.delta_matrix(adapter)
        for adapter, weight in zip(adapters, weights, strict=True)
        if adapter in layer.form
    ]
    delta = sum(deltas[1:], start=deltas[0])
    return Residual(None, delta, torch.eye(delta.shape[1]).to(delta))


def _truncate(residual: Residual, rank: int) -> Residual:
    """The nearest U V^T of the given rank, by the SVD of the small core; the diagonal stays."""
    q, U, V, _ = residual
    if U.shape[1] <= rank:
        return residual
    Q_U, R_U = torch.linalg.qr(U)
    Q_V, R_V = torch.linalg.qr(V)
    left, S, right_h = torch.linalg.svd(R_U @ R_V.T, full_matrices=False)
    root = S[:rank].sqrt()
    return Residual(q, Q_U @ (left[:, :rank] * root), Q_V @ (right_h[:rank].T * root))
