"""From a text to a text with an encoder and a decoder: the test loss, and the exact matches among generations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

from ..data import draw_rows, load_splits
from ..models import load_seq2seq_model, load_tokenizer
from ..optimiser import with_optimizer
from ..schema import Recipe, Seq2SeqSection
from .base import BaseSource, Comparison, Task
from .batches import evaluate
from .generation import Generation, compare_generations, generate
from .losses import cross_entropy

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainingArguments


class Seq2SeqTask(Task[list[Generation]]):
    """Outputs are the greedy generations for the first test rows."""

    headline = "loss"
    peft_task_type = "SEQ_2_SEQ_LM"
    columns = (("input", "output"),)

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, Seq2SeqSection)
        self.recipe = recipe
        self.section = recipe.task
        splits = draw_rows(load_splits(recipe, self.columns), recipe)
        self.tokenizer = load_tokenizer(recipe.model)
        self.references = splits["test"]["output"][: self.section.generations]
        self.rows = {name: self._encode(split) for name, split in splits.items()}

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        return Seq2SeqTrainingArguments

    @classmethod
    def load_base(cls, source: BaseSource) -> PreTrainedModel:
        return load_seq2seq_model(source.model, source.modules_to_save)

    def build_trainer(self, model: Any, arguments: TrainingArguments) -> Trainer:
        return with_optimizer(Seq2SeqTrainer, self.recipe.optimizer)(
            model=model,
            args=arguments,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, model=model),
            compute_loss_func=cross_entropy(arguments),
            processing_class=self.tokenizer,
        )

    def run(self, model: Any) -> list[Generation]:
        prompts = self.rows["test"]["input_ids"][: self.section.generations]
        return generate(model, prompts, self.section.max_output_tokens, self.tokenizer)

    def measure(self, trainer: Trainer, outputs: list[Generation]) -> dict[str, float]:
        loss = evaluate(trainer, self.rows["test"])["test_loss"]
        texts = self.tokenizer.batch_decode([output.tokens for output in outputs], skip_special_tokens=True)
        pairs = zip(texts, self.references, strict=True)
        matches = sum(text.strip() == reference.strip() for text, reference in pairs)
        return {"loss": loss, "exact_match": matches / len(outputs)}

    def compare(self, trained: list[Generation], other: list[Generation]) -> Comparison:
        return compare_generations(trained, other, self.tokenizer)

    def _encode(self, split: Dataset) -> Dataset:
        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            inputs = self.tokenizer(batch["input"], truncation=True, max_length=self.section.max_input_tokens)
            outputs = self.tokenizer(
                text_target=batch["output"], truncation=True, max_length=self.section.max_output_tokens
            )
            return {
                "input_ids": inputs["input_ids"],
                "attention_mask": inputs["attention_mask"],
                "labels": outputs["input_ids"],
            }

        return split.map(tokenize, batched=True, remove_columns=split.column_names)
