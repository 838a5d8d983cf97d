"""What the recipe's `optimizer` and `start_batches` ask for, in a trainer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import Trainer

from dlor_peft.initialisation import initialize_from_data, layers_to_start
from dlor_peft.optimiser import create_dlor_optimizer

from .schema import OptimizerSection, Recipe
from .sources import suggest

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def with_optimizer(trainer_class: type[AnyTrainer], section: OptimizerSection | None) -> type[AnyTrainer]:
    """A trainer class whose optimizer is that of the recipe; without a section, `trainer_class` itself.

    Raises:
        ValueError: optimizer.name is no optimizer.
        ImportError: its package is not installed.
    """
    if section is None:
        return trainer_class
    named = _optimizer_class(section.name) if section.name else None

    class RecipeOptimizerTrainer(cast(Any, trainer_class)):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                adapted = self.model if model is None else model
                assert adapted is not None
                with _named("optimizer"):
                    self.optimizer = self._create(adapted)
            assert isinstance(self.optimizer, torch.optim.Optimizer)
            return self.optimizer

        def _create(self, model: nn.Module) -> torch.optim.Optimizer:
            if named is not None:
                optimizer_class, options = named, dict(section.options)
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # pyright: ignore[reportArgumentType]
                if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(options):
                    raise ValueError(
                        f"training.optim={self.args.optim} chooses its parameters itself. Drop the section "
                        "optimizer, or choose another."
                    )
            return create_dlor_optimizer(
                model,
                lr=self.args.learning_rate,
                diag_lr_ratio=section.diag_lr_ratio,
                u_lr_ratio=section.u_lr_ratio,
                weight_decay=self.args.weight_decay,
                head_lr=section.head_learning_rate,
                max_ratio=section.max_ratio,
                max_spread=section.max_spread,
                optimizer_class=optimizer_class,
                **{name: value for name, value in options.items() if name not in ("lr", "weight_decay")},
            )

    return RecipeOptimizerTrainer


def check_optimiser(trainer: Trainer, recipe: Recipe) -> None:
    """What `optimizer` and `start_batches` ask of the trainer's model can be had.

    Raises:
        ValueError: a rate, limit or start that would have no effect on it, or cannot be kept.
    """
    if recipe.optimizer is not None:
        # made, looked at and thrown away: the trainer makes its own when it has placed the model
        trainer.create_optimizer()
        trainer.optimizer = None
    if recipe.start_batches is not None:
        assert trainer.model is not None
        with _named("start_batches"):
            layers_to_start(trainer.model, "default")


@contextmanager
def _named(key: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error


def start_from_data(trainer: Trainer, num_batches: int) -> None:
    """`initialize_from_data` over the first training batches, where the trainer's model is; all processes must call.

    Raises:
        ValueError: the adapter is none of DLoR, or cannot be started so.
    """
    model = trainer.model
    assert model is not None
    dataloader: Any = trainer.get_train_dataloader()
    try:
        with _named("start_batches"):
            initialize_from_data(model, dataloader, num_batches=num_batches, progress=not trainer.args.disable_tqdm)
    finally:
        # accelerate takes it for the one that is being trained on until it is exhausted
        dataloader.end()


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    module, _, attribute = name.rpartition(".")
    known = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if not module and attribute not in known:
        raise ValueError(f"optimizer.name: torch.optim has no {name!r}.{suggest(name, known)}")
    try:
        found = getattr(importlib.import_module(module or "torch.optim"), attribute, None)
    except ImportError as error:
        raise ImportError(f"optimizer.name: {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimizer.name: {name!r} is no torch optimizer class, as package.module.Class.")
    return found
