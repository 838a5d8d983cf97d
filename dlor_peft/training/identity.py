"""An architecture without a checkpoint: W = I_{OxI} (the rectangular identity), b = 0, in every linear layer.

Under such a layer an adapter is the whole matrix. DLoR's mode "scaled" makes it alpha I + U V^T with alpha = 1 +
delta, the matrix of the paper (arXiv 2605.05659); LoRA makes it I + U V^T, alpha fixed at 1.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def embeddings(model: PreTrainedModel) -> list[str]:
    """The names of the weights of the input embeddings and of the output layer."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [f"{name}.weight" for name, module in model.named_modules() if module in modules]


def build_identity(
    auto_class: Any, config: PretrainedConfig, dtype: str, saved: Collection[str]
) -> tuple[PreTrainedModel, list[str]]:
    """The model in evaluation mode, and the names of the weights in it that were drawn at random.

    The output layer, and every linear layer in a module of `saved` (a part of its name), keep the start that the
    architecture gives them. A constant is not random: a norm's ones are the same at every load.
    """
    # no checkpoint to merge into: what an adapter on these weights records as its base must not name one
    config.name_or_path = ""
    model = auto_class.from_config(config, **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)})).eval()
    output = model.get_output_embeddings()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not output and not set(saved) & set(name.split(".")):
                nn.init.eye_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
    # a tied weight stands under each of its names, as PEFT saves it under each
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return model, [name for name, value in parameters.items() if name not in frozen and value.min() != value.max()]
