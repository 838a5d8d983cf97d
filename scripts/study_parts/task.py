"""What every task of the study has: a model, rows, a loss, a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sources import Sources

EVAL_BATCH = 128
SORTED_TOGETHER = 4
"""Batches whose rows are drawn together and sorted by length, which spares half of the padding."""


class Task(ABC):
    """One model on one data set. `seed` draws the head, the rows where few are taken, and their order."""

    headline: ClassVar[str]
    batch_size: ClassVar[int] = 16
    head: ClassVar[str | None] = None
    """The module beside the adapter that is trained in full, at a learning rate of its own."""

    head_lr: ClassVar[float] = 5e-3

    def __init__(self, sources: Sources, steps: int) -> None:
        self.sources, self.steps = sources, steps

    @abstractmethod
    def build(self, seed: int) -> PreTrainedModel: ...

    @abstractmethod
    def rows(self, split: str, seed: int) -> list[Any]: ...

    @abstractmethod
    def loss(self, model: nn.Module, rows: list[Any]) -> Tensor: ...

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]: ...

    @abstractmethod
    def length(self, row: Any) -> int:
        """Its tokens: rows of similar length share a batch."""

    @property
    def setting(self) -> dict[str, Any]:
        """What a run was trained by, besides what its key says."""
        return {"steps": self.steps, "batch_size": self.batch_size, "head_lr": self.head_lr if self.head else None}

    def forgotten(self, model: nn.Module) -> float | None:
        """The loss on what the base was trained on, where that is known."""
        return None

    def targets(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """The layers that are adapted, all linear ones but the head: name -> (in_features, out_features)."""
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        return {
            name: (layer.in_features, layer.out_features)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not output and name != self.head
        }

    def batches(self, seed: int) -> Any:
        """`steps` batches of training rows, the same for every method."""
        rows = self.rows("train", seed)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for _ in range(self.steps // SORTED_TOGETHER):
            while len(order) < self.batch_size * SORTED_TOGETHER:
                order += torch.randperm(len(rows), generator=generator).tolist()
            together = sorted(order[: self.batch_size * SORTED_TOGETHER], key=lambda index: self.length(rows[index]))
            del order[: self.batch_size * SORTED_TOGETHER]
            for place in torch.randperm(SORTED_TOGETHER, generator=generator).tolist():
                yield [rows[index] for index in together[place * self.batch_size : (place + 1) * self.batch_size]]


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def by_length(rows: list[Any], length: Any) -> list[list[int]]:
    """Batches of indices of rows of similar length."""
    order = sorted(range(len(rows)), key=lambda index: length(rows[index]))
    return [order[start : start + EVAL_BATCH] for start in range(0, len(order), EVAL_BATCH)]
