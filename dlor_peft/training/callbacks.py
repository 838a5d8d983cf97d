"""The callbacks of a run: the one place that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .divergence import StopDivergence
from .schema import Recipe
from .watching import WatchLayers, adapted_layers

if TYPE_CHECKING:
    from transformers import Trainer


def attach(trainer: Trainer, recipe: Recipe, layers_file: Path) -> WatchLayers | None:
    """Add ours to the Trainer's callbacks. The one that watches the layers, where it has something to watch."""
    assert trainer.model is not None
    watch = None
    if recipe.watch.layers and any(True for _ in adapted_layers(trainer.model)):
        watch = WatchLayers(layers_file)
        # first, so that those that report find what it adds
        trainer.callback_handler.callbacks.insert(0, watch)
    elif recipe.watch.layers:
        print(f"watch.layers: the facts logged of each layer are those of DLOR, none of {recipe.adapter.peft_type}")
    # last, so that what stopped the run has been reported
    trainer.add_callback(StopDivergence(trainer.model, watch, recipe.watch.max_condition))
    return watch
