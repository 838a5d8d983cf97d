"""The figure of a report: test metrics against parameters, and what DLoR gains over the others, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .methods import PROBE, has_budget
from .questions import COMPARED, headline
from .reading import MARGINS, Arm, Reading
from .statistics import Difference

COLUMNS = 2


def draw(readings: list[Reading], path: Path) -> None:
    """Nothing where no method has seeds enough for an interval."""
    from matplotlib.figure import Figure

    curves = [reading for reading in readings if len({k for _, k in _drawn(reading) if k}) > 1]
    gains = {name: found for name, method in COMPARED.items() if (found := headline(readings, method))}
    num_cells = sum(len(found) for found in gains.values())
    heights = [4.0] * -(-len(curves) // COLUMNS) + ([1.2 + 0.24 * num_cells] if gains else [])
    if not heights:
        return
    figure = Figure(figsize=(6.0 * COLUMNS, sum(heights) + 1), layout="constrained")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    methods = list(dict.fromkeys(method for reading in curves for method, _ in _drawn(reading)))
    handles: dict[str, Any] = {}
    for place, reading in enumerate(curves):
        handles |= _metric_by_size(figure.add_subplot(grid[place // COLUMNS, place % COLUMNS]), reading, methods)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=6, fontsize=8)
    if gains:
        units = {reading.task: reading.sign / reading.margin for reading in readings}
        _gains(figure.add_subplot(grid[-1, :]), gains, units)
    figure.savefig(path, dpi=110)


def _metric_by_size(axes: Any, reading: Reading, methods: list[str]) -> dict[str, Any]:
    """With 95% t intervals of the mean over seeds; methods of equal size stand side by side."""
    handles = {}
    for index, method in enumerate(methods):
        arms = sorted((arm for arm in _drawn(reading) if arm[0] == method), key=lambda arm: arm[1])
        if not arms:
            continue
        means, widths = zip(*(_interval(list(reading.test[arm].values())) for arm in arms), strict=True)
        is_ours = method.startswith("dlor")
        handles[method] = axes.errorbar(
            [reading.parameters[arm] * (0.9 + 0.2 * index / max(1, len(methods) - 1)) for arm in arms],
            means,
            yerr=widths,
            color=f"C{index % 10}",
            marker=("o^v" if is_ours else "sDP" if has_budget(method) else "*X+")[index // 10],
            linewidth=2 if is_ours else 1,
            linestyle="-" if is_ours else "--",
            capsize=3,
        )
    axes.set(
        xscale="log",
        xlabel="trained parameters beside the head, within 10%",
        title=f"{reading.task}: {reading.metric}",
    )
    sizes = {k: reading.parameters[method, k] for method, k in _drawn(reading) if method == "lora" or not k}
    axes.set_xticks(list(sizes.values()), [f"{size:,}\n{f'k {k}' if k else ''}" for k, size in sizes.items()])
    axes.set_xticks([], minor=True)
    return handles


def _gains(axes: Any, gains: Mapping[str, Mapping[tuple[str, int], Difference]], units: Mapping[str, float]) -> None:
    """With the bootstrap intervals of the tables, in margins of equivalence, so that all metrics share an axis."""
    labels: list[str] = []
    for name, found in gains.items():
        values = [[units[task] * x for x in (each.mean, each.low, each.high)] for (task, _), each in found.items()]
        means, *ends = np.transpose(values)
        # where less is better they have changed places
        low, high = np.sort(ends, axis=0)
        places = range(len(labels), len(labels) + len(found))
        axes.errorbar(means, places, xerr=(means - low, high - means), fmt="o", capsize=3, label=name)
        labels += [f"{task}, k {k}" for task, k in found]
    axes.axvspan(-1, 1, color="0.92", zorder=0)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels), -1)
    axes.set(
        title="What DLoR with its default rates gains on test, k by k",
        xlabel="in margins: " + ", ".join(f"{margin} of {metric}" for metric, margin in MARGINS.items()),
    )
    axes.legend(title="over", loc="best", fontsize=8)


def _drawn(reading: Reading) -> list[Arm]:
    """With seeds enough for an interval."""
    return [arm for arm, values in reading.test.items() if len(values) >= 3 and arm[0] != PROBE]


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the width."""
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(width)
