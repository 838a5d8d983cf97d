"""A trained adapter with the base model that it was trained on, from the folder that `dlor train` saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dlor_peft.card import describe

from .schema import ModelSection, Recipe
from .tasks import task_class

BASE = "dlor_base.json"


def save_base(folder: Path, recipe: Recipe, labels: list[str] | None, training: dict[str, str]) -> None:
    """Add to a saved adapter what `load_trained` needs, and to its card how to call it and how it was trained."""
    description = {"task": recipe.task.type, "model": recipe.model.model_dump(mode="json"), "labels": labels}
    (folder / BASE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    describe(folder, task_class(recipe.task.type).usage(recipe.model), training)


def read_base(folder: str | Path) -> dict[str, Any]:
    """The task, the model section and the labels that `save_base` wrote.

    Raises:
        FileNotFoundError: the folder is not the adapter of a `dlor train` run.
    """
    file = Path(folder, BASE)
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {BASE}: give the folder `adapter` of a dlor train run.")
    return json.loads(file.read_text(encoding="utf-8"))


def load_trained(folder: str | Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter in `folder` on a fresh base model, in evaluation mode, and the tokenizer.

    A classifier's labels are in `model.config.id2label`. Of an embedding model it is the transformer; the adapter's
    card says how the whole of it is loaded.

    Raises:
        FileNotFoundError: the folder is not the adapter of a `dlor train` run.
    """
    description = read_base(folder)
    model = ModelSection.model_validate(description["model"])
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    saved = PeftConfig.from_pretrained(str(folder)).modules_to_save  # pyright: ignore[reportAttributeAccessIssue]
    base = task_class(description["task"]).load_base(model, tokenizer, description["labels"], saved or ())
    return PeftModel.from_pretrained(base, str(folder)).eval(), tokenizer
