"""From a recipe's name and overrides to a checked `Recipe`, and back to YAML that says where each value is from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .configs import build_adapter_config, build_training_arguments, describe
from .quantization import build_quantization
from .schema import Recipe
from .sources import COMMAND_LINE, Sources, find_recipe
from .tasks import task_class


def load_recipe(name: str, overrides: Iterable[str] = (), runs_here: bool = True) -> tuple[Recipe, Sources]:
    """The checked recipe, and the origin of each of its values; `runs_here` as in `build_training_arguments`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a key or value that is not allowed; the message begins with its dotted key.
    """
    recipe, sources = parse_recipe(name, overrides)
    build_quantization(recipe.model.quantization)
    build_adapter_config(recipe)
    build_training_arguments(recipe, runs_here)
    return recipe, sources


def parse_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[Recipe, Sources]:
    """`load_recipe` without the checks that other libraries make, which may touch a device."""
    sources = Sources(find_recipe(name), overrides)
    _anchor_paths(sources)
    try:
        recipe = Recipe.model_validate_json(json.dumps(sources.values), strict=True)
    except TypeError as error:
        raise ValueError(f"{sources.path}: a value is neither text, number, list nor mapping: {error}") from error
    except ValidationError as error:
        raise ValueError(describe(error, sources.values)) from error
    return recipe, sources


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: every path absolute, so that it runs from anywhere."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=119)


def explain(recipe: Recipe, sources: Sources) -> str:
    """The resolved recipe as YAML, each value with its origin; the adapter's defaults are those of its PEFT config."""
    from peft import PeftConfig

    config = build_adapter_config(recipe)
    values = recipe.model_dump(mode="json")
    bookkeeping = {field.name for field in dataclasses.fields(PeftConfig)} - {"task_type"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in bookkeeping and value not in (None, {}, []):
            values["adapter"].setdefault(field.name, value)
    lines = list(_lines(values, sources))
    width = min(60, max(len(line) for line, _ in lines if line))
    text = "\n".join(f"{line:<{width}}  # {origin}" if origin else line for line, origin in lines)
    arguments = task_class(recipe.task.type).arguments_class().__name__
    others = f"all other fields keep the defaults of {arguments}, but logging_nan_inf_filter is false"
    return f"# {sources.path}\n{text}\n# training: {others}"


def _lines(values: dict[str, Any], sources: Sources, prefix: str = "") -> Iterator[tuple[str, str]]:
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _lines(value, sources, f"{prefix}{name}.")
        else:
            yield f"{indent}{name}: {_inline(value)}", sources.origin(f"{prefix}{name}")


def _inline(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    elif not isinstance(value, (str, int, float, list, dict, type(None))):
        value = str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _anchor_paths(sources: Sources) -> None:
    # a relative path is relative to where it was written
    def anchor(section: dict[str, Any], name: str, key: str) -> None:
        if isinstance(section[name], str):
            folder = Path.cwd() if sources.origin(key) == COMMAND_LINE else sources.path.parent
            section[name] = str((folder / Path(section[name]).expanduser()).resolve())

    model, data = sources.values.get("model"), sources.values.get("data")
    if isinstance(model, dict) and str(model.get("path")).startswith((".", "~", "/")):
        anchor(model, "path", "model.path")
    if isinstance(model, dict) and "offload_folder" in model:
        anchor(model, "offload_folder", "model.offload_folder")
    if isinstance(data, dict) and isinstance(data.get("files"), dict):
        for name in data["files"]:
            anchor(data["files"], name, f"data.files.{name}")
