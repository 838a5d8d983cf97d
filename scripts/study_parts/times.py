"""Time of a training step of every method over LoRA's, in turn in one process, and the bytes that autograd keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from benchmark.measuring import FROZEN, Rounds, measure, saved_bytes, spread
from torch import Tensor, nn

from dlor_peft.training.folder import atomic

from .methods import has_budget
from .results import Run, hardware
from .sources import Sources
from .task import Task
from .tasks import tasks
from .training import adapted, optimizer_of

REFERENCE = "lora"


class TrainingStep:
    """Forward and backward pass and AdamW on one batch, again and again."""

    def __init__(self, task: Task, run: Run, batch: list[Any]) -> None:
        model, self.facts = adapted(task, run)
        self.task, self.batch = task, batch
        self.model: nn.Module = model.to("cuda" if torch.cuda.is_available() else "cpu").train()
        self.optimizer, _ = optimizer_of(task, run, self.model)

    def prepare(self) -> None:
        self.optimizer.zero_grad()

    def forward(self) -> Tensor:
        return self.task.loss(self.model, self.batch)

    def run(self) -> None:
        self.forward().backward()
        self.optimizer.step()


def measure_times(sources: Sources, name: str, methods: list[str], k: int, rounds: int) -> dict[str, Any]:
    """Of one task at one budget: method -> median and quartiles over LoRA's, bytes kept over LoRA's, adapter bytes.

    `itself` is LoRA's time over LoRA's, which `is_void` finds too far from 1: the machine was too busy to measure on.
    """
    torch.set_num_threads(1)
    task = tasks(sources)[name]
    batch = next(iter(task.batches(0)))

    def step_of(method: str) -> TrainingStep:
        return TrainingStep(task, Run(name, method, k if has_budget(method) else 0, 1e-4, 0), batch)

    reference, steps = step_of(REFERENCE), {method: step_of(method) for method in methods}
    for step in (reference, *steps.values()):
        for _ in range(2):
            step.prepare()
            step.run()
    found = measure(reference, steps, "cuda" if torch.cuda.is_available() else "cpu", rounds, iterations=1)
    kept = saved_bytes(reference.model, reference.forward)
    return {
        "task": name,
        "k": k,
        "rounds": rounds,
        "itself": found.ratio(FROZEN).median,
        "is_void": found.is_void,
        "seconds_lora": sorted(found.frozen_seconds)[len(found.frozen_seconds) // 2],
        "methods": {method: _of(found, method, step, kept) for method, step in steps.items()},
    }


def _of(found: Rounds, method: str, step: TrainingStep, kept: int) -> dict[str, Any]:
    return {
        **spread(found.ratios[method])._asdict(),
        "kept": saved_bytes(step.model, step.forward) / kept,
        "adapter_bytes": step.facts["adapter_bytes"],
    }


def read_times(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    path = _path(folder, name or hardware())
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def add_times(times: dict[str, Any], folder: Path) -> None:
    """In the place of those of the same task and budget."""
    others = [one for one in read_times(folder) if (one["task"], one["k"]) != (times["task"], times["k"])]
    with atomic(_path(folder, hardware())) as partial:
        partial.write_text(json.dumps([*others, times], indent=1) + "\n", encoding="utf-8")


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}-times.json"
