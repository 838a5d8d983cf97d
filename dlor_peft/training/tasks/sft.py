"""Supervised fine-tuning of a causal language model with TRL: the test loss, and greedy continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..optimiser import with_optimizer
from .batches import evaluate
from .causal import CausalTask
from .generation import Generation

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

PROMPT_TOKENS = 16


class SftTask(CausalTask):
    """The loss of a conversation is that of all its tokens, or with training.assistant_only_loss of the answers."""

    headline = "loss"
    columns = (("text",), ("prompt", "completion"), ("messages",))

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

        return SFTConfig

    def build_trainer(self, model: Any, arguments: TrainingArguments) -> Trainer:
        from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

        return with_optimizer(SFTTrainer, self.recipe.optimizer)(
            model=model,
            args=arguments,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            processing_class=self.tokenizer,
        )

    def measure(self, trainer: Trainer, outputs: list[Generation]) -> dict[str, float]:
        # TRL tokenizes raw rows here as it does for training
        loss = evaluate(trainer, self.rows["test"])["test_loss"]
        return {"loss": loss, "perplexity": torch.tensor(loss).double().exp().item()}

    def prompt(self, row: dict[str, Any]) -> str | list[dict[str, Any]]:
        if "messages" in row:
            return row["messages"][:-1]
        return row["text"] if "text" in row else row["prompt"]

    def encode(self, row: dict[str, Any]) -> list[int]:
        tokens = super().encode(row)
        # a text has no prompt of its own
        return tokens[:PROMPT_TOKENS] if "text" in row else tokens
