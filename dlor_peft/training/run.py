"""`dlor train`: everything is checked first, then trained, saved, reloaded, merged and compared."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import get_peft_model
from transformers import set_seed

from .callbacks import attach
from .configs import build_adapter_config, build_training_arguments
from .environment import write_environment
from .folder import RunFolder, atomic
from .load import save_base
from .report import (
    installed_versions,
    parameter_table,
    result_table,
    save_curves,
    trainable_parameters,
    training_facts,
)
from .schema import Recipe
from .states import check_states
from .tasks import Task, task_class
from .updates import save_updates
from .watching import DivergenceError, as_json, facts_of, finite, read_history


def train(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """The results that are in `<output_dir>/metrics.json` afterwards.

    A finished run of the same recipe is not repeated unless `overwrite`.

    Raises:
        ValueError, FileNotFoundError: before anything is written, where the recipe, its data or output_dir is wrong.
        DivergenceError: the training diverged; no adapter is saved.
        StateMismatchError: the reloaded or merged adapter differs; metrics.json is not written.
    """
    folder = RunFolder(recipe.output_dir)
    folder.check(overwrite)
    finished = None if overwrite else folder.finished_results(recipe)
    if finished:
        print(f"{folder.metrics} is of a finished run of this recipe; --overwrite runs it again")
        print(result_table(finished))
        return finished
    clock = _Clock()
    with clock("data"):
        task = task_class(recipe.task.type)(recipe)
    results = _train(recipe, task, folder, clock)
    folder.write_metrics(results)
    print(result_table(results))
    print(f"written to {folder.path}")
    return results


def _train(recipe: Recipe, task: Task[Any], folder: RunFolder, clock: _Clock) -> dict[str, Any]:
    set_seed(recipe.seed)
    with clock("model"):
        base = task.load_model()
    with clock("baseline"):
        baseline = task.prepare(base)
    model = get_peft_model(base, build_adapter_config(recipe))
    parameters = trainable_parameters(model)
    print(parameter_table(parameters))
    try:
        trainer = task.build_trainer(model, build_training_arguments(recipe))
    except RuntimeError as error:
        raise ValueError(f"training: the trainer refuses these values: {error}") from error
    watch = attach(trainer, recipe, folder.layers)
    # everything that a recipe can get wrong has been built: from here on an earlier run is replaced
    folder.create(recipe)
    write_environment(folder.environment)
    with clock("before"):
        before = task.measure(trainer, task.run(model))
    with clock("training"):
        trainer.train()
    with clock("after"):
        trained = task.run(model)
        after = task.measure(trainer, trained)
    _check_finite(after)
    results = {
        "before": before,
        "after": after,
        "baseline": baseline,
        "steps": trainer.state.global_step,
        "parameters": parameters,
    }
    with clock("save"), atomic(folder.adapter) as partial:
        model.save_pretrained(str(partial))
        task.tokenizer.save_pretrained(partial)
        save_base(partial, recipe, task.labels, training_facts(recipe, trainer.args, results))
    with clock("states"):
        states = check_states(task, trained, folder.adapter, model.device)
    results |= {
        "states": states,
        "seconds": clock.seconds(),
        "versions": installed_versions(),
        "history": [finite(entry) for entry in trainer.state.log_history],
        "layers": as_json(facts_of(model)) if watch else None,
        "recipe": recipe.model_dump(mode="json"),
    }
    if history := read_history(folder.layers):
        save_updates(folder.updates, history)
    save_curves(folder.curves, trainer.state.log_history, results, task.headline)
    return results


def _check_finite(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergenceError(
                f"training diverged: the test {name} is {value}. Nothing was saved. Lower training.learning_rate, or "
                "raise training.warmup_steps."
            )


class _Clock:
    """Wall-clock seconds of the named phases, and in total since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[phase] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        total = time.perf_counter() - self._start
        return {name: round(value, 1) for name, value in {**self._phases, "total": total}.items()}
