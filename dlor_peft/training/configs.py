"""The two sections whose fields belong to other libraries, checked against the dataclasses that define them."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from . import checkpointing
from .processes import deepspeed_on_cpu
from .schema import Recipe
from .sources import suggest
from .tasks import task_class

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import TrainingArguments

TOP_LEVEL = ("output_dir", "seed")


def build_adapter_config(recipe: Recipe) -> PeftConfig:
    """The PEFT config of the adapter section; the task sets task_type where the recipe does not."""
    from peft import TaskType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {peft_type.value: config_class for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    peft_type = recipe.adapter.peft_type
    if peft_type not in known:
        raise ValueError(f"adapter.peft_type: {peft_type!r} is no registered PEFT method.{suggest(peft_type, known)}")
    values = _check_fields(known[peft_type], recipe.adapter.model_extra or {}, "adapter")
    values.setdefault("task_type", TaskType(task_class(recipe.task.type).peft_task_type))
    return _construct(known[peft_type], values, "adapter")


def build_training_arguments(recipe: Recipe, runs_here: bool = True) -> TrainingArguments:
    """The arguments of the task's trainer; checkpoints go to `<output_dir>/checkpoints`.

    Where nothing is to run here, a machine without an accelerator checks them for one that has it.
    """
    arguments_class = task_class(recipe.task.type).arguments_class()
    for name in TOP_LEVEL:
        if name in recipe.training:
            raise ValueError(f"training.{name}: set the top-level {name} instead, and drop this one.")
    if recipe.training.get("resume_from_checkpoint"):
        raise ValueError("training.resume_from_checkpoint: drop it, and run dlor train with --resume.")
    if recipe.training.get("save_only_model"):
        raise ValueError("training.save_only_model: a checkpoint without the optimizer cannot be resumed; drop it.")
    if recipe.training.get("hub_token"):
        raise ValueError("training.hub_token: a recipe is no place for a secret. Run hf auth login, or set HF_TOKEN.")
    for name in ("hub_strategy", "hub_always_push"):
        if name in recipe.training:
            raise ValueError(f"training.{name}: dlor train pushes once, the finished adapter; drop it.")
    values = _check_fields(arguments_class, checkpointing.renamed(recipe.training), "training")
    # a loss that is not finite is no loss to hide: `divergence` stops at it
    values.setdefault("logging_nan_inf_filter", False)
    checkpoints = Path(recipe.output_dir, "checkpoints")
    values |= deepspeed_on_cpu()
    if not runs_here and needs_accelerator(recipe):
        # transformers refuses such precision on a machine that has none
        values["use_cpu"] = True
    return _construct(arguments_class, {**values, "output_dir": str(checkpoints), "seed": recipe.seed}, "training")


def needs_accelerator(recipe: Recipe) -> bool:
    """Whether the recipe is for an accelerator, of which this machine has none."""
    return not recipe.training.get("use_cpu") and not torch.accelerator.is_available()


def describe(error: ValidationError, values: Any, section: str = "") -> str:
    """Pydantic's findings, one a line, each with its dotted key and the value that was given."""
    lines = []
    for found in error.errors():
        loc = list(found["loc"])
        if found["type"] == "unknown_key":
            loc.append(found.get("ctx", {})["key"])
        key = ".".join([section] * bool(section) + _path_in(values, loc))
        problem = found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            problem = "required, but not given"
        elif found["type"] not in ("unknown_key", "value_error"):
            problem = f"{problem}, but it is {found['input']!r}"
        lines.append(f"{key}: {problem.rstrip('.')}." if key else f"{problem.rstrip('.')}.")
    return "\n".join(lines)


def _path_in(values: Any, loc: list[Any]) -> list[str]:
    # pydantic puts names of union members between the keys: keep what the recipe really holds, and the last part
    path = []
    for index, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        if inside or (index == len(loc) - 1 and isinstance(values, dict)):
            path.append(str(part))
            values = values[part] if inside else None
    return path


def _check_fields(config_class: type, values: dict[str, Any], section: str) -> dict[str, Any]:
    """`values` in the types of the dataclass's hints; unknown fields are an error that says how to drop them."""
    known = {field.name for field in dataclasses.fields(config_class) if field.init} - {"peft_type", *TOP_LEVEL}
    if unknown := [name for name in values if name not in known]:
        first = unknown[0]
        raise ValueError(
            f"{', '.join(f'{section}.{name}' for name in unknown)}: no field of {config_class.__name__}. To drop, add "
            f"{' '.join(f'{section}.{name}=' for name in unknown)} on the command line.{suggest(first, known)}"
        )
    hints = typing.get_type_hints(config_class)
    fields: dict[str, Any] = {name: (hints[name], ...) for name in values}
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    checker: type[BaseModel] = create_model(config_class.__name__, __config__=config, **fields)
    try:
        # strict JSON rules suit YAML: 1 is a float and a list a set, but "1" is no number and true no integer
        checked = checker.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ValueError(describe(error, values, section)) from error
    return {name: getattr(checked, name) for name in values}


def _construct(config_class: type, values: dict[str, Any], section: str) -> Any:
    try:
        return config_class(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"{section}: {config_class.__name__} does not accept these values: {error}") from error
