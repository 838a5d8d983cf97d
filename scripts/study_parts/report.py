"""Tables and figures of the rows that are there; of a cell without reported seeds, what dev says, marked as such."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .methods import PROBE
from .results import FOLDER, Results, Run
from .statistics import holm, paired
from .training import SELECTION_SEED

HEADLINES = {"accuracy": True, "spearman": True, "exact_match": True, "bits_per_byte": False}
"""Metric -> whether more of it is better."""

MARGINS = {"accuracy": 0.01, "spearman": 0.01, "exact_match": 0.01, "bits_per_byte": 0.02}
"""What would not matter to a user."""

REFERENCE = "lora"

Cell = tuple[str, str, int]


def write_report(folder: Path = FOLDER) -> str:
    """The tables of every kind of hardware, in Markdown; also written to `report.md` in the folder, with figures."""
    parts = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = Results(folder, path.stem).rows
        by_task: dict[str, dict[Run, Any]] = defaultdict(dict)
        for run, row in rows.items():
            by_task[run.task][run] = row
        parts.append(f"# {path.stem}: {len(rows)} runs")
        for task, of_task in by_task.items():
            parts.append(_of_task(task, of_task))
            _plot(folder / f"{path.stem} {task}.png".replace(" ", "-"), task, of_task)
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def headline(rows: dict[Run, Any]) -> str:
    metrics = next(row.get("dev") or row.get("test") for row in rows.values() if "diverged" not in row)
    return next(name for name in HEADLINES if name in metrics)


def tested(rows: dict[Run, Any], metric: str) -> dict[Cell, dict[int, float]]:
    """The test values of each cell, by seed."""
    found: dict[Cell, dict[int, float]] = defaultdict(dict)
    for run, row in rows.items():
        if run.seed != SELECTION_SEED and "diverged" not in row:
            found[run.task, run.method, run.k][run.seed] = row["test"][metric]
    return found


def selected(rows: dict[Run, Any], metric: str) -> dict[Cell, tuple[float, float]]:
    """The best learning rate of each cell on dev, and its value there."""
    sign = 1 if HEADLINES[metric] else -1
    found: dict[Cell, tuple[float, float]] = {}
    for run, row in sorted(rows.items()):
        if run.seed == SELECTION_SEED and "diverged" not in row:
            cell, value = (run.task, run.method, run.k), row["dev"][metric]
            if cell not in found or sign * value > sign * found[cell][1]:
                found[cell] = run.lr, value
    return found


def _of_task(task: str, rows: dict[Run, Any]) -> str:
    metric = headline(rows)
    sign = 1 if HEADLINES[metric] else -1
    chosen, values = selected(rows, metric), tested(rows, metric)
    probe = list(values.get((task, PROBE, 0), {}).values())
    lines = [
        f"## {task}: {metric}",
        "",
        *([f"Linear probe: {np.mean(probe):.4f} ({len(probe)} seeds)", ""] if probe else []),
        "| k | method | parameters | lr | dev | test, mean (seeds) | less LoRA's, 95% | p (Holm) | equivalent "
        "| step, LoRA = 1 | saved, LoRA = 1 | base |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in sorted({k for _, _, k in chosen}):
        cells = [cell for cell in chosen if cell[2] == k]
        order = sorted(cells, key=lambda cell: -sign * chosen[cell][1])
        reference = values.get((task, REFERENCE, k or 8), {})
        compared = {}
        for cell in order:
            seeds = sorted(set(values.get(cell, {})) & set(reference))
            if cell[1] != REFERENCE and len(seeds) >= 3:
                one, other = [values[cell][seed] for seed in seeds], [reference[seed] for seed in seeds]
                compared[cell[1]] = paired(one, other, MARGINS[metric])
        corrected = holm({name: found.p for name, found in compared.items()})
        for cell in order:
            facts = [
                row for run, row in rows.items() if (run.task, run.method, run.k) == cell and "diverged" not in row
            ]
            lora = [row for run, row in rows.items() if (run.method, run.k) == (REFERENCE, k or 8)]
            of_cell = list(values.get(cell, {}).values())
            found = compared.get(cell[1])
            base = [row["base_loss"] for row in facts if row.get("base_loss") is not None and "test" in row]
            lines.append(
                f"| {k or '-'} | {cell[1]} | {facts[0]['parameters']:,} "
                f"| {chosen[cell][0]:.2g} | {chosen[cell][1]:.4f} "
                f"| {f'{np.mean(of_cell):.4f} ({len(of_cell)})' if of_cell else ''} "
                f"| {f'{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]' if found else ''} "
                f"| {f'{corrected[cell[1]]:.3f}' if found else ''} "
                f"| {('yes' if found.equivalence_p < 0.05 else 'no') if found else ''} "
                f"| {_ratio(facts, lora, 'seconds_per_step')} | {_ratio(facts, lora, 'saved_bytes')} "
                f"| {f'{np.mean(base):.3f}' if base else ''} |"
            )
    return "\n".join(lines)


def _ratio(rows: list[Any], lora: list[Any], name: str) -> str:
    if not rows or not lora:
        return ""
    return f"{np.median([row[name] for row in rows]) / np.median([row[name] for row in lora]):.2f}"


def _plot(path: Path, task: str, rows: dict[Run, Any]) -> None:
    """The test metric (dev, hollow, where no seeds were run) against the parameters, with the range of the seeds."""
    from matplotlib.figure import Figure

    metric = headline(rows)
    values = tested(rows, metric)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    parameters = {(run.task, run.method, run.k): row.get("parameters") for run, row in rows.items()}
    for method in dict.fromkeys(run.method for run in rows):
        cells = sorted(cell for cell in values if cell[1] == method)
        if not cells or method == PROBE:
            continue
        x = [parameters[cell] for cell in cells]
        y = [list(values[cell].values()) for cell in cells]
        means = np.array([np.mean(one) for one in y])
        spread = [means - [min(one) for one in y], [max(one) for one in y] - means]
        axes.errorbar(
            x, means, yerr=spread, marker="o", capsize=2, lw=2 if method.startswith("dlor") else 1, label=method
        )
    axes.set(xscale="log", xlabel="trained parameters beside the head", ylabel=f"test {metric}", title=task)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
        figure.savefig(path, dpi=120)
