"""What a data set's rows must be: values that are there and of the right kind, and no longer than the model reads."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from .schema import Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

NUMBERS = ("label", "score")
"""Roles whose values may be numbers."""


def source_of(recipe: Recipe, split: str) -> str:
    """Where a split's rows are from, as an error names it."""
    file = recipe.data.files.get(split)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return f"data.files.{split}: {file}" if file else f"data.dataset: {recipe.data.dataset}, its {split} split"


def check_values(rows: Dataset, where: str) -> None:
    """Every column, named by its role, has a value in every row; where it is text, the values are.

    Raises:
        ValueError: names the first row that is not so, counted from 1.
    """
    for role, feature in rows.features.items():
        is_text = getattr(feature, "dtype", None) in ("string", "large_string")
        # text of one type throughout is known to arrow, the number of empty places too
        if is_text and not rows.with_format("arrow")[:][role].null_count:
            continue
        for row, value in enumerate(rows[role], 1):
            if value is None:
                raise ValueError(f"{where}: row {row} has no {role}.")
            if role not in NUMBERS and not isinstance(value, (str, list, dict)):
                raise ValueError(f"{where}: {role} must be text, but row {row} has {value!r}.")


def check_lengths(trainer: Trainer, recipe: Recipe) -> None:
    """No row has more tokens than the model has positions; rows that were cut to the greatest length are counted.

    Raises:
        ValueError: names the first row that is too long, counted from 1.
    """
    model: Any = trainer.model
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = {
        "training.max_length": getattr(trainer.args, "max_length", None),
        "the model's max_seq_length": getattr(model, "max_seq_length", None),
        "the tokenizer's model_max_length": getattr(trainer.processing_class, "model_max_length", None),
    }
    packed = getattr(trainer.args, "packing", False)
    for split, rows in (("train", trainer.train_dataset), ("dev", trainer.eval_dataset)):
        lengths = _lengths(rows, model)
        if lengths is None:
            continue
        where = source_of(recipe, split)
        if not lengths:
            raise ValueError(
                f"{where}: no row is left: all are longer than training.max_length "
                f"({limits['training.max_length']} tokens). Raise it."
            )
        if positions and (long := [row for row, length in enumerate(lengths, 1) if length > positions]):
            raise ValueError(
                f"{where}: {len(long)} of {len(lengths)} rows are longer than the {positions} positions of the model, "
                f"the first is row {long[0]} with {lengths[long[0] - 1]} tokens. Shorten them, or have them cut: "
                f"training.max_length={positions} (sft), or the tokenizer's model_max_length."
            )
        for name, limit in limits.items():
            full = [row for row, length in enumerate(lengths, 1) if length == limit]
            if full and not packed:
                warnings.warn(
                    f"{where}: {len(full)} of {len(lengths)} rows fill {name} ({limit} tokens), the first is row "
                    f"{full[0]}: what they have beyond it is cut off.",
                    stacklevel=2,
                )
                break


def _lengths(rows: Any, model: Any) -> list[int] | None:
    """The tokens of each row; of a preference those of its longer answer, with the prompt; of texts that are compared
    those of the longest. None where there are no rows."""
    columns = getattr(rows, "column_names", None) or ()
    if "input_ids" in columns:
        return [len(ids) for ids in rows["input_ids"]]
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(columns):
        parts = (rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"])
        return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*parts, strict=True)]
    if columns and hasattr(model, "max_seq_length"):
        # sentence-transformers encodes batch by batch, and cuts as it does
        limit = model.max_seq_length
        texts = [rows[name][:] for name in columns if name not in NUMBERS]
        encoded = [model.tokenizer(text, truncation=limit is not None, max_length=limit).input_ids for text in texts]
        return [max(map(len, row)) for row in zip(*encoded, strict=True)]
    return None
