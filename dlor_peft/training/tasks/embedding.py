"""Text embeddings with sentence-transformers: its losses, and its evaluators on the test split."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..data import draw_rows, load_splits
from ..models import load_sentence_transformer, load_tokenizer, resolve_path
from ..optimiser import with_optimizer
from ..processes import num_processes
from ..schema import EmbeddingSection, ModelSection, Recipe
from .base import BaseSource, Comparison, Task
from .batches import evaluate, without_autocast

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator
    from transformers import PreTrainedModel, Trainer, TrainingArguments

USAGE = """\
import dlor_peft  # makes DLOR known to PEFT
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{base}")
model.load_adapter("path/of/this/adapter")
"""

HEADLINES = {
    ("text1", "text2", "score"): "spearman_cosine",
    # the share of anchors whose own positive is the nearest of all positives of the split
    ("anchor", "positive"): "src2trg_accuracy",
    # the share of anchors that are nearer to their positive than to their negative
    ("anchor", "positive", "negative"): "cosine_accuracy",
}


class EmbeddingTask(Task[torch.Tensor]):
    """The adapter is on the transformer inside the SentenceTransformer. Outputs are embeddings of all test texts."""

    peft_task_type = "FEATURE_EXTRACTION"
    columns = tuple(HEADLINES)

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, EmbeddingSection)
        self.recipe = recipe
        self.rows = draw_rows(load_splits(recipe, self.columns), recipe)
        self.roles = tuple(self.rows["train"].column_names)
        self.headline = HEADLINES[self.roles]
        self.tokenizer = load_tokenizer(recipe.model)
        self._pipeline: SentenceTransformer | None = None

    @classmethod
    def arguments_class(cls) -> type[TrainingArguments]:
        from sentence_transformers import SentenceTransformerTrainingArguments

        return SentenceTransformerTrainingArguments

    @classmethod
    def load_base(cls, source: BaseSource) -> PreTrainedModel:
        """The transformer alone: what turns its hidden states into an embedding has no weights that are trained."""
        base: Any = load_sentence_transformer(source.model).transformers_model
        return base

    def build_empty(self) -> PreTrainedModel:
        """On the meta device, but sentence-transformers reads the weights to build it."""
        model: Any = self.load_model()
        # what is around it as well, which is read only once
        self._around(model)
        return model.to("meta")

    @classmethod
    def usage(cls, model: ModelSection) -> str:
        return USAGE.format(base=resolve_path(model))

    def build_trainer(self, model: Any, arguments: TrainingArguments) -> Trainer:
        from sentence_transformers.sentence_transformer.losses import (
            CosineSimilarityLoss,
            MultipleNegativesRankingLoss,
        )

        loss: Any = CosineSimilarityLoss
        if "score" not in self.roles:
            # the negatives of an anchor are the other rows of the whole batch, in whichever process they are
            loss = partial(MultipleNegativesRankingLoss, gather_across_devices=num_processes() > 1)
        trainer = with_optimizer(_trainer_class(), self.recipe.optimizer)(
            model=self._around(model),
            args=arguments,  # pyright: ignore[reportArgumentType]
            train_dataset=self.rows["train"],
            eval_dataset=self.rows.get("dev"),
            loss=loss,
            evaluator=self._evaluator(self.rows["dev"]) if "dev" in self.rows else None,
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "--launch: sentence-transformers cannot encode with a model whose weights are sharded. Train an "
                "embedding model with --launch ddp."
            )
        return trainer

    def run(self, model: Any) -> torch.Tensor:
        model.eval()
        test = self.rows["test"]
        texts = [text for role in self.roles if role != "score" for text in test[role]]
        embeddings = without_autocast(self._around(model)).encode(
            texts, convert_to_tensor=True, show_progress_bar=False
        )
        return embeddings.float().cpu()

    def measure(self, trainer: Any, outputs: torch.Tensor) -> dict[str, float]:
        test = self.rows["test"]
        loss = trainer.loss
        before = trainer.evaluator, getattr(loss, "gather_across_devices", False)
        # the trainer asks its evaluator whenever it measures a loss; and each process has all rows
        trainer.evaluator, loss.gather_across_devices = self._evaluator(test), False
        try:
            metrics = evaluate(trainer, test)
        finally:
            trainer.evaluator, loss.gather_across_devices = before
        return {name: metrics[f"test_{name}"] for name in (self.headline, "loss")}

    def compare(self, trained: torch.Tensor, other: torch.Tensor) -> Comparison:
        difference = (trained - other).abs().max().item()
        return Comparison(len(trained), 0, "", difference, trained.abs().max().item())

    def _around(self, model: Any) -> SentenceTransformer:
        """The recipe's SentenceTransformer with `model` as its transformer; a trainer's model is that already."""
        if self._pipeline is None:
            self._pipeline = load_sentence_transformer(self.recipe.model)
        if model is not self._pipeline:
            self._pipeline[0].model = model
        return self._pipeline.to(model.device)

    def _evaluator(self, split: Dataset) -> BaseEvaluator:
        from sentence_transformers.sentence_transformer import evaluation

        columns = [split[role][:] for role in self.roles]
        quiet = {"write_csv": False, "show_progress_bar": False}
        if "score" in self.roles:
            return evaluation.EmbeddingSimilarityEvaluator(*columns, main_similarity="cosine", **quiet)
        if len(columns) == 2:
            return evaluation.TranslationEvaluator(*columns, **quiet)
        return evaluation.TripletEvaluator(*columns, **quiet)


def _trainer_class() -> Any:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from sentence_transformers import SentenceTransformerTrainer
    from transformers import Trainer

    class AdapterTrainer(SentenceTransformerTrainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # transformers calls it in every process, and sentence-transformers 6.2 writes in each
            if self.args.should_save:
                super()._save(output_dir, state_dict)

        def _load_from_checkpoint(self, checkpoint_path: str) -> None:
            # a checkpoint has the adapter alone; it is not a model that sentence-transformers could load for itself
            model: Any = self.model
            (adapted,) = (part for part in model.modules() if isinstance(part, PeftModel))
            set_peft_model_state_dict(adapted, load_peft_weights(checkpoint_path, device="cpu"))

        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
            if args.learning_rate_mapping:
                return super().get_optimizer_cls_and_kwargs(args, model)
            # sentence-transformers chooses the parameters itself, for the sake of losses with weights of their own
            return Trainer.get_optimizer_cls_and_kwargs(args, model)

    return AdapterTrainer
