"""The three states of an adapter - as trained, saved and reloaded, merged - must give the same outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .load import load_trained
from .tasks.base import Comparison, Outputs, Task


class StateMismatchError(ValueError):
    """The reloaded or merged adapter does not do what the trained one did: the saved artefact cannot be trusted."""


def check_states(task: Task[Outputs], trained: Outputs, adapter: Path, device: torch.device) -> dict[str, Any]:
    """The comparisons of the reloaded and of the merged state with the outputs of the trained one, by state.

    `adapter` is reloaded into a fresh base model, and that one is merged. Methods that learn a prompt have no merged
    state and are not asked for one.
    """
    model = load_trained(adapter)[0]
    if task.recipe.model.device_map is None and not task.recipe.model.quantization:
        model.to(device)
    facts = {"reloaded": _compare(task, trained, model, "reloaded", adapter)}
    config = model.peft_config["default"]
    if config.is_prompt_learning:
        print(f"merged: {type(config).__name__} has no merged state")
    elif task.recipe.model.quantization:
        print("merged: a quantised base would be quantised anew; dlor merge merges into the original")
    else:
        facts["merged"] = _compare(task, trained, model.merge_and_unload(), "merged", adapter)
    return facts


def _compare(task: Task[Outputs], trained: Outputs, model: Any, state: str, adapter: Path) -> dict[str, Any]:
    return compare_state(task.compare(trained, task.run(model)), model.dtype, state, adapter)


def compare_state(comparison: Comparison, dtype: torch.dtype, state: str, adapter: Path) -> dict[str, Any]:
    """The facts of a comparison that rounding in `dtype` explains.

    Raises:
        StateMismatchError: it does not.
    """
    num_outputs, largest = comparison.num_outputs, comparison.max_abs_difference
    # half the digits of the weights: far above what merging rounds away, far below what a wrong tensor does
    allowed = torch.finfo(dtype).eps ** 0.5 * (comparison.max_abs_logit or 0.0)
    finding = comparison.first_difference
    if comparison.largest_lead is not None and comparison.largest_lead <= allowed:
        print(f"{state}: {comparison.num_different} of {num_outputs} outputs differ by a choice that rounding turns")
        finding = ""
    if not finding and largest is not None and not largest <= allowed:
        finding = f"a logit differs by {largest:.1e}, where rounding explains {allowed:.1e}"
    if finding:
        raise StateMismatchError(
            f"the {state} adapter ({adapter}) is not the trained one: {comparison.num_different} of {num_outputs} "
            f"outputs differ, {finding}. Do not use it. If the model is in bfloat16 or float16, rounding may be the "
            f"reason: try model.dtype=float32."
        )
    note = "" if largest is None else f", largest logit difference {largest:.1e}"
    print(f"{state}: {num_outputs - comparison.num_different} of {num_outputs} outputs as trained{note}")
    return {name: value for name, value in dataclasses.asdict(comparison).items() if name != "first_difference"}
