"""Activation checkpointing by the name that the installed transformers has; the former is gradient checkpointing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import TrainingArguments

NAME = "activation_checkpointing"
FORMER = "gradient_checkpointing"

_in_use = NAME if hasattr(PreTrainedModel, f"{NAME}_enable") else FORMER


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Training arguments with the name that the installed transformers knows."""
    return {
        name.replace(NAME, _in_use) if name in (NAME, f"{NAME}_kwargs") else name: value
        for name, value in values.items()
    }


def is_on(arguments: TrainingArguments) -> bool:
    return bool(getattr(arguments, _in_use))


def switch_off(model: PreTrainedModel) -> None:
    getattr(model, f"{_in_use}_disable")()


def switch_on(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    """As the Trainer does with these arguments."""
    getattr(model, f"{_in_use}_enable")(getattr(arguments, f"{_in_use}_kwargs"))
