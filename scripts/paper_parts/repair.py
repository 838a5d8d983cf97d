"""(c) The nets of (b), the same but for alpha: frozen at 0, trained from 0, or trained from DLoRLinear's own start."""

from __future__ import annotations

from statistics import median
from typing import Any

from matplotlib.figure import Figure

from . import figures
from .blindness import TARGETS, fit
from .networks import ALPHAS

COLOURS = {"zero": "tab:grey", "from zero": "tab:orange", "trained": "tab:blue"}
LABELS = {"zero": "alpha = 0", "from zero": "alpha trained from 0", "trained": "alpha trained"}


def run(quick: bool) -> dict[str, Any]:
    names = list(TARGETS)[:1] if quick else list(TARGETS)
    return {name: {alpha: fit(name, alpha, quick) for alpha in ALPHAS} for name in names}


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (axis,) = figures.panels(1)
    figure.set_size_inches(6, 3.4)
    for place, rows in enumerate(numbers.values()):
        for shift, (alpha, row) in zip((-0.2, 0, 0.2), rows.items(), strict=True):
            label = None if place else LABELS[alpha]
            axis.scatter([place + shift] * len(row["errors"]), row["errors"], color=COLOURS[alpha], s=14, label=label)
        floor = rows["zero"]["floor"]
        axis.hlines(
            floor, place - 0.35, place + 0.35, "black", linestyle="--", label=None if place else "floor at alpha = 0"
        )
    axis.set_xticks(range(len(numbers)), list(numbers), fontsize=8)
    figures.finish(axis, "", "mean square error / variance", "alpha I + u v^T, five seeds", log="y")
    return figure


def caption(numbers: dict[str, Any]) -> str:
    told = "; ".join(
        f"{name}: " + ", ".join(f"{LABELS[alpha]} {figures.spread(row['errors'])}" for alpha, row in rows.items())
        for name, rows in numbers.items()
    )
    late = [rows["from zero"] for rows in numbers.values()]
    blind = sum(error > 0.9 * row["floor"] for row in late for error in row["errors"])
    number = sum(len(row["errors"]) for row in late)
    gains = [rows["zero"]["floor"] / median(rows["trained"]["errors"]) for rows in numbers.values()]
    sizes = "; ".join(f"{rows['zero']['parameters']} and {rows['trained']['parameters']}" for rows in numbers.values())
    return (
        "**Claim.** A multiple of the identity beside the low-rank term, alpha I + U V^T, is enough for universal "
        "approximation.\n\n"
        "**Measured.** The networks and the training of (b); alpha is one more number a layer (parameters without and "
        f"with: {sizes}). Error over variance, median [lowest, highest] of the seeds: {told}. With alpha trained the "
        f"median is {min(gains):.3g} to {max(gains):.3g} times below the floor of rank-1 networks. "
        + figures.verdict(min(gains) > 2, " that it repairs the blindness")
        + f" Where alpha starts at 0, {blind} of {number} nets stay at the floor."
        + " A width that is fixed leaves an error; (e) has error against width."
    )
