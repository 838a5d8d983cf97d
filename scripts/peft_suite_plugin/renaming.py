"""LoRA's names in the strings of a test, as DLoR's."""

from __future__ import annotations

import re
from types import CodeType, FunctionType
from typing import Any

from dlor_peft.layers import attention, conv, embedding, linear, parameter

from .reach import written

LAYERS = {
    "Linear": linear.Linear,
    "Conv1d": conv.Conv,
    "Conv2d": conv.Conv,
    "Conv3d": conv.Conv,
    "Embedding": embedding.Embedding,
    "MultiheadAttention": attention.MultiheadAttention,
    "ParamWrapper": parameter.ParamWrapper,
}
"""DLoR's layers by the names of LoRA's."""

_FACTORS = re.compile(r"\blora_(?:embedding_)?([AB])\b")
# in alphabetical order, as some tests sort them
_FACTOR_NAMES = {"A": "dlor_U", "B": "dlor_V"}
# a parameter itself, where DLoR has a module with a weight
_EMBEDDING_FACTOR = re.compile(r"\blora_embedding_([AB])\.(\w+)$")
_CLASS_PATH = re.compile(r"\bpeft\.tuners\.lora\.layer\.(\w+)")
_REPR = re.compile(rf"\blora\.({'|'.join(LAYERS)})\b")
_METHOD = re.compile(r"\bLORA\b")
# as whole strings
_WHOLE = {"lora": "dlor", "lora_": "dlor_", "LoraModel": "DLoRModel"}


def names_factors(text: str) -> bool:
    """Whether a string names one of LoRA's two factors."""
    return _FACTORS.search(text) is not None


def rename(text: str) -> str:
    """A string of a test with DLoR's names in it."""
    text = _WHOLE.get(text, text)
    text = _EMBEDDING_FACTOR.sub(lambda match: f"{_FACTOR_NAMES[match[1]]}.{match[2]}.weight", text)
    text = _FACTORS.sub(lambda match: _FACTOR_NAMES[match[1]], text)
    text = _CLASS_PATH.sub(lambda match: _path(LAYERS.get(match[1]), match[0]), text)
    return _REPR.sub(lambda match: f"dlor.{LAYERS[match[1]].__name__}", _METHOD.sub("DLOR", text))


def rename_strings(test: FunctionType) -> None:
    """Rename in all string constants of a function."""
    test = written(test)
    test.__code__ = _renamed(test.__code__)


def _path(cls: type | None, otherwise: str) -> str:
    return f"{cls.__module__}.{cls.__name__}" if cls is not None else otherwise


def _renamed(constant: Any) -> Any:
    if isinstance(constant, str):
        return rename(constant)
    if isinstance(constant, tuple | frozenset):
        return type(constant)(map(_renamed, constant))
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=tuple(map(_renamed, constant.co_consts)))
    return constant
