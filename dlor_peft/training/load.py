"""A trained adapter with the base model that it was trained on, from the folder that `dlor train` saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlor_peft.card import describe

from .schema import ModelSection, Recipe
from .tasks import task_class
from .tasks.base import BaseSource

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
    source = BaseSource(model, tokenizer, description["labels"], saved_modules(folder))
    return attach(task_class(description["task"]).load_base(source), folder), tokenizer


def saved_modules(folder: str | Path) -> list[str]:
    """The modules that the adapter trained and saved in full, so that a base needs no weights for them."""
    return getattr(PeftConfig.from_pretrained(str(folder)), "modules_to_save", None) or []


def attach(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The adapter in `folder` on `base`, in evaluation mode."""
    if not hasattr(base, "hf_device_map"):
        return PeftModel.from_pretrained(base, str(folder)).eval()
    # from_pretrained would take the placement apart, and write adapters of layers on disk beside the base's files
    model = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
    assert isinstance(model, PeftModel)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    return model.eval()
