"""Tables and figures of the rows that are there; of an arm without reported seeds, what dev says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .figure import draw
from .methods import PROBE
from .questions import answers, shown, with_lora
from .reading import Reading, read
from .results import Results
from .schedule import Cell, missing
from .times import read_times


def write_report(folder: Path) -> str:
    """The tables of every kind of hardware, in Markdown; also written to `report.md` in the folder, with a figure."""
    parts, figures = [], {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = Results(folder, path.stem).rows
        readings = read(rows)
        times = read_times(folder, path.stem)
        diverged = sum("diverged" in row for row in rows.values())
        parts.append(f"# {path.stem}: {len(rows)} runs, {diverged} of them diverged")
        parts += [_of_task(reading, times) for reading in readings.values()]
        parts += answers(readings.values(), times)
        figures[path.with_suffix(".png")] = list(readings.values())
    text = "\n\n".join(parts) + "\n"
    for path, drawn in figures.items():
        draw(drawn, path)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def _of_task(reading: Reading, times: list[dict[str, Any]]) -> str:
    probe = list(reading.test.get((PROBE, 0), {}).values())
    lines = [
        f"## {reading.task}: {reading.metric}",
        "",
        *([f"Linear probe on the frozen model: {np.mean(probe):.4f} ({len(probe)} seeds)", ""] if probe else []),
        "| k | method | parameters | adapter, kB | ranks | lr | dev, mean (seeds) | test, mean (seeds) "
        "| less LoRA's, 95% | p (Holm) | equivalent | base | step | kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = {arm: best for arm in reading.dev if (best := reading.best(arm))}
    for k in sorted({k for _, k in chosen}):
        arms = sorted((arm for arm in chosen if arm[1] == k), key=lambda arm: -reading.sign * chosen[arm].value)
        compared = with_lora(reading, k)
        of_times = next((one["methods"] for one in times if (one["task"], one["k"]) == (reading.task, k or 8)), {})
        for arm in arms:
            method, found, best = arm[0], compared.get(arm), chosen[arm]
            values = list(reading.test.get(arm, {}).values())
            diverged = f", {number} diverged" if (number := reading.num_diverged(arm)) else ""
            base = [row["base_loss"] for row in reading.reported(arm).values() if row.get("base_loss")]
            time = of_times.get(method)
            is_cut_off = bool(missing(Cell(reading.task, *arm), reading, 0))
            fields = (
                str(k or "-"),
                method,
                f"{reading.parameters[arm]:,}",
                f"{reading.adapter_bytes[arm] / 1000:,.0f}",
                ", ".join(f"{number} x {r}" for r, number in reading.ranks.get(arm, {}).items()),
                f"{best.lr:.2g}",
                f"{best.value:.4f} ({best.num_seeds}{', grid cut off' if is_cut_off else ''})",
                f"{np.mean(values):.4f} ({len(values)}{diverged})" if values else "",
                shown(found) if found else "",
                f"{found.p:.3f}" if found else "",
                found.is_equivalent if found else "",
                f"{np.mean(base):.3f}" if base else "",
                f"{time['median']:.2f}" if time else "",
                f"{time['kept']:.2f}" if time else "",
            )
            lines.append(f"| {' | '.join(fields)} |")
    return "\n".join((*lines, "", *_grid(reading)))


def _grid(reading: Reading) -> list[str]:
    """Every learning rate that was tried, with the first seed on dev."""
    rates = sorted({lr for of_arm in reading.dev.values() for lr in of_arm})
    lines = [f"| k | method | {' | '.join(f'{lr:.2g}' for lr in rates)} |", "|" + "---|" * (2 + len(rates))]
    for arm in sorted(reading.dev, key=lambda arm: (arm[1], arm[0])):
        first = reading.first(arm)
        fields = [f"{first[lr]:.4f}" if lr in first else "diverged" if lr in reading.dev[arm] else "" for lr in rates]
        lines.append(f"| {arm[1] or '-'} | {arm[0]} | {' | '.join(fields)} |")
    return lines
