"""How large the update of each layer became, over the steps: layers downwards, a panel for each kind of module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dlor_peft.deploy.heatmap import draw_layers, grid

from .folder import atomic

SIZES = {"frobenius_norm": r"$\|U V^T\|_F$", "diagonal_deviation": r"$\|\alpha - 1\|$"}
# of a picture that viewers still open
_MAX_STEPS, _MAX_INCHES = 200, 60


def save_updates(path: Path, history: list[dict[str, Any]]) -> None:
    """A PNG of the sizes in what `watching.read_history` returns: at least one line, with the same layers in all."""
    lines = history[:: len(history) // _MAX_STEPS + 1]
    names = list(lines[0]["layers"])
    rows, kinds, places = grid(names)
    width, height = min(_MAX_INCHES, 1.5 + 2.5 * len(kinds)), min(_MAX_INCHES, 1.5 + 0.28 * len(rows))
    figure = Figure(figsize=(width, 2 * max(2.5, height)), layout="constrained")
    panels = figure.subplots(len(SIZES), len(kinds), squeeze=False)
    for of_size, (size, title) in zip(panels, SIZES.items(), strict=True):
        # one scale for all kinds, so that they compare
        highest = max(layer[size] for line in lines for layer in line["layers"].values())
        image = None
        for column, (axes, kind) in enumerate(zip(of_size, kinds, strict=True)):
            cells = [[float("nan")] * len(lines) for _ in rows]
            for name, (row, of_kind) in zip(names, places, strict=True):
                if of_kind == column:
                    cells[row] = [line["layers"][name][size] for line in lines]
            image = draw_layers(axes, cells, rows, highest)
            shown = sorted({0, len(lines) // 2, len(lines) - 1})
            axes.set_xticks(shown, [str(lines[index]["step"]) for index in shown])
            axes.set(title=kind, xlabel="step")
        figure.colorbar(image, ax=list(of_size), label=title)  # pyright: ignore[reportArgumentType]
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
