"""What a recipe can train for. A task is a module here, its section in `schema.py`, and its line below."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Task

_HOME = {
    "text-classification": "classification.ClassificationTask",
    "sft": "sft.SftTask",
    "dpo": "dpo.DpoTask",
    "seq2seq": "seq2seq.Seq2SeqTask",
    "embedding": "embedding.EmbeddingTask",
}


def task_class(type: str) -> type[Task[Any]]:
    """The class for the `task.type` of a recipe. Its libraries are loaded only now."""
    module, _, name = _HOME[type].partition(".")
    return getattr(import_module(f"{__name__}.{module}"), name)
