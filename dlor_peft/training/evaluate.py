"""`dlor eval`: the recipe's metrics on its test split for the base, the adapter and the merged model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from peft import PeftConfig, get_peft_model
from transformers import set_seed

from .configs import build_training_arguments
from .load import attach, read_base, saved_modules
from .recipe import load_recipe
from .report import installed_versions, metric_table
from .schema import Recipe
from .tasks import Task, task_class
from .tasks.base import BaseSource

# an evaluation writes nothing, and reports to nobody
QUIET = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "load_best_model_at_end": False,
    "push_to_hub": False,
}


def find_adapter(name: str, overrides: Sequence[str], adapter: str | None) -> tuple[Recipe, Path]:
    """The checked recipe and the folder of the adapter that `name` and `--adapter` mean.

    `name` is a recipe, whose adapter is in its output_dir; or the folder `adapter` of a run, whose recipe lies beside
    it.

    Raises:
        FileNotFoundError: there is no such recipe or adapter, or no recipe beside the adapter.
    """
    folder = Path(name).expanduser()
    if not Path(folder, "adapter_config.json").is_file():
        recipe, _ = load_recipe(name, overrides)
        found = Path(adapter) if adapter else Path(recipe.output_dir, "adapter")
        if not Path(found, "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"no adapter in {found}: run dlor train {name} first, or name the adapter's folder with --adapter."
            )
        return recipe, found
    if adapter:
        raise ValueError(f"{name} is an adapter, and --adapter names another: give the recipe and --adapter.")
    beside = folder.absolute().parent / "recipe.yaml"
    if not beside.is_file():
        raise FileNotFoundError(
            f"no recipe.yaml beside {name}: give the recipe as well, dlor eval RECIPE --adapter {name}."
        )
    return load_recipe(str(beside), overrides)[0], folder


def evaluate(recipe: Recipe, adapter: Path, lm_eval: Sequence[str] = (), include: str | None = None) -> dict[str, Any]:
    """Metrics by state: "base", "adapter" and "merged"; the last is missing where a method or a base has none.

    With `lm_eval`, tasks of that library, also its results by state. `include` is a folder of its task files.

    Raises:
        ValueError: the adapter is not of this recipe's task, labels or base; or the task takes no lm_eval.
    """
    base = read_base(adapter)
    if base["task"] != recipe.task.type:
        raise ValueError(f"{adapter} is of a recipe for {base['task']}, but task.type is {recipe.task.type}.")
    # folders move with their machine: their names do not
    if Path(base["model"]["path"]).name != Path(recipe.model.path).name:
        raise ValueError(f"{adapter} was trained on {base['model']['path']}, but model.path is {recipe.model.path}.")
    if lm_eval and recipe.task.type not in ("sft", "dpo"):
        raise ValueError(f"--lm-eval measures causal language models, but task.type is {recipe.task.type}: drop it.")
    task = task_class(recipe.task.type)(recipe)
    if base["labels"] != task.labels:
        raise ValueError(f"{adapter} was trained for other labels than those of the recipe's data.")
    harness = None
    if lm_eval:
        from .harness import Harness

        harness = Harness(lm_eval, include)
    results: dict[str, Any] = {"test": {}, "baseline": None, "lm_eval": {}}
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"training": {**recipe.training, **QUIET}, "output_dir": folder}
        arguments = build_training_arguments(recipe.model_copy(update=quiet))
        set_seed(recipe.seed)
        for state, model in _models(task, adapter, results):
            trainer = task.build_trainer(model, arguments)
            results["test"][state] = task.measure(trainer, task.run(model))
            if harness:
                results["lm_eval"][state] = harness.measure(model, task.tokenizer, arguments.eval_batch_size)
            # there is room for one
            del trainer, model
            clear_device_cache(garbage_collection=True)
    return {
        **results,
        "adapter": str(adapter),
        "recipe": recipe.model_dump(mode="json"),
        "versions": installed_versions(),
    }


def evaluation_table(results: dict[str, Any]) -> str:
    """`evaluate`'s metrics for the eye: a row for each, a column for each state."""
    columns = {**results["test"], **({"baseline": results["baseline"]} if results["baseline"] else {})}
    tables = {"test split": columns, **({"lm-eval": results["lm_eval"]} if results["lm_eval"] else {})}
    # the base has every metric
    return "\n\n".join(metric_table(title, table, table["base"]) for title, table in tables.items())


def _models(task: Task[Any], adapter: Path, results: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each state's model on weights of its own, one at a time: a trainer leaves its traces in a model."""
    section = task.recipe.model
    config = PeftConfig.from_pretrained(str(adapter))

    source = BaseSource(section, task.tokenizer, task.labels, saved_modules(adapter))

    def load_base() -> Any:
        return task.load_base(source)

    base = load_base()
    results["baseline"] = task.prepare(base)
    # what a trainer reads of its training rows is then quickly read
    task.rows = {"train": task.rows["test"], "test": task.rows["test"]}
    if section.quantization:
        # a trainer takes a quantised model only with an adapter; a fresh one is the identity
        config.inference_mode = False
        base = get_peft_model(base, config)
    yield "base", base
    del base
    yield "adapter", attach(load_base(), adapter)
    if not config.is_prompt_learning and not section.quantization:
        yield "merged", attach(load_base(), adapter).merge_and_unload()  # pyright: ignore[reportCallIssue]
