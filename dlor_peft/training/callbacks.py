"""What joins the Trainer in a run of `dlor train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .checkpoints import CheckpointMarks, Shapes
from .divergence import StopDivergence
from .folder import RunFolder
from .interrupts import Interrupts
from .watching import WatchLayers, adapted_layers

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from .schema import Recipe


class AtStart(TrainerCallback):
    """Calls a function when the model is where it trains, sharded if it is, and before the first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._function()


class AllStepsDoneError(Exception):
    """The checkpoint to resume is of the last step."""


class NoStepAfterTheLast(TrainerCallback):
    """The Trainer would make one more step when it resumes within an epoch after the last one."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise AllStepsDoneError


@dataclass(frozen=True)
class Callbacks:
    """Those that the run asks afterwards."""

    marks: CheckpointMarks
    interrupts: Interrupts
    watch: WatchLayers | None
    """None where there is nothing to watch."""


def add_callbacks(trainer: Trainer, recipe: Recipe, folder: RunFolder, expected: Shapes) -> Callbacks:
    """All of them but `AtStart`."""
    assert trainer.model is not None
    watch = None
    if recipe.watch.layers and any(True for _ in adapted_layers(trainer.model)):
        watch = WatchLayers(folder.layers)
        # first, so that those that report find what it adds
        trainer.callback_handler.callbacks.insert(0, watch)
    elif recipe.watch.layers:
        print(f"watch.layers: the facts logged of each layer are those of DLOR, none of {recipe.adapter.peft_type}")
    marks, interrupts = CheckpointMarks(trainer, folder, recipe, expected), Interrupts(trainer)
    # that of divergence last, so that what stopped the run has been reported
    divergence = StopDivergence(trainer.model, watch, recipe.watch.max_condition)
    for callback in (interrupts, marks, NoStepAfterTheLast(), divergence):
        trainer.add_callback(callback)
    return Callbacks(marks, interrupts, watch)
