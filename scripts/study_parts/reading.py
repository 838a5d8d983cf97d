"""What the rows of one task say: of each arm (method, budget), its best learning rate, its values, its size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan, nan
from typing import Any

from .results import Run
from .training import SELECTION_SEEDS

HEADLINES = {"accuracy": True, "spearman": True, "exact_match": True, "bits_per_byte": False}
"""Metric -> whether more of it is better."""

MARGINS = {"accuracy": 0.01, "spearman": 0.01, "exact_match": 0.01, "bits_per_byte": 0.02}
"""What would not matter to a user."""

Arm = tuple[str, int]
"""Method and budget k."""


@dataclass(frozen=True)
class Choice:
    """A learning rate, its mean value on dev, and over how many seeds."""

    lr: float
    value: float
    num_seeds: int


@dataclass(frozen=True)
class Reading:
    task: str
    rows: Mapping[Run, dict[str, Any]] = field(repr=False)
    """Of this task alone."""

    @cached_property
    def metric(self) -> str:
        found = {name for row in self.rows.values() for name in row.get("dev") or row.get("test") or ()}
        return next((name for name in HEADLINES if name in found), next(iter(HEADLINES)))

    @property
    def sign(self) -> int:
        """By which a metric grows as it gets better."""
        return 1 if HEADLINES[self.metric] else -1

    @property
    def margin(self) -> float:
        return MARGINS[self.metric]

    @cached_property
    def dev(self) -> dict[Arm, dict[float, dict[int, float]]]:
        """The value on dev at each learning rate, ascending, of each selection seed; nan of what diverged."""
        found: dict[Arm, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for run in sorted(self.rows):
            if run.seed in SELECTION_SEEDS:
                row = self.rows[run]
                found[run.method, run.k][run.lr][run.seed] = nan if "diverged" in row else row["dev"][self.metric]
        return dict(found)

    def first(self, arm: Arm) -> dict[float, float]:
        """The value on dev of the first seed, by learning rate, best first, of equal ones the smaller rate."""
        values = {lr: of_rate[SELECTION_SEEDS[0]] for lr, of_rate in self.dev.get(arm, {}).items()}
        finite = [(lr, value) for lr, value in values.items() if not isnan(value)]
        return dict(sorted(finite, key=lambda item: (-self.sign * item[1], item[0])))

    def finalists(self, arm: Arm) -> list[float]:
        """The two learning rates that the further seeds decide between."""
        return list(self.first(arm))[:2]

    def best(self, arm: Arm) -> Choice | None:
        """The finalist with the best mean; the first of them while seeds are missing; None where all diverged."""
        values = {lr: list(self.dev[arm][lr].values()) for lr in self.finalists(arm)}
        if any(len(of_rate) < len(SELECTION_SEEDS) for of_rate in values.values()):
            values = {lr: [value] for lr, value in self.first(arm).items()}
        choices = [Choice(lr, sum(of_rate) / len(of_rate), len(of_rate)) for lr, of_rate in values.items()]
        finite = [choice for choice in choices if not isnan(choice.value)]
        return max(finite, key=lambda choice: (self.sign * choice.value, -choice.lr)) if finite else None

    def reported(self, arm: Arm) -> dict[int, dict[str, Any]]:
        """The row of each fresh seed, on test, at the learning rate that dev chose; with those that diverged."""
        best = self.best(arm)
        fresh = [run for run in sorted(self.rows) if (run.method, run.k) == arm and run.seed not in SELECTION_SEEDS]
        return {run.seed: self.rows[run] for run in fresh if best is None or run.lr == best.lr}

    def num_diverged(self, arm: Arm) -> int:
        """Of the fresh seeds."""
        return sum("diverged" in row for row in self.reported(arm).values())

    @cached_property
    def test(self) -> dict[Arm, dict[int, float]]:
        """The value on test of each fresh seed."""
        found = {}
        for arm in dict.fromkeys((run.method, run.k) for run in sorted(self.rows)):
            rows = self.reported(arm)
            if values := {seed: row["test"][self.metric] for seed, row in rows.items() if "test" in row}:
                found[arm] = values
        return found

    @cached_property
    def parameters(self) -> dict[Arm, int]:
        """Trained ones beside the head."""
        return {(run.method, run.k): row["parameters"] for run, row in self.rows.items() if "parameters" in row}

    @cached_property
    def adapter_bytes(self) -> dict[Arm, int]:
        """Of the tensors that are saved, beside the head."""
        return {(run.method, run.k): row["adapter_bytes"] for run, row in self.rows.items() if "adapter_bytes" in row}

    @cached_property
    def ranks(self) -> dict[Arm, dict[str, int]]:
        """Rank -> how many layers have it."""
        return {(run.method, run.k): row["ranks"] for run, row in self.rows.items() if "ranks" in row}


def read(rows: Mapping[Run, dict[str, Any]]) -> dict[str, Reading]:
    """By task, in the order in which tasks first appear."""
    by_task: dict[str, dict[Run, dict[str, Any]]] = defaultdict(dict)
    for run, row in rows.items():
        by_task[run.task][run] = row
    return {task: Reading(task, of_task) for task, of_task in by_task.items()}
