"""A function of the model over all rows of a split, in batches of similar length, in the precision of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

BATCH_SIZE = 64


def without_autocast(model: Any) -> Any:
    """The model itself; a trainer that trained it in mixed precision left its `forward` under autocast."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def run_batches(
    function: Callable[..., torch.Tensor],
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """function(input_ids=..., attention_mask=..., ...) of every row: (rows, ...) float32 on the CPU, in row order."""
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    outputs = []
    with torch.no_grad():
        for start in range(0, len(order), BATCH_SIZE):
            batch = collate([rows[index] for index in order[start : start + BATCH_SIZE]])
            outputs.append(function(**{name: tensor.to(device) for name, tensor in batch.items()}).float().cpu())
    ordered = torch.cat(outputs)
    return torch.empty_like(ordered).index_copy_(0, torch.tensor(order), ordered)
