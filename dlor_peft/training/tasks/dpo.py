"""Direct preference optimisation with TRL: the test loss, and how often the chosen answer has the higher reward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..optimiser import with_optimizer
from .batches import evaluate
from .causal import CausalTask
from .generation import Generation
from .showing import show_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

ACCURACY = "rewards/accuracies"


class DpoTask(CausalTask):
    """Rewards are beta times how much likelier an answer has become than under the model without its adapter."""

    headline = ACCURACY
    columns = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    _loaded: Sequence[tuple[weakref.ref[torch.Tensor], tuple[int, int]]] = ()

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        from trl import DPOConfig  # pyright: ignore[reportPrivateImportUsage]

        return DPOConfig

    def load_model(self) -> PreTrainedModel:
        model = super().load_model()
        self._loaded = [(weakref.ref(parameter), _state(parameter)) for parameter in model.parameters()]
        return model

    def build_trainer(self, model: Any, arguments: TrainingArguments) -> Trainer:
        from peft import PeftModel
        from trl import DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

        adapted = isinstance(model, PeftModel)
        if adapted:
            self._check_reference()
        trainer = with_optimizer(DPOTrainer, self.recipe.optimizer)(
            model=model,
            # of a merged adapter the reference is a model of its own
            ref_model=None if adapted else self.load_model(),
            args=arguments,  # pyright: ignore[reportArgumentType]
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            processing_class=self.tokenizer,
        )
        if adapted and "ref" in model.peft_config:
            # TRL copies an adapter that may have been trained; without the copy it switches the adapter off instead,
            # as it does for one that it makes itself
            model.delete_adapter("ref")
        return trainer

    def _check_reference(self) -> None:
        for reference, loaded in self._loaded:
            parameter = reference()
            if parameter is not None and _state(parameter) != loaded:
                raise ValueError(
                    "adapter: its start changes the weights of the base model, but the reference of dpo is the model "
                    "with its adapter switched off. Choose a start that leaves the base as it is."
                )

    def build_empty_trainer(self, model: Any, arguments: TrainingArguments) -> Trainer:
        with torch.device("meta"):
            # the copy is made there too
            return self.build_trainer(model, arguments)

    def show_sample(self, batch: dict[str, Any]) -> str:
        rows = zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True)
        shown = [show_tokens(self.tokenizer, ids[kept == 1], (mask == 1)[kept == 1]) for ids, mask, kept in rows]
        return "\n".join(f"{name}: {text}" for name, text in zip(("chosen", "rejected"), shown, strict=True))

    def measure(self, trainer: Trainer, outputs: list[Generation]) -> dict[str, float]:
        metrics = evaluate(trainer, self.rows["test"])
        return {"loss": metrics["test_loss"], ACCURACY: metrics[f"eval_{ACCURACY}"]}

    def prompt(self, row: dict[str, Any]) -> str | list[dict[str, Any]]:
        from trl.data_utils import maybe_extract_prompt

        prompt: Any = maybe_extract_prompt(row)["prompt"]
        return prompt


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Where its values lie, and how often they were written."""
    return parameter.data_ptr(), parameter._version
