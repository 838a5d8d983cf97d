"""All rows of a split, on every process: what is measured does not depend on their number."""

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


def evaluate(trainer: Any, rows: Any) -> dict[str, float]:
    """The Trainer's own metrics of a split, which begin with `test_`.

    Each process runs all rows. Over shares of them the Trainer's averages weigh rows by the tokens of those that other
    processes have at the same time, and sentence-transformers counts rows twice that fill a share up.
    """
    if trainer.args.world_size == 1:
        return trainer.evaluate(rows, metric_key_prefix="test")
    sharded = trainer.get_eval_dataloader

    def whole(rows: Any) -> Any:
        loader = sharded(rows)
        # Accelerate's shard of the batches is all of them
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    trainer.get_eval_dataloader = whole
    # all copies of each value; gather_for_metrics would cut those of the last batch
    trainer.gather_function = trainer.accelerator.gather
    try:
        return trainer.evaluate(rows, metric_key_prefix="test")
    finally:
        del trainer.get_eval_dataloader


def run_batches(
    function: Callable[..., torch.Tensor],
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> torch.Tensor:
    """function(input_ids=..., attention_mask=..., ...) of every row: (rows, ...) float32 on the CPU, in row order.

    In the precision of the model's weights, in batches of similar length.
    """
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    outputs = []
    with torch.no_grad():
        for start in range(0, len(order), BATCH_SIZE):
            batch = collate([rows[index] for index in order[start : start + BATCH_SIZE]])
            outputs.append(function(**{name: tensor.to(device) for name, tensor in batch.items()}).float().cpu())
    ordered = torch.cat(outputs)
    return torch.empty_like(ordered).index_copy_(0, torch.tensor(order), ordered)
