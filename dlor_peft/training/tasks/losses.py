"""The cross-entropy of a step: over the items of all its batches, on however many devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import TrainingArguments


def cross_entropy(arguments: TrainingArguments) -> Callable[..., Tensor]:
    """A Trainer's `compute_loss_func`: sum over the labels that are not -100 / `num_items_in_batch`.

    Models with a loss of their own take the mean of each batch, which the Trainer does not divide by the number of
    batches in a step where they accept any keyword.
    """

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float().flatten(0, -2)
        reduction = "mean" if num_items_in_batch is None else "sum"
        smoothing = arguments.label_smoothing_factor
        loss = F.cross_entropy(logits, labels.flatten(), reduction=reduction, label_smoothing=smoothing)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    return compute
