"""What the adapter of each layer has become, per logging step: into the Trainer's logs, and in full into a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import TrainerCallback

from dlor_peft.deploy.adapter import PREFIX
from dlor_peft.facts import LayerFacts, layer_facts
from dlor_peft.layers import DLoRLayer, owned_adapters
from dlor_peft.layers.placement import whole

from .folder import atomic

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

Facts = dict[str, LayerFacts]
"""By the name of the layer in the base model."""


class DivergenceError(ValueError):
    """Training has left the range where its result could be of use."""


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, str, DLoRLayer]]:
    """(name in the base model, adapter, layer) of the active adapters, tied tensors once."""
    unwrapped: Any = extract_model_from_parallel(model)
    for name, layer, adapter in owned_adapters(unwrapped):
        if adapter in layer.active_adapters:
            yield name.removeprefix(PREFIX).replace(".base_layer", ""), adapter, layer


def facts_of(model: nn.Module) -> Facts:
    """The facts of every DLoR layer, in float64 on the CPU. Where tensors are sharded, all processes must call.

    Raises:
        DivergenceError: a layer's factors are not finite, or multiply to more than float64 holds.
    """
    facts = {}
    for name, adapter, layer in adapted_layers(model):
        form = layer.form[adapter]
        weights = {part: getattr(layer, part)[adapter].weight for part in form.shapes}
        with torch.no_grad(), gather_params_ctx(list(weights.values()), modifier_rank=None):
            tensors = {part: whole(weight).to("cpu", torch.float64) for part, weight in weights.items()}
            try:
                facts[name] = layer_facts(form, form.residual(tensors))
            except OverflowError as error:
                raise DivergenceError(f"the adapter of {name} is broken: {error}") from error
    return facts


def summary(facts: Facts) -> dict[str, float | str]:
    """What is logged of them, over all layers: flat, with the worst layer by name."""
    drifts = [layer.diagonal_deviation for layer in facts.values()]
    norms = [layer.frobenius_norm for layer in facts.values()]
    logged: dict[str, float | str] = {
        "dlor_alpha_drift_mean": sum(drifts) / len(drifts),
        "dlor_alpha_drift_max": max(drifts),
        "dlor_norm_mean": sum(norms) / len(norms),
        "dlor_norm_max": max(norms),
        "dlor_effective_rank": sum(layer.effective_rank for layer in facts.values()) / len(facts),
    }
    if worst := worst_bound(facts):
        logged |= {"dlor_condition_bound": worst[1], "dlor_condition_bound_layer": worst[0]}
    return logged


def worst_bound(facts: Facts) -> tuple[str, float] | None:
    """The layer of the highest condition bound, and the bound; None where no layer has one."""
    bounds = {name: layer.condition_bound for name, layer in facts.items() if layer.condition_bound is not None}
    return max(bounds.items(), key=lambda item: item[1]) if bounds else None


class WatchLayers(TrainerCallback):
    """Adds `summary` to the logs of each logging step, and a line with the facts of each layer to a file.

    It has to run before the callbacks that report: what it adds to the logs is what they send.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.facts: Facts = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # of a run that goes on, what it did before it was saved
            kept = [line for line in read_history(self._file) if line["step"] <= state.global_step]
            with atomic(self._file) as partial:
                partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:
            # of an evaluation, or of the end
            return
        self.facts = facts_of(kwargs["model"])
        added = summary(self.facts)
        logs |= added
        # the Trainer keeps a copy that it made before
        state.log_history[-1] |= added  # pyright: ignore[reportArgumentType, reportCallIssue]
        if state.is_world_process_zero:
            line = json.dumps({"step": state.global_step, "layers": as_json(self.facts)}, allow_nan=False)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def as_json(facts: Facts) -> dict[str, dict[str, float | None]]:
    """Without infinities, which JSON has not."""
    return {name: finite(asdict(layer)) for name, layer in facts.items()}


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """None in the place of each number that is infinite or none."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def read_history(file: Path) -> list[dict[str, Any]]:
    """The lines that `WatchLayers` wrote: step, and layers by name. A last line that is cut off is left out."""
    if not file.is_file():
        return []
    # what follows the last line's end is empty, or was cut off
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
