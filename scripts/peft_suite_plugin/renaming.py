"""LoRA's names in the strings and the attributes that a test uses, as DLoR's."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
# LoRA adds B A, and DLoR U V^T
_FACTOR_NAMES = {"A": "dlor_V", "B": "dlor_U"}
_OTHER_WAY = {"A": "dlor_U", "B": "dlor_V"}
# parameters themselves, which the other way round are as large as DLoR's
_EMBEDDING_ATTRIBUTES = {"lora_embedding_A": "_transposed_V", "lora_embedding_B": "_transposed_U"}
# a parameter itself, where DLoR has a module with a weight
_EMBEDDING_FACTOR = re.compile(r"\blora_embedding_([AB])\.(\w+)$")
_CLASS_PATH = re.compile(r"\bpeft\.tuners\.lora\.layer\.(\w+)")
_REPR = re.compile(rf"\blora\.({'|'.join(LAYERS)})\b")
_METHOD = re.compile(r"\bLORA\b")
# as whole strings
_WHOLE = {"lora": "dlor", "lora_": "dlor_", "LoraModel": "DLoRModel"}


def names_factors(text: str) -> bool:
    """Whether a string, or an attribute, names one of LoRA's two factors."""
    return _FACTORS.search(text) is not None


def rename(text: str, factors: Mapping[str, str] = _FACTOR_NAMES) -> str:
    """A string of a test with DLoR's names in it."""
    text = _WHOLE.get(text, text)
    text = _EMBEDDING_FACTOR.sub(lambda match: f"{factors[match[1]]}.{match[2]}.weight", text)
    text = _FACTORS.sub(lambda match: factors[match[1]], text)
    text = _CLASS_PATH.sub(lambda match: _path(LAYERS.get(match[1]), match[0]), text)
    return _REPR.sub(lambda match: f"dlor.{LAYERS[match[1]].__name__}", _METHOD.sub("DLOR", text))


def rename_in(test: FunctionType) -> None:
    """Rename in all string constants, and the attributes, of a function."""
    test = written(test)
    names = set(test.__code__.co_names)
    # to keep their order, or because a head that is tied to an embedding has its factors, by the names that they have
    # in the embedding, which is transposed
    other_way = "sorted" in names or {"lora_embedding_A", "lora_A"} <= names
    factors = _OTHER_WAY if other_way else _FACTOR_NAMES
    test.__code__ = _renamed(test.__code__, factors)


def _path(cls: type | None, otherwise: str) -> str:
    return f"{cls.__module__}.{cls.__name__}" if cls is not None else otherwise


def _renamed(constant: Any, factors: Mapping[str, str]) -> Any:
    if isinstance(constant, str):
        return rename(constant, factors)
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_renamed(item, factors) for item in constant)
    if isinstance(constant, CodeType):
        return constant.replace(
            co_consts=tuple(_renamed(item, factors) for item in constant.co_consts),
            co_names=tuple(_attribute(name, factors) for name in constant.co_names),
        )
    return constant


def _attribute(name: str, factors: Mapping[str, str]) -> str:
    return _EMBEDDING_ATTRIBUTES.get(name) or (rename(name, factors) if _FACTORS.fullmatch(name) else name)
