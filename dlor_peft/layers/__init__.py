"""The layers that carry adapters, one class for each kind of base layer."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .attention import MultiheadAttention, UncalledLinear
from .base import DLoRLayer, owned_adapters
from .conv import Conv
from .embedding import Embedding
from .linear import Linear
from .parameter import ParamWrapper

__all__ = ["DLoRLayer", "ParamWrapper", "layer_class", "owned_adapters"]

# the first match counts
_CLASSES: tuple[tuple[type[nn.Module], type[DLoRLayer]], ...] = (
    (NonDynamicallyQuantizableLinear, UncalledLinear),
    (nn.Linear, Linear),
    (Conv1D, Linear),
    (nn.Conv1d, Conv),
    (nn.Conv2d, Conv),
    (nn.Conv3d, Conv),
    (nn.Embedding, Embedding),
    (nn.MultiheadAttention, MultiheadAttention),
)


def layer_class(target: nn.Module, **quantization_kwargs: Any) -> type[DLoRLayer]:
    """The class of the layer that adapts `target`, which may carry adapters of another method.

    ValueError where there is none.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for kind, adapted in _CLASSES:
        if isinstance(base_layer, kind):
            return adapted
    backend = resolve_quantization_backend(base_layer, **quantization_kwargs)
    if backend is not None and backend.layer_type == "linear":
        return Linear
    names = ", ".join(kind.__name__ for kind, _ in _CLASSES[1:])
    raise ValueError(
        f"dlor_peft.layers: a {type(base_layer).__name__} is not adapted by DLoR. It adapts {names}, and the linear "
        "layers of PEFT's quantisation backends: name only such layers in target_modules, keep this one out with "
        "exclude_modules, train it in full through modules_to_save, or name its weights in target_parameters."
    )
