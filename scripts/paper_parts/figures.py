"""What all figures and captions share: size, axes, the words for agreement and for a spread."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * number, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def finish(axis: Axes, x: str, y: str, title: str, log: str = "", legend: bool = True) -> None:
    """Labels, logarithmic scales on the axes named in `log`, and the legend."""
    for name in log:
        getattr(axis, f"set_{name}scale")("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=7)


def verdict(agrees: bool, where: str = "") -> str:
    return f"**{'Agrees' if agrees else 'Does not agree'}{where}.**"


def spread(values: list[float]) -> str:
    """median [lowest, highest]"""
    return f"{median(values):.2g} [{min(values):.2g}, {max(values):.2g}]"


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours, a third of the size of one with all."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(
        path, "PNG", optimize=True
    )
