"""What the folder of a merged model holds besides its weights: configuration, tokenizer, chat template, card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from .adapter import SavedAdapter
from .checkpoint import Checkpoint
from .writing import copy_tokenizer, matches, write_json

RECORD = "dlor_merge.json"

# of the base's folder: weights, and what is written anew
_NOT_COPIED = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5",
    "*.msgpack", "*.onnx", "*.gguf", "*.ot", "config.json", "README.md", "adapter_config.json", ".*", RECORD,
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"


def write_surroundings(
    folder: Path,
    base: Checkpoint,
    adapters: Sequence[SavedAdapter],
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    is_untied: bool,
) -> None:
    """Write them to `folder`: the base's files, the tokenizer of an adapter that has one, the merged configuration.

    Args:
        folder: that of the merged model.
        base: the model that was merged into.
        adapters: what was merged; the tokenizer of the last one that has one counts.
        model: one of the merged model's class and configuration.
        dtype: that of the weights; that of the base where None.
        is_untied: whether weights that the base ties are stored apart.
    """
    for path in base.folder.path.iterdir():
        if path.is_file() and not matches(path.name, _NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
        elif path.name == _TEMPLATES:
            shutil.copytree(path, folder / path.name)
    for adapter in adapters:
        copy_tokenizer(adapter.folder, folder)
    write_json(folder / "config.json", _config(base.config, model, dtype, is_untied))
    _card(base, adapters).save(folder / "README.md")


def _config(before: dict[str, Any], model: PreTrainedModel, dtype: torch.dtype | None, is_untied: bool) -> Any:
    """That of the base as it was written, fields that transformers does not know included, and what has changed."""
    config, now = dict(before), model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    nested = [key for key in now if isinstance(now[key], dict) and isinstance(config.get(key), dict)]
    for section, current in [(config, now), *((config[key], now[key]) for key in nested)]:
        if is_untied and section.get("tie_word_embeddings", section is config):
            section["tie_word_embeddings"] = False
        if "vocab_size" in section and "vocab_size" in current:
            section["vocab_size"] = current["vocab_size"]
    if "id2label" in now and len(config.get("id2label") or ("", "")) != model.config.num_labels:
        config["id2label"], config["label2id"] = now["id2label"], now["label2id"]
    return config


def _card(base: Checkpoint, adapters: Sequence[SavedAdapter]) -> ModelCard:
    data = ModelCardData(library_name="transformers", tags=["dlor", "merged"])
    if not Path(base.folder.source).is_dir():
        data.base_model = base.folder.source
    listed = "\n".join(f"{at}. {adapter.source}" for at, adapter in enumerate(adapters, 1))
    text = (
        f"# Merged model\n\nThe weights of {base.folder.source} with these DLoR adapters merged into them, in this "
        f"order:\n\n{listed}\n\nIt loads with transformers alone. `{RECORD}` says what was merged, and how much of "
        "each update is left after rounding.\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
