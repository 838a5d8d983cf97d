"""A heat map of an adapter: layers by their index downwards, kinds of modules to the right."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from .adapter import natural
from .inspect import LayerReport, Report
from .tables import without_common_start

_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
# of a grid that is annotated
_MAX_CELLS = 150


def heatmap_png(report: Report) -> bytes:
    """A PNG of ||W' - W|| / ||W|| where the base was given, of ||U V^T|| and ||alpha - 1|| otherwise.

    ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"a heat map needs {error.name}: install dlor-peft with its extra 'train'") from error

    rows, columns, places = grid([layer.module for layer in report.layers])
    panels: dict[str, Callable[[LayerReport], float | None]] = {
        r"$\|U V^T\|_F$": lambda layer: layer.frobenius_norm,
        r"$\|\alpha - 1\|$": lambda layer: layer.diagonal_deviation,
    }
    if report.base is not None:
        panels = {r"$\|W' - W\|_F\, /\, \|W\|_F$": lambda layer: layer.weight and layer.weight.relative_update}
    width, height = 2.5 + 0.55 * len(columns), 1.8 + 0.28 * len(rows) + 0.075 * max(map(len, columns))
    # pixels enough for a row each, of a picture that viewers still open
    figure = Figure(figsize=(min(60, max(4, width) * len(panels)), min(60, max(4, height))), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        cells = [[float("nan")] * len(columns) for _ in rows]
        for layer, (row, column) in zip(report.layers, places, strict=True):
            found = value(layer)
            cells[row][column] = float("nan") if found is None else found
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set(title=title)
        highest = max((cell for row in cells for cell in row if cell == cell), default=0.0)
        figure.colorbar(draw_layers(axes, cells, rows, highest), ax=axes)
        if len(rows) * len(columns) <= _MAX_CELLS:
            _annotate(axes, cells, highest)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_layers(axes: Any, cells: list[list[float]], rows: list[str], highest: float) -> Any:
    """The image of `cells`, a row for each layer, in colours from 0 to `highest`; nan is no cell."""
    axes.set_facecolor("lightgrey")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(ylabel="layer")
    return axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=highest or 1)


def grid(modules: list[str]) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Labels of the rows and of the columns, and the row and column of each module.

    The first number in a name is the index of its layer; a module without one is in the row "-".
    """
    split = []
    for name in modules:
        index = _INDEX.search(name)
        kind = name if index is None else f"{name[: index.start()]}*{name[index.end() :]}"
        split.append((index.group() if index else "-", kind))
    rows = sorted({row for row, _ in split}, key=natural)
    kinds = list(dict.fromkeys(kind for _, kind in split))
    places = [(rows.index(row), kinds.index(kind)) for row, kind in split]
    return rows, without_common_start(kinds)[1], places


def _annotate(axes: Any, cells: list[list[float]], highest: float) -> None:
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value == value:
                colour = "black" if value > 0.6 * highest else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
