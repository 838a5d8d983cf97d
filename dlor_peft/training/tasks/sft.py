"""Supervised fine-tuning of a causal language model with TRL: the test loss, and greedy continuations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..data import draw_rows, load_splits
from ..models import load_language_model, load_tokenizer
from ..schema import ModelSection, Recipe, SftSection
from .base import Comparison, Task

if TYPE_CHECKING:
    from collections.abc import Collection

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

PROMPT_TOKENS = 16


class SftTask(Task[list[list[int]]]):
    """Outputs are the token ids that follow each prompt."""

    headline = "loss"
    peft_task_type = "CAUSAL_LM"
    columns = (("text",), ("prompt", "completion"), ("messages",))

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, SftSection)
        self.recipe = recipe
        self.section = recipe.task
        self.rows = draw_rows(load_splits(recipe, self.columns), recipe)
        self.tokenizer = load_tokenizer(recipe.model)

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

        return SFTConfig

    @classmethod
    def load_base(
        cls,
        model: ModelSection,
        tokenizer: PreTrainedTokenizerBase,
        labels: list[str] | None,
        modules_to_save: Collection[str],
    ) -> PreTrainedModel:
        return load_language_model(model, modules_to_save)

    def build_trainer(self, model: PeftModel, arguments: TrainingArguments) -> Trainer:
        from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

        return SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            processing_class=self.tokenizer,
        )

    def run(self, model: Any) -> list[list[int]]:
        model.eval()
        rows = self.rows["test"].to_list()[: self.section.prompts]
        return [self._continue(model, self._prompt(row)) for row in rows]

    def measure(self, trainer: Trainer, outputs: list[list[int]]) -> dict[str, float]:
        # TRL tokenizes raw rows here as it does for training
        test: Any = self.rows["test"]
        loss = trainer.evaluate(test, metric_key_prefix="test")["test_loss"]
        return {"loss": loss, "perplexity": torch.tensor(loss).double().exp().item()}

    def compare(self, trained: list[list[int]], other: list[list[int]]) -> Comparison:
        different = [index for index, pair in enumerate(zip(trained, other, strict=True)) if pair[0] != pair[1]]
        first = ""
        if different:
            before, after = (self.tokenizer.decode(outputs[different[0]]) for outputs in (trained, other))
            first = f"prompt {different[0]} was continued with {before!r} and is with {after!r}"
        return Comparison(len(trained), len(different), first)

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        if "text" in row:
            return self.tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS]
        prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        chat: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return chat

    def _continue(self, model: Any, prompt: list[int]) -> list[int]:
        input_ids = torch.tensor([prompt], device=model.device)
        generated = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=self.section.new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return generated[0, len(prompt) :].tolist()
