"""When to choose DLoR: what the rows answer, each question in a table of its own."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .reading import Cell, Reading
from .statistics import Difference, holm, paired

DLOR = "dlor scaled"
"""The default form."""

SMALL = (1, 2)

DEPTHS = {1: "dlor multiplicative", 2: "dlor multiplicative depth 2", 4: "dlor multiplicative depth 4"}


def answers(readings: Iterable[Reading], times: list[dict[str, Any]]) -> list[str]:
    """In Markdown; a question that no row answers yet is left out."""
    readings = list(readings)
    tables = (
        _small_budgets(readings),
        _forgetting(readings),
        _robustness(readings),
        _alignment(readings),
        _dora(readings, times),
    )
    return [table for table in tables if table]


def compare(reading: Reading, one: Cell, other: Cell) -> Difference | None:
    """Test, seed by seed, of the same seeds; None of fewer than three."""
    values, others = reading.test.get(one, {}), reading.test.get(other, {})
    seeds = sorted(set(values) & set(others))
    if len(seeds) < 3 or one == other:
        return None
    return paired([values[s] for s in seeds], [others[s] for s in seeds], reading.margin)


def shown(found: Difference) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _table(title: str, text: str, head: str, lines: list[str]) -> str:
    if not lines:
        return ""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join((f"## {title}", "", text, "", head, rule, *lines))


def _small_budgets(readings: list[Reading]) -> str:
    found = {
        (reading.task, k, method): difference
        for reading in readings
        for k in SMALL
        for method in sorted({method for method, _ in reading.test if method.startswith("dlor")})
        if (difference := compare(reading, (method, k), ("lora", k)))
    }
    corrected = holm({str(key): difference.p for key, difference in found.items()})
    lines = [
        f"| {task} | {k} | {method} | {shown(difference)} | {corrected[str((task, k, method))]:.3f} "
        f"| {difference.is_equivalent} |"
        for (task, k, method), difference in found.items()
    ]
    return _table(
        "Budgets of LoRA r 1 and 2",
        "Test metric less LoRA's, paired by seed, 95% bootstrap interval; Holm over this table.",
        "| task | k | method | difference | p (Holm) | equivalent |",
        lines,
    )


def _forgetting(readings: list[Reading]) -> str:
    lines = []
    for reading in readings:
        for cell in reading.test:
            pairs = _at_equal_loss(reading, cell, ("lora", cell[1] or 8))
            if len(pairs) < 3 or cell[0] == "lora":
                continue
            difference = paired(*zip(*pairs, strict=True), margin=reading.margin)
            lines.append(
                f"| {reading.task} | {cell[1] or '-'} | {cell[0]} | {np.mean([own for own, _ in pairs]):.3f} "
                f"| {np.mean([lora for _, lora in pairs]):.3f} | {shown(difference)} | {difference.p:.3f} |"
            )
    return _table(
        "Forgetting at equal task loss",
        "Bits a byte on what the base was trained on, where a run and LoRA's of the same seed have the same task "
        "loss, the higher of their last two: interpolated on the way of the other one.",
        "| task | k | method | base | base, LoRA | difference | p |",
        lines,
    )


def _at_equal_loss(reading: Reading, cell: Cell, other: Cell) -> list[tuple[float, float]]:
    paths, others = (
        {seed: _path(reading, row) for seed, row in reading.reported(of_cell).items() if "path" in row}
        for of_cell in (cell, other)
    )
    pairs = []
    for seed in sorted(set(paths) & set(others)):
        target = max(paths[seed][-1][0], others[seed][-1][0])
        pairs.append((_base_at(paths[seed], target), _base_at(others[seed], target)))
    return pairs


def _path(reading: Reading, row: dict[str, Any]) -> list[tuple[float, float]]:
    """Task and base loss, from the start to the end of the run."""
    return [(task, base) for _, task, base in row["path"]] + [(row["test"][reading.metric], row["base_loss"])]


def _base_at(path: list[tuple[float, float]], target: float) -> float:
    """The base loss where the task loss falls to the target for the last time."""
    for (task, base), (next_task, next_base) in reversed(list(pairwise(path))):
        if task >= target >= next_task:
            share = (task - target) / (task - next_task) if task > next_task else 1.0
            return base + share * (next_base - base)
    return path[-1][1]


def _robustness(readings: list[Reading]) -> str:
    lines = []
    for reading in readings:
        budgets = sorted({k for _, k in reading.dev if k > 0})
        series: dict[str, dict[int, Cell]] = {
            f"{method} | k": {k: (method, k) for k in budgets}
            for method in sorted({method for method, _ in reading.dev})
        }
        series |= {
            f"dlor multiplicative, k {k} | depth": {depth: (method, k) for depth, method in DEPTHS.items()}
            for k in budgets
        }
        for name, cells in series.items():
            values = {at: first for at, cell in cells.items() if (first := reading.first(cell))}
            if len(values) < 2:
                continue
            best = {at: next(iter(first)) for at, first in values.items()}
            kept = best[min(best)]
            lost = [reading.sign * (first[best[at]] - first[kept]) for at, first in values.items() if kept in first]
            rates = ", ".join(f"{at}: {lr:.2g}" for at, lr in best.items())
            lines.append(
                f"| {reading.task} | {name} | {rates} | {f'{max(lost) + 0.0:.4f}' if lost[1:] else 'not tried'} |"
            )
    return _table(
        "The learning rate over budgets and depths",
        "The best on dev with the first seed, and the most that is lost there by keeping the one of the smallest.",
        "| task | method | over | learning rates | lost |",
        lines,
    )


def _alignment(readings: list[Reading]) -> str:
    found = []
    for reading in readings:
        full = reading.best(("full", 0))
        of_full = [row for run, row in reading.rows.items() if full and (run.method, run.lr) == ("full", full.lr)]
        indices = [row["alignment"] for row in of_full if "alignment" in row]
        gains = {k: difference for k in (1, 2, 4, 8) if (difference := compare(reading, (DLOR, k), ("lora", k)))}
        if indices and gains:
            rows, columns = (float(np.mean([index[axis] for index in indices])) for axis in ("rows", "columns"))
            k = min(gains)
            # in units of what would not matter, so that tasks can be compared
            found.append((reading, k, rows, columns, gains[k], reading.sign * gains[k].mean / reading.margin))
    lines = [
        f"| {reading.task} | {rows:.2f} | {columns:.2f} | {k} | {shown(gain)} | {units:+.2f} |"
        for reading, k, rows, columns, gain, units in found
    ]
    text = (
        "Alignment index of what full fine-tuning changed (rows, columns; mean over the layers), and what DLoR gains "
        "over LoRA at the smallest budget, on test and in margins of equivalence."
    )
    if len(found) >= 3:
        correlation: Any = spearmanr([one[2] for one in found], [one[5] for one in found])
        text += f" Spearman's correlation of rows and gain: {correlation.statistic:+.2f} over {len(found)} tasks."
    return _table(
        "The alignment index as a predictor", text, "| task | rows | columns | k | gain | in margins |", lines
    )


def _dora(readings: list[Reading], times: list[dict[str, Any]]) -> str:
    lines = []
    for reading in readings:
        for k in sorted({k for _, k in reading.test}):
            difference = compare(reading, (DLOR, k), ("dora", k))
            if difference is None:
                continue
            of_task = [one["methods"] for one in times if one["task"] == reading.task and one["k"] == k]
            ratio = f"{of_task[0][DLOR]['median'] / of_task[0]['dora']['median']:.2f}" if of_task else ""
            lines.append(f"| {reading.task} | {k} | {shown(difference)} | {difference.is_equivalent} | {ratio} |")
    return _table(
        "DLoR and DoRA",
        "Test metric of DLoR less DoRA's, paired by seed, and the time of a training step over DoRA's.",
        "| task | k | difference | equivalent | time over DoRA's |",
        lines,
    )
