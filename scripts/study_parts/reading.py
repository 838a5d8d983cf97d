"""What the rows of one task say: of each cell (method, budget), its best learning rate, its values, its size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .results import Run
from .training import SELECTION_SEED

HEADLINES = {"accuracy": True, "spearman": True, "exact_match": True, "bits_per_byte": False}
"""Metric -> whether more of it is better."""

MARGINS = {"accuracy": 0.01, "spearman": 0.01, "exact_match": 0.01, "bits_per_byte": 0.02}
"""What would not matter to a user."""

Cell = tuple[str, int]
"""Method and budget k."""


@dataclass(frozen=True)
class Reading:
    task: str
    rows: Mapping[Run, dict[str, Any]] = field(repr=False)
    """Of this task alone, without those that diverged."""

    @cached_property
    def metric(self) -> str:
        metrics = next(row.get("dev") or row["test"] for row in self.rows.values())
        return next(name for name in HEADLINES if name in metrics)

    @property
    def sign(self) -> int:
        """By which a metric grows as it gets better."""
        return 1 if HEADLINES[self.metric] else -1

    @property
    def margin(self) -> float:
        return MARGINS[self.metric]

    @cached_property
    def dev(self) -> dict[Cell, dict[float, float]]:
        """The value on dev at each learning rate, ascending."""
        found: dict[Cell, dict[float, float]] = defaultdict(dict)
        for run, row in sorted(self.rows.items()):
            if run.seed == SELECTION_SEED and "dev" in row:
                found[run.method, run.k][run.lr] = row["dev"][self.metric]
        return dict(found)

    @cached_property
    def test(self) -> dict[Cell, dict[int, float]]:
        """The value on test of each fresh seed, at the learning rate that dev chose."""
        found: dict[Cell, dict[int, float]] = defaultdict(dict)
        for run, row in sorted(self.rows.items()):
            if "test" in row:
                found[run.method, run.k][run.seed] = row["test"][self.metric]
        return dict(found)

    @cached_property
    def parameters(self) -> dict[Cell, int]:
        """Trained ones beside the head."""
        return {(run.method, run.k): row["parameters"] for run, row in self.rows.items() if "parameters" in row}

    def best(self, cell: Cell) -> tuple[float, float]:
        """The learning rate that is best on dev, the smaller of two that are equal, and the value there."""
        return max(self.dev[cell].items(), key=lambda item: (self.sign * item[1], -item[0]))

    def of(self, cell: Cell) -> list[tuple[Run, dict[str, Any]]]:
        return [(run, row) for run, row in self.rows.items() if (run.method, run.k) == cell]


def read(rows: Mapping[Run, dict[str, Any]]) -> dict[str, Reading]:
    """By task, in the order in which tasks first appear."""
    by_task: dict[str, dict[Run, dict[str, Any]]] = defaultdict(dict)
    for run, row in rows.items():
        if "diverged" not in row:
            by_task[run.task][run] = row
    return {task: Reading(task, of_task) for task, of_task in by_task.items()}
