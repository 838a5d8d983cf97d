"""What the tasks of a causal language model share: its base, and greedy continuations of the test rows' prompts."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from ..data import draw_rows, load_splits
from ..models import load_language_model, load_tokenizer
from ..schema import DpoSection, Recipe, SftSection
from .base import BaseSource, Comparison, Task
from .generation import Generation, compare_generations, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalTask(Task[list[Generation]]):
    """Outputs are the token ids that follow each prompt."""

    peft_task_type = "CAUSAL_LM"

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.task, (SftSection, DpoSection))
        self.recipe = recipe
        self.section = recipe.task
        self.rows = draw_rows(load_splits(recipe, self.columns), recipe)
        self.tokenizer = load_tokenizer(recipe.model)

    @classmethod
    def load_base(cls, source: BaseSource) -> PreTrainedModel:
        return load_language_model(source.model, source.modules_to_save)

    @abstractmethod
    def prompt(self, row: dict[str, Any]) -> str | list[dict[str, Any]]:
        """What a row's continuation follows: a text, or the messages before it."""

    def run(self, model: Any) -> list[Generation]:
        rows = self.rows["test"].to_list()[: self.section.prompts]
        return generate(model, [self.encode(row) for row in rows], self.section.new_tokens, self.tokenizer)

    def compare(self, trained: list[Generation], other: list[Generation]) -> Comparison:
        return compare_generations(trained, other, self.tokenizer)

    def encode(self, row: dict[str, Any]) -> list[int]:
        prompt = self.prompt(row)
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        chat: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return chat
