"""A config class of PEFT, as the suite sees it: a name that means DLoRConfig and understands the class's arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any
from unittest import mock

import peft
import pytest

from dlor_peft import DLoRConfig

ONLY_LORA = "asks for what only LoRA has"
"""How the reason starts why a test is left out once it has come that far."""

_KNOWN = {field.name for field in fields(DLoRConfig)}
_WRITTEN_BY_PEFT = {"peft_type", "peft_version", "runtime_config", "auto_mapping"}
_RENAMED = {"lora_dropout": "dlor_dropout", "init_lora_weights": "init_weights"}
# LoRA's scale is lora_alpha / r, DLoR's is 1: most tests that set it do not depend on it
_WITHOUT_COUNTERPART = {"lora_alpha"}
_LORAS_DEFAULTS = {field.name: getattr(peft.LoraConfig(), field.name) for field in fields(peft.LoraConfig)}
# LoRA's alpha by default, too
_DEFAULT_RANK = DLoRConfig().r
ONLY_LORAS = frozenset(set(_LORAS_DEFAULTS) - _KNOWN - _WITHOUT_COUNTERPART - set(_RENAMED))
"""Names of LoraConfig's arguments that mean nothing to DLoR."""

form: dict[str, Any] = {}
"""Arguments that every config gets besides those that the running test gives."""

_reads_scale = ContextVar("_reads_scale", default=False)


@contextmanager
def running(form_of_test: Mapping[str, Any], reads_scale: bool) -> Iterator[None]:
    """Configs made while a test runs get a form, and may not ask for a scale where the test looks at it."""
    token = _reads_scale.set(reads_scale)
    try:
        with mock.patch.dict(form, form_of_test):
            yield
    finally:
        _reads_scale.reset(token)


class OnlyLora(Exception):
    """The arguments ask for something that DLoR has not."""


def translate(arguments: Mapping[str, Any], place: type = peft.LoraConfig) -> dict[str, Any]:
    """Arguments of the config class `place` as arguments of DLoRConfig; those of DLoRConfig pass through.

    What another method than LoRA names differently is about that method, and is dropped.

    Raises:
        OnlyLora: an argument of LoRA means nothing to DLoR.
    """
    translated = {}
    for name, value in arguments.items():
        if name == "init_lora_weights" and not isinstance(value, bool):
            raise OnlyLora(f"init_lora_weights={value!r}")
        if name == "bias" and isinstance(value, str) and value.endswith("_only"):
            value = "dlor_only"
        name = _RENAMED.get(name, name)
        if name in _KNOWN:
            translated[name] = value
        elif place is peft.LoraConfig and name not in _WITHOUT_COUNTERPART and value != _LORAS_DEFAULTS.get(name):
            raise OnlyLora(name)
    return translated


def translate_config(config: peft.LoraConfig, form: Mapping[str, Any]) -> DLoRConfig:
    """The DLoRConfig of one form that asks for what a LoraConfig asks for.

    Raises:
        OnlyLora: the LoraConfig asks for something that DLoR has not.
    """
    changed = {
        name: getattr(config, name)
        for name, default in _LORAS_DEFAULTS.items()
        if name not in _WRITTEN_BY_PEFT and getattr(config, name) != default
    }
    return DLoRConfig(**{**translate(changed), **form})


class _MeansDLoR(type):
    """Calls, comparisons and attribute look-ups of a stand-in go to DLoRConfig."""

    place: type

    def __call__(cls, **arguments: Any) -> DLoRConfig:
        try:
            if _reads_scale.get() and arguments.get("lora_alpha", _DEFAULT_RANK) != arguments.get("r", _DEFAULT_RANK):
                raise OnlyLora("lora_alpha")
            translated = translate(arguments, cls.place)
        except OnlyLora as argument:
            pytest.skip(f"{ONLY_LORA}: {argument}")
        return DLoRConfig(**{**form, **translated})

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, DLoRConfig)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, DLoRConfig)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is DLoRConfig

    def __hash__(cls) -> int:
        return hash(DLoRConfig)

    def __getattr__(cls, name: str) -> Any:
        return getattr(DLoRConfig, name)


def stand_in(place: type) -> type:
    """What takes the place of a config class: equal to DLoRConfig wherever a test compares the classes of configs."""
    return _MeansDLoR(place.__name__, (), {"place": place, "__doc__": f"DLoRConfig in the place of {place.__name__}."})


LoraConfig = stand_in(peft.LoraConfig)
