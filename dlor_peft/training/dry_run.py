"""`dlor train --dry-run`: everything that a run would come across, checked without weights and without a trace."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model

from dlor_peft.deploy.tables import format_table

from . import checkpointing
from .checkpoints import find_checkpoint
from .configs import build_adapter_config, build_training_arguments, needs_accelerator
from .folder import RunFolder
from .hub_access import check_push
from .matching import describe_targets, unmatched
from .memory import StepMemory, step_memory
from .optimiser import check_optimiser
from .quantization import build_quantization
from .report import parameter_table, trainable_parameters
from .rows import check_lengths
from .schema import Recipe
from .tasks import Task, task_class

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

DEVICES = (2, 8)
"""The numbers of devices that the estimate is shown for, where all but activations is sharded."""


class DryRunError(ValueError):
    """All that a run would stumble over, in one message."""


def dry_run(recipe: Recipe, overwrite: bool = False, resume: bool = False, processes: int | None = None) -> None:
    """Print what the run would train, on what, and with how much memory; it trains nothing and writes nothing.

    `processes` is the number of devices to tell the memory for, where it is known.

    Raises:
        DryRunError: every problem that was found.
    """
    run = _DryRun(recipe, DEVICES if processes is None else (processes,))
    run.look_at_folder(overwrite, resume)
    run.look_at_hub()
    run.look_at_device()
    run.build()
    if run.problems:
        numbered = " ".join(f"({index}) {problem}" for index, problem in enumerate(run.problems, start=1))
        raise DryRunError(f"--dry-run found {len(run.problems)}: {numbered}")
    print("nothing was found that would stop the run; nothing was trained or written")


class _DryRun:
    def __init__(self, recipe: Recipe, devices: tuple[int, ...]) -> None:
        self.recipe = recipe
        self.devices = devices
        self.problems: list[str] = []

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """What is wrong in the block is noted, and the rest goes on."""
        try:
            yield
        except (ValueError, ImportError, OSError) as error:
            self.problems.append(str(error))

    def look_at_folder(self, overwrite: bool, resume: bool) -> None:
        folder = RunFolder(self.recipe.output_dir)
        with self._noted():
            folder.check(overwrite, resume)
            finished = None if overwrite else folder.finished_results(self.recipe)
            there = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
            if not os.access(there, os.W_OK | os.X_OK):
                raise ValueError(f"output_dir: {there} is not writable. Choose another folder: output_dir=OTHER.")
            state = "a finished run of this recipe, which would be shown and not repeated" if finished else "new"
            if not finished and folder.recipe.exists():
                state = "an earlier run, which would be replaced"
            if not finished and resume:
                state = (
                    f"an unfinished run, which would go on from step {find_checkpoint(folder, self.recipe)[0].step}"
                )
            print(f"output_dir: {folder.path}: {state}")

    def look_at_hub(self) -> None:
        with self._noted():
            arguments = build_training_arguments(self.recipe, runs_here=False)
            if arguments.push_to_hub:
                print(f"training.push_to_hub: {check_push(arguments, self.recipe.output_dir)}")

    def look_at_device(self) -> None:
        if needs_accelerator(self.recipe):
            print("device: this machine has no accelerator; without one, the run itself wants training.use_cpu=true")

    def build(self) -> None:
        task = trainer = None
        with self._noted():
            task = task_class(self.recipe.task.type)(self.recipe)
        if task is None:
            return
        print("rows: " + ", ".join(f"{name} {len(split):,}" for name, split in task.rows.items()))
        with self._noted(), tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(task, Path(scratch))
        if trainer is None:
            return
        with self._noted():
            loader, rows = batches(trainer)
            print(f"\nthe first row as it is trained:\n{task.show_sample(loader.collate_fn([loader.dataset[0]]))}\n")
            print(self._estimate(trainer, loader.collate_fn([loader.dataset[row] for row in rows])))

    def _trainer(self, task: Task[Any], scratch: Path) -> Trainer | None:
        base = task.build_empty()
        modules = [name for name, _ in base.named_modules()]
        given = self.recipe.adapter.model_extra or {}
        config = build_adapter_config(self.recipe)
        with torch.device("meta"), warnings.catch_warnings():
            # what matches nothing is no warning here
            warnings.filterwarnings("ignore", ".*match", RuntimeWarning)
            try:
                model = get_peft_model(base, config)
            except ValueError as error:
                raise ValueError(f"adapter: {error} {describe_targets(given, modules)}") from error
        tuner: Any = model.base_model
        adapted = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
        print(parameter_table(trainable_parameters(model)))
        self.problems += unmatched(given, model.peft_config["default"], modules, adapted)
        arguments = for_dry_run(build_training_arguments(self.recipe, runs_here=False), scratch)
        try:
            trainer = task.build_empty_trainer(model, arguments)
        except RuntimeError as error:
            raise ValueError(f"training: the trainer refuses these values: {error}") from error
        with self._noted():
            check_optimiser(trainer, self.recipe)
        with self._noted():
            check_lengths(trainer, self.recipe)
        return trainer

    def _estimate(self, trainer: Trainer, batch: dict[str, Any]) -> str:
        checkpointed = checkpointing.is_on(trainer.args)
        try:
            memory = step_memory(trainer, batch, build_quantization(self.recipe.model.quantization))
        except Exception as error:
            # whatever a model does with values that are not there: the run is as good as before
            return f"memory: cannot be estimated without weights: {str(error).splitlines()[0]}"
        rows = [["memory of a step (estimated)", "MiB"], *_rows(memory, checkpointed, self.devices)]
        shape = " x ".join(map(str, memory.shape))
        note = f"for a batch of the longest rows, {shape}, per device; without what CUDA itself needs"
        return f"{format_table(rows)}\n{note}"


def for_dry_run(arguments: TrainingArguments, scratch: Path) -> TrainingArguments:
    """The same arguments for a trainer that leaves no trace and whose model stays on the meta device."""
    # the Trainer makes both when it is constructed
    arguments.output_dir, arguments.push_to_hub = str(scratch), False
    kind = type(arguments)
    arguments.__class__ = type(kind.__name__, (kind,), {"place_model_on_device": False})
    return arguments


def batches(trainer: Trainer) -> tuple[Any, list[int]]:
    """A loader that has the training rows in order, and the indices of the longest: a batch of them."""
    rows: Any = trainer.train_dataset
    loader: Any = trainer.get_eval_dataloader(rows)
    lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in loader.dataset]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return loader, order[: trainer.args.per_device_train_batch_size]


def _rows(memory: StepMemory, checkpointed: bool, devices: tuple[int, ...]) -> list[list[str]]:
    parts = {
        "frozen weights": memory.weights,
        "trained weights": memory.trained,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
    }
    if memory.activations_checkpointed is not None:
        parts["activations, checkpointed"] = memory.activations_checkpointed
    with_or_without = "with" if checkpointed else "without"
    parts[f"in all, {with_or_without} activation checkpointing"] = memory.total(checkpointed)
    for count in devices:
        parts[f"in all on each of {count} devices, FSDP2 or ZeRO-3"] = memory.sharded(count, checkpointed)
    return [[name, f"{size / 2**20:,.1f}"] for name, size in parts.items()]
