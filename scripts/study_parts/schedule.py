"""Which runs a cell (task, method, budget) still lacks: learning rates on dev, then fresh seeds on test.

A grid with one seed, then its two best rates with two further ones; the better by the mean of the three is reported,
unless it is at an edge of the grid, which then goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .methods import METHODS, PROBE, Layers, allocate, has_budget, rank_counts
from .reading import Reading
from .results import Run
from .sentences import Sentences
from .task import Task
from .training import SELECTION_SEEDS

GRID = (-6, -5, -4)
"""Learning rates 10^(i / 2): 1e-3, 3.2e-3, 1e-2 for everybody, and on by half-decades while the best is at an edge."""

LIMITS = (-10, 0)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    k: int

    def run(self, lr: float, seed: int) -> Run:
        return Run(self.task, self.method, self.k, lr, seed)


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
    """Whether the task has what is trained alone, and a method a form of the budget's size."""
    if cell.method == PROBE:
        return isinstance(task, Sentences)
    if cell.method == "head":
        return task.head is not None
    return not has_budget(cell.method) or allocate(METHODS[cell.method], layers, cell.k) is not None


def of_another_setting(
    cell: Cell, task: Task, layers: Mapping[str, Layers], rows: Mapping[Run, dict[str, Any]]
) -> list[Run]:
    """Runs of the cell that can't be compared with new ones."""
    ranks = allocate(METHODS[cell.method], layers[cell.task], cell.k) if has_budget(cell.method) else None
    now = {"setting": task.setting, **({"ranks": rank_counts(ranks)} if ranks else {})}
    of_cell = [run for run in rows if (run.task, run.method, run.k) == (cell.task, cell.method, cell.k)]
    return (
        [] if cell.method == PROBE else [run for run in of_cell if any(rows[run][name] != now[name] for name in now)]
    )


def missing(cell: Cell, reading: Reading, num_seeds: int) -> list[Run]:
    """The next runs of a cell of its task that can go side by side; without seeds to report, the grid alone."""
    rows = reading.rows
    if cell.method == PROBE:
        return _lacking(cell, rows, (0.0,), SEEDS[:num_seeds])
    grid = _missing_of_grid(cell, reading)
    if grid or not num_seeds:
        return grid
    again = _lacking(cell, rows, reading.finalists((cell.method, cell.k)), SELECTION_SEEDS[1:])
    if again:
        return again
    best = reading.best((cell.method, cell.k))
    return _lacking(cell, rows, (best.lr,), SEEDS[:num_seeds]) if best else []


def _lacking(
    cell: Cell, rows: Mapping[Run, dict[str, Any]], rates: Iterable[float], seeds: Iterable[int]
) -> list[Run]:
    return [run for lr in rates for seed in seeds if (run := cell.run(lr, seed)) not in rows]


def _missing_of_grid(cell: Cell, reading: Reading) -> list[Run]:
    low, high = GRID[0], GRID[-1]
    while True:
        rates = [rate(exponent) for exponent in range(low, high + 1)]
        if lacking := _lacking(cell, reading.rows, rates, SELECTION_SEEDS[:1]):
            return lacking
        best = reading.best((cell.method, cell.k))
        if (best is None or best.lr <= rates[0]) and low > LIMITS[0]:
            low -= 1
        elif best and best.lr >= rates[-1] and high < LIMITS[1]:
            high += 1
        else:
            return []
