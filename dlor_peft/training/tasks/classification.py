"""Text classification: accuracy on the test split, and a head that may learn at its own rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

from ..data import draw_rows, load_splits
from ..models import load_classifier, load_tokenizer
from ..optimiser import with_optimizer
from ..rows import source_of
from ..schema import ClassificationSection, Recipe
from .base import BaseSource, Comparison, Task
from .batches import run_batches, without_autocast
from .losses import cross_entropy
from .probe import linear_probe, probe_head
from .showing import show_row

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel


class ClassificationTask(Task[torch.Tensor]):
    """Outputs are logits, (test rows, labels), float32."""

    headline = "accuracy"
    peft_task_type = "SEQ_CLS"
    columns = (("text", "label"),)

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, ClassificationSection)
        self.recipe = recipe
        self.section = recipe.task
        splits = load_splits(recipe, self.columns)
        # max_rows may not draw every label: they are those of all training rows
        self.labels = _label_names(splits["train"])
        self.tokenizer = load_tokenizer(recipe.model)
        self.rows = {name: self._encode(split, name) for name, split in draw_rows(splits, recipe).items()}
        self.test = self.rows["test"].remove_columns("labels").to_list()

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        return TrainingArguments

    @classmethod
    def load_base(cls, source: BaseSource) -> PreTrainedModel:
        assert source.labels is not None
        return load_classifier(source.model, source.labels, source.tokenizer, source.modules_to_save)

    def prepare(self, model: Any) -> dict[str, Any] | None:
        if self.section.baseline is None and self.section.head_from_probe is None:
            return None
        embeddings = {
            name: run_batches(model.embed, split.remove_columns("labels").to_list(), self.tokenizer, model.device)
            for name, split in self.rows.items()
        }
        labels = {name: torch.tensor(split["labels"][:]) for name, split in self.rows.items()}
        if self.section.head_from_probe is not None:
            model.set_head(*probe_head(embeddings, labels, self.section.head_from_probe, len(self.labels)))
        return linear_probe(embeddings, labels) if self.section.baseline else None

    def build_trainer(self, model: PeftModel, arguments: TrainingArguments) -> Trainer:
        return with_optimizer(Trainer, self.recipe.optimizer)(
            model=model,
            args=arguments,
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_loss_func=cross_entropy(arguments),
            compute_metrics=_accuracy,
        )

    def show_sample(self, batch: dict[str, Any]) -> str:
        text = show_row(self.tokenizer, {name: value for name, value in batch.items() if name != "labels"})
        return f"{text}\nlabel: {self.labels[batch['labels'].item()]}"

    def run(self, model: Any) -> torch.Tensor:
        model = without_autocast(model).eval()
        return run_batches(lambda **batch: model(**batch).logits, self.test, self.tokenizer, model.device)

    def measure(self, trainer: Trainer, outputs: torch.Tensor) -> dict[str, float]:
        labels = torch.tensor(self.rows["test"]["labels"][:])
        return {
            "accuracy": (outputs.argmax(-1) == labels).double().mean().item(),
            "loss": F.cross_entropy(outputs, labels).item(),
        }

    def compare(self, trained: torch.Tensor, other: torch.Tensor) -> Comparison:
        before, after = trained.argmax(-1), other.argmax(-1)
        different = (before != after).nonzero().flatten().tolist()
        first = ""
        if different:
            row = different[0]
            first = f"test row {row} was {self.labels[before[row]]!r} and is {self.labels[after[row]]!r}"
        leads = (trained.gather(1, before[:, None]) - trained.gather(1, after[:, None])).max().item()
        return Comparison(
            len(trained),
            len(different),
            first,
            max_abs_difference=(trained - other).abs().max().item(),
            max_abs_logit=trained.abs().max().item(),
            largest_lead=leads if different else None,
        )

    def _encode(self, split: Dataset, name: str) -> Dataset:
        index_of = {label: index for index, label in enumerate(self.labels)}
        names = _as_names(split)
        if unknown := sorted(set(names) - set(index_of)):
            row = next(row for row, label in enumerate(names, 1) if label not in index_of)
            raise ValueError(
                f"{source_of(self.recipe, name)}: labels that the train split lacks: {', '.join(unknown[:5])}; the "
                f"first in row {row} of those drawn."
            )
        tokenize = lambda batch: self.tokenizer(batch["text"], truncation=True)  # noqa: E731
        encoded = split.map(tokenize, batched=True, remove_columns=["text", "label"])
        return encoded.add_column("labels", [index_of[label] for label in names])


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    assert isinstance(prediction.predictions, np.ndarray)
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _label_names(split: Dataset) -> list[str]:
    names = getattr(split.features["label"], "names", None)
    if names:
        return list(names)
    values = set(split["label"])
    if not all(isinstance(value, (str, int)) for value in values):
        raise ValueError(f"data.columns.label: labels must be text or integers, but there are {list(values)[:5]}.")
    return [str(value) for value in sorted(values)]


def _as_names(split: Dataset) -> list[str]:
    names = getattr(split.features["label"], "names", None)
    return [names[value] if names else str(value) for value in split["label"]]
