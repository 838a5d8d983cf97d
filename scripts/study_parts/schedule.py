"""Which runs a cell (task, method, budget) still lacks: a grid of learning rates on dev, then fresh seeds on test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, PROBE, Layers, allocate, has_budget
from .results import Run
from .task import Task
from .training import SELECTION_SEED

GRID = (-6, -5, -4)
"""Learning rates 10^(i / 2): 1e-3, 3.2e-3, 1e-2 for everybody, and on by half-decades while the best is at an edge."""

LIMITS = (-10, 0)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    k: int

    def run(self, exponent: int, seed: int) -> Run:
        return Run(self.task, self.method, self.k, rate(exponent), seed)


def rate(exponent: int) -> float:
    return float(f"{10 ** (exponent / 2):.2e}")


def cells(tasks: Iterable[str], methods: Iterable[str], budgets: Iterable[int]) -> list[Cell]:
    """Task by task, and in it budget by budget, all methods: what is cut off is cut off for all of them."""
    found = []
    for task in tasks:
        for k in budgets:
            found += [Cell(task, method, k) for method in methods if has_budget(method)]
        found += [Cell(task, method, 0) for method in methods if not has_budget(method)]
    return found


def is_possible(cell: Cell, task: Task, layers: Layers) -> bool:
    """Whether the task has a head for what trains nothing else, and a method a form of the budget's size."""
    if cell.method in ("head", PROBE):
        return task.head is not None
    return not has_budget(cell.method) or allocate(METHODS[cell.method], layers, cell.k) is not None


def missing(cell: Cell, task: Task, rows: Mapping[Run, dict[str, Any]], num_seeds: int) -> list[Run]:
    """The next runs that can go side by side."""
    if cell.method == PROBE:
        runs = [Run(cell.task, PROBE, 0, 0.0, seed) for seed in SEEDS[:num_seeds]]
        return [run for run in runs if run not in rows]
    grid = _missing_of_grid(cell, task, rows)
    if grid:
        return grid
    best = _best(cell, task, rows)
    return [] if best is None else [r for s in SEEDS[:num_seeds] if (r := cell.run(best, s)) not in rows]


def _missing_of_grid(cell: Cell, task: Task, rows: Mapping[Run, dict[str, Any]]) -> list[Run]:
    wanted: list[int] = list(GRID)
    while True:
        lacking = [run for exponent in wanted if (run := cell.run(exponent, SELECTION_SEED)) not in rows]
        if lacking:
            return lacking
        best = _best(cell, task, rows, wanted)
        if best in (None, min(wanted)) and min(wanted) > LIMITS[0]:
            wanted.append(min(wanted) - 1)
        elif best == max(wanted) and max(wanted) < LIMITS[1]:
            wanted.append(max(wanted) + 1)
        else:
            return []


def _best(
    cell: Cell,
    task: Task,
    rows: Mapping[Run, dict[str, Any]],
    exponents: Iterable[int] = range(LIMITS[0], LIMITS[1] + 1),
) -> int | None:
    scores = {}
    for exponent in exponents:
        row = rows.get(cell.run(exponent, SELECTION_SEED))
        if row is not None and "diverged" not in row:
            score = row["dev"][task.headline]
            scores[exponent] = score if task.is_higher_better else -score
    # the smaller rate where two are equal
    return max(scores, key=lambda exponent: (scores[exponent], -exponent)) if scores else None
