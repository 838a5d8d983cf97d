"""A row as a trainer has encoded it, for the eye."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained."""

MAX_TOKENS = 600
MARKS = (">>", "<<")
COLOUR = ("\x1b[32m", "\x1b[0m")


def show_row(tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any]) -> str:
    """The fields of a batch of one row: token ids as text, all else as it is.

    Where labels stand beside the tokens of `input_ids`, those that are trained are between marks, in colour on a
    terminal.
    """
    labels, input_ids = batch.get("labels"), batch.get("input_ids")
    is_masked = isinstance(labels, Tensor) and isinstance(input_ids, Tensor) and labels.shape == input_ids.shape
    lines = []
    for name, value in batch.items():
        if name.endswith("attention_mask") or (is_masked and name == "labels"):
            continue
        if is_masked and name == "input_ids":
            lines.append(show_tokens(tokenizer, value[0], batch["labels"][0] != IGNORED))
        elif name.endswith("input_ids") or (name == "labels" and isinstance(value, Tensor) and value.ndim == 2):
            lines.append(f"{name}: {_decode(tokenizer, value[0][value[0] != IGNORED].tolist())}")
        elif isinstance(value, Tensor) and value.numel() == 1:
            lines.append(f"{name}: {value.item()}")
    return "\n".join(lines)


def show_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, is_trained: Tensor) -> str:
    """The text of the tokens (n,), with marks around those where `is_trained` (n,)."""
    start, end = COLOUR if sys.stdout.isatty() else MARKS
    where = "in colour" if start == COLOUR[0] else f"between {start} and {end}"
    text = ""
    pairs = zip(tokens.tolist(), is_trained.tolist(), strict=True)
    for marked, run in groupby(pairs, key=lambda pair: pair[1]):
        piece = _decode(tokenizer, [token for token, _ in run])
        text += f"{start}{piece}{end}" if marked else piece
    return f"{len(tokens)} tokens, {int(is_trained.sum())} of them trained, {where}:\n{text}"


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    if len(tokens) <= MAX_TOKENS:
        return str(tokenizer.decode(tokens))
    half = MAX_TOKENS // 2
    left_out = f" ... ({len(tokens) - MAX_TOKENS} more tokens) ... "
    return f"{tokenizer.decode(tokens[:half])}{left_out}{tokenizer.decode(tokens[-half:])}"
