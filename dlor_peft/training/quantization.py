"""The section `model.quantization`, checked against the class whose arguments it holds."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .sources import suggest

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def build_quantization(values: dict[str, Any]) -> BitsAndBytesConfig | None:
    """The config of the frozen weights' quantisation; None without values.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: an argument that BitsAndBytesConfig does not have or accept, or values that quantise nothing.
    """
    if not values:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError("model.quantization needs bitsandbytes: install dlor-peft with its extra 'quantization'")
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    if unknown := [name for name in values if name not in known]:
        raise ValueError(
            f"{', '.join(f'model.quantization.{name}' for name in unknown)}: no field of BitsAndBytesConfig."
            f"{suggest(unknown[0], known)}"
        )
    try:
        config = BitsAndBytesConfig(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"model.quantization: BitsAndBytesConfig does not accept these values: {error}") from error
    if not config.is_quantizable():
        raise ValueError("model.quantization quantises nothing: set load_in_4bit or load_in_8bit to true.")
    return config
