"""A LoRA or DoRA adapter as a DLoR adapter with the same outputs, on which training can go on.

LoRA: W + s B A, so U = s B and V = A^T, with the diagonal at zero. DoRA: D (W + s B A) with D = diag(m / n),
n_i = ||(W + s B A)_i||, so diag(1 + delta) W + U V^T with delta = m / n - 1, U = s D B, V = A^T.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor

from ..config import DLoRConfig
from ..form import Form
from .adapter import PREFIX, WEIGHTS, SavedAdapter, damaged_config
from .checkpoint import Checkpoint
from .lora import Low, SavedLora
from .skeleton import Skeleton, bare_model
from .weights import BaseWeights
from .writing import copy_tokenizer, new_folder

_SAME = (
    "r", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "target_parameters", "ensure_weight_tying", "trainable_token_indices", "task_type",
    "base_model_name_or_path", "revision", "auto_mapping",
)  # fmt: skip
_BIASES = {"none": "none", "all": "all", "lora_only": "dlor_only"}


@dataclass(frozen=True)
class Target:
    """The form to convert to; None where the adapter decides: a DoRA is scaled on the outputs, a LoRA anything."""

    mode: str | None = None
    side: str | None = None
    diagonal: str | None = None


def convert(lora: SavedLora, target: Target | None = None, base: Checkpoint | None = None) -> SavedAdapter:
    """The adapter in the form of DLoR, at scale 1.

    Args:
        lora: with the scaling lora_alpha / r, or lora_alpha / sqrt(r), which goes into U.
        target: mode "scaled" or "additive" (default "scaled"), side (default "auto"), diagonal (default "vector").
        base: checks names and shapes, and brings names that transformers changed up to date. Needed for DoRA, which
            depends on the weights, and where names and shapes alone do not tell what a tensor is of.

    Raises:
        ValueError: the adapter does not fit the base, needs one, or has no equal of that form.
    """
    target = _resolved(target or Target(), lora)
    if base is not None:
        lora = _up_to_date(lora, base)
    config = _config(lora, target)
    layers = {module: _converted(module, low, config) for module, low in lora.layers.items()}
    adapter = SavedAdapter(lora.source, lora.folder, lora.revision, "", config, layers, lora.others)
    if base is None:
        _refuse_without_base(lora)
        return adapter
    weights = BaseWeights(base, Skeleton(base, [adapter]))
    if lora.config.use_dora:
        layers |= {module: _converted_dora(module, low, weights) for module, low in lora.layers.items()}
    base.close()
    return adapter


def write_converted(
    adapter: SavedAdapter, out: str | Path, overwrite: bool = False, base: Checkpoint | None = None
) -> None:
    """Write what `convert` returned to the folder `out`, with the tokenizer of its source, if it has one, and a card.

    The folder of `base` is not overwritten.

    Raises:
        FileExistsError: the folder is there.
        OSError: it cannot be written; nothing is left of it.
    """
    inputs = [adapter.folder, *([base.folder.path] if base is not None else [])]
    with new_folder(out, overwrite, inputs) as folder:
        save_file(
            {key: tensor.contiguous() for key, tensor in adapter.state_dict.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        copy_tokenizer(adapter.folder, folder)
        # which writes the card
        adapter.config.save_pretrained(str(folder))
        card = ModelCard.load(folder / "README.md")
        data = cast(ModelCardData, card.data)
        name = adapter.config.base_model_name_or_path
        if name and not Path(name).is_dir():
            data.base_model = name
        title = f"# DLoR adapter\n\nConverted from the LoRA adapter {adapter.source}, with the same outputs."
        card.text = f"{title}\n{card.text}"
        card.save(folder / "README.md")


def _resolved(target: Target, lora: SavedLora) -> Target:
    if lora.config.use_dora:
        wanted = Target("scaled", "output", "vector")
        for name in ("mode", "side", "diagonal"):
            if getattr(target, name) not in (None, getattr(wanted, name)):
                raise ValueError(
                    f"{lora.source} is a DoRA, which is mode 'scaled', side 'output', diagonal 'vector' and no other: "
                    f"leave out --{name} {getattr(target, name)}."
                )
        return wanted
    return Target(target.mode or "scaled", target.side or "auto", target.diagonal or "vector")


def _refuse_without_base(lora: SavedLora) -> None:
    reasons = {
        "it is a DoRA, which depends on the weights": lora.config.use_dora,
        "it adapts convolutions, whose groups do not show": any(low.is_conv for low in lora.layers.values()),
        "it adapts parameters, whose shapes do not show": bool(lora.config.target_parameters),
        "it ties weights": lora.config.ensure_weight_tying,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{lora.source} can be converted with its base model only, since {reason}: pass --base.")


def _config(lora: SavedLora, target: Target) -> DLoRConfig:
    own = lora.config
    if own.target_parameters and own.rank_pattern:
        raise ValueError(
            f"{lora.source} has target_parameters and a rank_pattern: which rank is that of which parameter does not "
            "show in it, so it is not converted."
        )
    # sets have no order of their own
    values: dict[str, Any] = {name: getattr(own, name) for name in _SAME}
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    values |= {"mode": target.mode, "side": target.side, "diagonal": target.diagonal, "bias": _BIASES.get(own.bias)}
    try:
        return DLoRConfig(**values, dlor_dropout=own.lora_dropout, inference_mode=True)
    except TypeError as error:
        raise damaged_config(lora.folder, error) from error


def _up_to_date(lora: SavedLora, base: Checkpoint) -> SavedLora:
    """With the names that the model has now: PEFT translates those of a LoRA as it loads it, and no others."""
    config = _config(lora, Target("additive", "auto", "none"))
    draft = SavedAdapter(lora.source, lora.folder, lora.revision, "", config, {}, lora.others)
    model = bare_model(base, [draft])
    own = copy.deepcopy(lora.config)
    convert_peft_config_for_transformers(own, model, None)
    if set(own.target_parameters or ()) != set(lora.config.target_parameters or ()):
        raise ValueError(
            f"{lora.source} adapts experts by the names that they had in transformers 4: load it with PEFT, save it "
            "again, and convert that."
        )
    stored = {f"{PREFIX}{name}": tensor for name, tensor in lora.tensors.items()}
    state = convert_peft_adapter_state_dict_for_transformers(model, own, stored, "default")
    return replace(lora, tensors={key.removeprefix(PREFIX): tensor for key, tensor in state.items()})


def _converted(module: str, low: Low, config: DLoRConfig) -> dict[str, Tensor]:
    experts = low.num_experts if low.num_experts > 1 else None
    A = low.A.flatten(1)
    try:
        form = _form(low, config)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    if experts is None:
        U, V = low.B.flatten(1), A.mT
    else:
        # (O, r, E) -> (E, O, r); (E, r, I) -> (E, I, r)
        U = low.B.unflatten(1, (low.r, experts)).permute(2, 0, 1)
        V = A.unflatten(0, (experts, low.r)).mT
    tensors = {"dlor_U": _scaled(U, low.scaling)[None], "dlor_V": V[None]}
    zeros = {name: U.new_zeros(shape) for name, shape in form.shapes.items() if name.startswith("dlor_diag")}
    return zeros | tensors


def _form(low: Low, config: DLoRConfig) -> Form:
    sides = ("output",) if low.is_embedding else ("input", "output", "both")
    form = Form.resolve(config, low.r, 1, low.A.shape[1], low.B.shape[0], sides, taps=prod(low.A.shape[2:]))
    return form.of_experts(low.num_experts) if low.num_experts > 1 else form


def _scaled(B: Tensor, scaling: float) -> Tensor:
    """scaling B in the dtype of B where that rounds nothing, and in float32 where it does."""
    wide = B.float() * scaling
    narrow = wide.to(B.dtype)
    return narrow if torch.equal(narrow.float(), wide) else wide


def _converted_dora(module: str, low: Low, weights: BaseWeights) -> dict[str, Tensor]:
    if low.is_embedding or low.is_conv:
        raise ValueError(f"{module} is a DoRA of an embedding or convolution, for which DLoR has no equal.")
    assert low.magnitude is not None
    W = weights.matrix(module)
    A, B, magnitude = (tensor.to(W.dtype) for tensor in (low.A, low.B, low.magnitude.flatten()))
    norm = (W + low.scaling * (B @ A)).norm(dim=1)
    if not norm.all():
        row = int((norm == 0).nonzero()[0])
        raise ValueError(f"{module}: row {row} of the weight with the LoRA is zero, and a DoRA divides by its norm.")
    D = magnitude / norm
    return {"dlor_diag": (D - 1)[None], "dlor_U": (low.scaling * D[:, None] * B)[None], "dlor_V": A.mT[None]}
