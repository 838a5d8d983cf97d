"""What the rest of training asks of a task."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..models import without_weights
from ..schema import ModelSection, Recipe
from .showing import show_row

if TYPE_CHECKING:
    from collections.abc import Collection

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

Outputs = TypeVar("Outputs")

USAGE = """\
from dlor_peft.training.load import load_trained

model, tokenizer = load_trained("path/of/this/adapter")
"""


@dataclasses.dataclass(frozen=True)
class BaseSource:
    """What a base model is made of."""

    model: ModelSection
    tokenizer: PreTrainedTokenizerBase

    labels: list[str] | None
    """Names of the classes, for a classifier."""

    modules_to_save: Collection[str]
    """Modules that the adapter trains and saves in full: only they may be missing in the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How one state's outputs compare with the trained adapter's."""

    num_outputs: int
    num_different: int
    """Predictions or generations that are not identical."""

    first_difference: str
    """What differs first, in words; empty where no output does."""

    max_abs_difference: float | None = None
    """Largest difference of two logits (or components of an embedding), where the task compares them."""

    max_abs_logit: float | None = None
    """The largest of the trained adapter's."""

    largest_lead: float | None = None
    """By how much the logit of what the trained adapter chose leads that of what the other state chose: the largest
    lead among the outputs that differ. Rounding explains a small one."""


class Task(ABC, Generic[Outputs]):
    """Constructed from a recipe, it has loaded and checked the data; it loads models on demand."""

    headline: str
    """Name of the metric that is plotted."""

    peft_task_type: ClassVar[str]
    """PEFT's task_type where the recipe does not set one."""

    columns: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of columns, by their roles, that the task can read; the first where the recipe names none."""

    recipe: Recipe

    rows: dict[str, Any]
    """The splits as `datasets.Dataset`s."""

    tokenizer: PreTrainedTokenizerBase

    labels: Any = None
    """Names of the classes, a list, for a classifier."""

    @abstractmethod
    def __init__(self, recipe: Recipe) -> None: ...

    @classmethod
    @abstractmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        """Whose fields stand in the section `training`."""

    @classmethod
    @abstractmethod
    def load_base(cls, source: BaseSource) -> PreTrainedModel:
        """A fresh base model in evaluation mode."""

    def load_model(self) -> PreTrainedModel:
        """The base model of the recipe."""
        saved = (self.recipe.adapter.model_extra or {}).get("modules_to_save")
        return self.load_base(BaseSource(self.recipe.model, self.tokenizer, self.labels, saved or ()))

    def build_empty(self) -> PreTrainedModel:
        """The base model of the recipe on the meta device, which needs its config and no weights."""
        with without_weights():
            return self.load_model()

    @classmethod
    def usage(cls, model: ModelSection) -> str:
        """Python lines that load the saved adapter, for its card."""
        return USAGE

    @abstractmethod
    def build_trainer(self, model: PeftModel, arguments: TrainingArguments) -> Trainer: ...

    @abstractmethod
    def run(self, model: Any) -> Outputs:
        """The model's outputs on the test split: what the states must agree on."""

    @abstractmethod
    def measure(self, trainer: Trainer, outputs: Outputs) -> dict[str, float]:
        """Metrics of the trainer's model on the test split; `outputs` are that model's."""

    @abstractmethod
    def compare(self, trained: Outputs, other: Outputs) -> Comparison: ...

    def build_empty_trainer(self, model: PeftModel, arguments: TrainingArguments) -> Trainer:
        """The trainer around a model on the meta device, which stays there."""
        return self.build_trainer(model, arguments)

    def show_sample(self, batch: dict[str, Any]) -> str:
        """The row of a training batch of one, as the trainer has encoded it: for the eye."""
        return show_row(self.tokenizer, batch)

    def prepare(self, model: Any) -> dict[str, Any] | None:
        """Before the model is adapted: its head's start, and the metrics of the baseline that the recipe asks for."""
        return None
