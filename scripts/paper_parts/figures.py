"""What all figures and captions share: size, axes, the words for agreement and for a spread."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure


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
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2g} [{ordered[0]:.2g}, {ordered[-1]:.2g}]"
