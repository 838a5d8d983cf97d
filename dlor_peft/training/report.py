"""What a run shows: the table of trainable parameters, the table of results, and the curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from dlor_peft.deploy.adapter import PREFIX
from dlor_peft.deploy.tables import format_table

from .folder import atomic

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from .schema import Recipe

PACKAGES = ("dlor-peft", "torch", "transformers", "peft", "trl", "datasets")


MOVES = {"dlor_norm": r"$\|U V^T\|_F$", "dlor_alpha_drift": r"$\|\alpha - 1\|$"}
"""Of what `watching.summary` logs: what the curves show."""


def trainable_parameters(model: PeftModel) -> dict[str, Any]:
    """Trainable parameters by kind of module (layer numbers replaced by *), their total and the model's."""
    prefix = getattr(model.base_model, "prefix", "modules_to_save.")
    kinds: dict[str, dict[str, int]] = {}
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = module_of(name, prefix)
        kind = kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", module), {"modules": 0, "parameters": 0})
        kind["modules"] += module not in seen
        kind["parameters"] += _size(parameter)
        seen.add(module)
    trainable = sum(kind["parameters"] for kind in kinds.values())
    total = sum(map(_size, model.parameters()))
    return {"trainable": trainable, "total": total, "kinds": kinds}


def module_of(parameter: str, prefix: str) -> str:
    """The module, by its name in the base model, that a trained parameter is of; the method's start with `prefix`."""
    return re.split(rf"\.(?:{re.escape(prefix)}|modules_to_save\.)", parameter.removeprefix(PREFIX))[0]


def _size(parameter: torch.nn.Parameter) -> int:
    # DeepSpeed ZeRO-3 leaves an empty tensor
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_table(parameters: dict[str, Any]) -> str:
    """`trainable_parameters` for the eye."""
    rows = [["trainable", "modules", "parameters"]]
    rows += [[name, str(kind["modules"]), f"{kind['parameters']:,}"] for name, kind in parameters["kinds"].items()]
    trainable, total = parameters["trainable"], parameters["total"]
    return f"{format_table(rows)}\n{trainable:,} of {total:,} parameters are trainable ({trainable / total:.2%})"


def result_table(results: dict[str, Any]) -> str:
    """Metrics on the test split before and after training, the baseline beside them."""
    columns = {"before": results["before"], "after": results["after"]}
    if baseline := results["baseline"]:
        columns[baseline["name"]] = baseline
    states = " and ".join(results["states"])
    compared = f"the outputs of the {states} adapter are those of the trained one"
    seconds = results["seconds"]
    return (
        f"{metric_table('test split', columns, results['after'])}\n"
        f"{compared if states else 'the saved adapter was not compared with the trained one (verify: false)'}\n"
        f"{seconds['total']:.0f} s in total, {seconds['training']:.0f} s of training ({results['steps']} steps)"
    )


def metric_table(title: str, columns: Mapping[str, Mapping[str, float]], metrics: Iterable[str]) -> str:
    """A row for each metric, a column for each state that was measured."""
    rows = [[title, *columns]]
    for metric in metrics:
        cells = (column.get(metric) for column in columns.values())
        rows.append([metric, *("-" if value is None else f"{value:.4f}" for value in cells)])
    return format_table(rows)


def save_curves(path: Path, history: list[dict[str, float]], results: dict[str, Any], headline: str) -> None:
    """A PNG: the loss while training, the headline metric before, while and after, and how far DLoR layers moved."""
    moved = _series(history, "dlor_norm_max")[0]
    figure = Figure(figsize=(10, 8 if moved else 4), layout="constrained")
    panels = figure.subplots(2 if moved else 1, 2, squeeze=False)
    losses, metrics = panels[0]
    losses.plot(*_series(history, "loss"), label="train")
    if (dev := _series(history, "eval_loss"))[0]:
        losses.plot(*dev, "o-", label="dev")
    losses.set(xlabel="step", ylabel="loss", title="while training")
    losses.legend()

    metrics.plot([0, results["steps"]], [results["before"][headline], results["after"][headline]], "s", label="test")
    if (dev := _series(history, f"eval_{headline}"))[0]:
        metrics.plot(*dev, "o-", label="dev")
    if results["baseline"] and headline in results["baseline"]:
        metrics.axhline(results["baseline"][headline], color="grey", ls="--", label=results["baseline"]["name"])
    metrics.set(xlabel="step", ylabel=headline, title="before and after")
    metrics.legend()
    if moved:
        for axes, (key, title) in zip(panels[1], MOVES.items(), strict=True):
            for of_layers in ("max", "mean"):
                axes.plot(*_series(history, f"{key}_{of_layers}"), label=f"{of_layers} of the layers")
            axes.set(xlabel="step", ylabel=title)
            axes.legend()
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def training_facts(recipe: Recipe, arguments: TrainingArguments, results: dict[str, Any]) -> dict[str, str]:
    """What the model card tells of the run: its data, how long and how fast it learned, and what came of it."""
    data = recipe.data
    parameters = results["parameters"]
    facts = {
        "task": recipe.task.type,
        # of local files the names alone: the folders are nobody else's business
        "data": " ".join(filter(None, (data.dataset, data.name)))
        or ", ".join(f"{split}: {Path(file).name}" for split, file in data.files.items()),
        "steps": str(results["steps"]),
        "batch size": str(arguments.train_batch_size * arguments.gradient_accumulation_steps),
        "learning rate": f"{arguments.learning_rate:g}",
        "seed": str(recipe.seed),
        "trainable parameters": f"{parameters['trainable']:,} of {parameters['total']:,}",
    }
    for metric, after in results["after"].items():
        facts[f"{metric} on the test split"] = f"{after:.4f} ({results['before'][metric]:.4f} before training)"
    versions = {package: number for package, number in installed_versions().items() if number}
    return {**facts, "versions": ", ".join(f"{package} {number}" for package, number in versions.items())}


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that decide the result; None for one that is not installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _series(history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    logged = [entry for entry in history if key in entry]
    return [entry["step"] for entry in logged], [entry[key] for entry in logged]
