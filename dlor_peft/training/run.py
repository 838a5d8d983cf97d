"""`dlor train`: everything is checked first, then trained, saved, reloaded, merged and compared."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dlor_peft.sharding import adapters_sharded_by_rows

from .callbacks import AllStepsDoneError, AtStart, add_callbacks
from .checkpoints import (
    Checkpoint,
    adapter_shapes,
    checkpoint_to_resume,
    devices,
    explained,
    gather_adapter,
    write_adapter,
)
from .configs import build_adapter_config, build_training_arguments
from .environment import write_environment
from .folder import RunFolder, atomic
from .hub_access import push_adapter
from .load import save_base
from .optimiser import check_optimiser, start_from_data
from .processes import decided_by_main, holds_weights, is_main, main_first, wait_for_all
from .report import (
    installed_versions,
    parameter_table,
    result_table,
    save_curves,
    trainable_parameters,
    training_facts,
)
from .rows import check_lengths
from .schema import Recipe
from .sharding import join_embeddings, shard_on_cpu
from .signals import StoppedError
from .states import check_states
from .tasks import Task, task_class
from .updates import save_updates
from .watching import DivergenceError, as_json, facts_of, finite, read_history


def train(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """The results that are in `<output_dir>/metrics.json` afterwards; of several processes, only the main one has all.

    A finished run of the same recipe is not repeated unless `overwrite`. `resume` continues an unfinished one from its
    last complete checkpoint.

    Raises:
        ValueError, FileNotFoundError: before anything is written, where the recipe, its data, output_dir or the
            checkpoint to resume is wrong.
        DivergenceError: the training diverged; no adapter is saved.
        OSError: something could not be written.
        StoppedError: a signal ended the training after a step, and a checkpoint was saved.
        StateMismatchError: the reloaded or merged adapter differs; metrics.json is not written.
    """
    folder = RunFolder(recipe.output_dir)

    def look() -> tuple[dict[str, Any] | None, Checkpoint | None]:
        folder.check(overwrite, resume)
        finished = None if overwrite else folder.finished_results(recipe)
        return finished, checkpoint_to_resume(folder, recipe) if resume and not finished else None

    finished, checkpoint = decided_by_main(look)
    if finished:
        print(f"{folder.metrics} is of a finished run of this recipe; --overwrite runs it again")
        print(result_table(finished))
        return finished
    clock = _Clock()
    with clock("data"):
        task = main_first(lambda: task_class(recipe.task.type)(recipe))
    fit = _fit(recipe, task, folder, checkpoint, clock)
    results = fit.results
    # the trained model goes: there is room for another
    clear_device_cache(garbage_collection=True)
    if is_main():
        with clock("states"):
            states = check_states(task, fit.trained, folder.adapter, fit.device) if recipe.verify else {}
        results |= {
            "states": states,
            "seconds": clock.seconds(),
            "versions": installed_versions(),
            "history": [finite(entry) for entry in fit.history],
            "recipe": recipe.model_dump(mode="json"),
        }
        with explained(folder.path, folder):
            if history := read_history(folder.layers):
                save_updates(folder.updates, history)
            save_curves(folder.curves, fit.history, results, task.headline)
            folder.write_metrics(results)
        print(result_table(results))
        print(f"written to {folder.path}")
        if recipe.training.get("push_to_hub"):
            print(f"pushed to {push_adapter(folder.adapter, build_training_arguments(recipe), recipe.output_dir)}")
    wait_for_all()
    return results


@dataclasses.dataclass(frozen=True)
class _Fit:
    """What is left of a training when its model is gone; the adapter is saved."""

    results: dict[str, Any]
    trained: Any
    """The trained model's outputs."""

    history: list[dict[str, float]]
    device: torch.device


def _fit(recipe: Recipe, task: Task[Any], folder: RunFolder, checkpoint: Checkpoint | None, clock: _Clock) -> _Fit:
    set_seed(recipe.seed)
    with clock("model"):
        base = task.load_model()
    with clock("baseline"):
        baseline = task.prepare(base) if holds_weights() else None
    model = get_peft_model(base, build_adapter_config(recipe))
    expected = adapter_shapes(model)
    parameters = trainable_parameters(model)
    print(parameter_table(parameters))
    arguments = build_training_arguments(recipe)
    # what the Trainer would push are checkpoints
    arguments.push_to_hub = False
    shard_on_cpu(arguments.mixed_precision)
    with folder.spared():
        trainer = _build_trainer(task, model, arguments)
        if trainer.is_fsdp_enabled:
            join_embeddings(model)
        check_optimiser(trainer, recipe)
        check_lengths(trainer, recipe)
        if checkpoint is not None:
            _check_devices(checkpoint, trainer)
    callbacks = add_callbacks(trainer, recipe, folder, expected)
    marks, interrupts = callbacks.marks, callbacks.interrupts

    def measure() -> tuple[Any, dict[str, float]]:
        # where weights are sharded, all processes run the same rows, and gather each layer together
        outputs = task.run(trainer.model)
        return outputs, task.measure(trainer, outputs)

    def measure_start() -> None:
        if checkpoint is None:
            if recipe.start_batches is not None:
                start_from_data(trainer, recipe.start_batches)
            with clock("before"):
                before = measure()[1]
            if undefined := _not_finite(before):
                raise ValueError(
                    f"data: the {undefined} before the first step, so that no training could be measured. Look at the "
                    "test split, constant scores for example, and at model.dtype."
                )
            marks.start = {"before": before, "baseline": baseline}
        else:
            marks.resume(checkpoint)
            print(f"resuming at step {checkpoint.step}, from {checkpoint.path}")

    trainer.add_callback(AtStart(measure_start))
    # everything that a recipe can get wrong has been built: from here on an earlier run is replaced
    if is_main():
        if checkpoint is None:
            folder.create(recipe)
        write_environment(folder.environment)
    wait_for_all()
    with clock("training"), interrupts.watched():
        _train(trainer, checkpoint)
    if interrupts.stopped_at is not None:
        raise StoppedError(
            f"stopped after step {interrupts.stopped_at} of {trainer.state.max_steps}, which "
            f"{folder.checkpoints} holds. To go on, run the same command with --resume."
        )
    with clock("after"):
        trained, after = measure()
    if undefined := _not_finite(after):
        raise DivergenceError(
            f"training diverged: the {undefined}. Nothing was saved. Lower training.learning_rate, or raise "
            "training.warmup_steps."
        )
    results = {
        **marks.start,
        "after": after,
        "steps": trainer.state.global_step,
        "parameters": parameters,
        "layers": as_json(facts_of(model)) if callbacks.watch else None,
    }
    with clock("save"):
        state_dict = gather_adapter(trainer)
        if is_main():
            with explained(folder.adapter, folder), atomic(folder.adapter) as partial:
                write_adapter(trainer, state_dict, partial, expected)
                task.tokenizer.save_pretrained(partial)
                save_base(partial, recipe, task.labels, training_facts(recipe, trainer.args, results))
    fit = _Fit(results, trained, trainer.state.log_history, trainer.args.device)
    trainer.accelerator.free_memory()
    # from now on models are loaded whole
    unset_hf_deepspeed_config()
    return fit


def _build_trainer(task: Task[Any], model: Any, arguments: TrainingArguments) -> Trainer:
    try:
        return task.build_trainer(model, arguments)
    except RuntimeError as error:
        raise ValueError(f"training: the trainer refuses these values: {error}") from error


def _train(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    try:
        with adapters_sharded_by_rows():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    except AllStepsDoneError:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            # the end of training that was not reached
            trainer._load_best_model()


def _check_devices(checkpoint: Checkpoint, trainer: Trainer) -> None:
    def described(facts: dict[str, Any]) -> str:
        return f"{facts['processes']} processes ({facts['distributed_type']})"

    here = devices(trainer)
    if here != checkpoint.devices:
        raise ValueError(
            f"--resume: {checkpoint.path} is of a run in {described(checkpoint.devices)}, this one is in "
            f"{described(here)}: the batches would differ. Start it with the same --launch and --processes."
        )


def _not_finite(metrics: dict[str, float]) -> str | None:
    """The first metric that is no number, in words."""
    return next((f"test {name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), None)


class _Clock:
    """Wall-clock seconds of the named phases, each without those in it, and in total since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, inner = time.perf_counter(), sum(self._phases.values())
        yield
        # a phase within this one is its own
        inner = sum(self._phases.values()) - inner
        self._phases[phase] = time.perf_counter() - start - inner

    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {name: round(value, 1) for name, value in {**self._phases, "total": total}.items()}
