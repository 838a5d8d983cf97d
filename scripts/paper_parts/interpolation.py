"""(a) N hidden units, W = u v^T of rank 1: s(W x + b) interpolates any N scalars y, and learns nothing of a function.

v keeps distinct x apart, so the values t = v^T x are N distinct numbers, and the output weights solve an N x N system
whose rows are the hidden units at each t. Units: a kink (or a step, for tanh) below each t, steep as the gap below it;
for sin, which is not local, random frequencies as high as the smallest gap asks for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dlor_peft.maths import apply

from . import figures
from .blindness import Quadratic
from .networks import ACTIVATIONS

DIMENSION = 8


def interpolate(x: Tensor, y: Tensor, activation: str) -> tuple[float, float, Any]:
    """Largest error over max|y| at the data, condition number of the system, and the network (T, I) -> (T,)."""
    N = len(x)
    V = torch.randn(x.shape[1], 1, dtype=x.dtype)
    t = (x @ V).flatten().sort().values
    gaps = t.diff(prepend=t[:1] - t.diff().mean())
    if activation == "sin":
        U = torch.randn(N, dtype=x.dtype) * 2 * math.pi / gaps.min()
        b = torch.rand(N, dtype=x.dtype) * 2 * math.pi
    else:
        # tanh steps in the middle of the gap, the others bend at its lower end
        U = 8 / gaps
        b = -U * (t - gaps * (0.5 if activation == "tanh" else 1.0))
    none = x.new_zeros(1)

    def hidden(x: Tensor) -> Tensor:
        return ACTIVATIONS[activation](apply(x, none, U[:, None], V) + b)

    H = hidden(x)
    size = H.abs().amax(0)
    weights = torch.linalg.solve(H / size, y) / size

    def network(x: Tensor) -> Tensor:
        return hidden(x) @ weights

    error = (network(x) - y).abs().max() / y.abs().max()
    return error.item(), torch.linalg.cond(H / size).item(), network


def run(quick: bool) -> dict[str, Any]:
    sizes = [8, 32] if quick else [8, 16, 32, 64, 128, 256, 512, 1024]
    target = Quadratic.isotropic(DIMENSION)
    torch.manual_seed(0)
    fresh = torch.randn(4096, DIMENSION, dtype=torch.float64)
    truth = target(fresh)[:, 0]
    results: dict[str, Any] = {}
    for activation in ACTIVATIONS:
        rows = {"noise": [], "condition": [], "function": [], "fresh": []}
        for N in sizes:
            torch.manual_seed(N)
            x, y = torch.randn(N, DIMENSION, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
            error, condition, _ = interpolate(x, y, activation)
            at_data, _, network = interpolate(x, target(x)[:, 0], activation)
            unseen = (network(fresh) - truth).square().mean() / truth.var(correction=0)
            for key, value in zip(rows, (error, condition, at_data, unseen.item()), strict=True):
                rows[key].append(value)
        results[activation] = rows
    return {"dimension": DIMENSION, "sizes": sizes, "floor": target.floor, "activations": results}


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = figures.panels(2)
    for activation, rows in numbers["activations"].items():
        left.plot(numbers["sizes"], rows["noise"], marker="o", label=activation)
        right.plot(numbers["sizes"], rows["fresh"], marker="o", label=activation)
    figures.finish(left, "points N", "largest error / max |y|", "at the data: random y", log="xy")
    right.axhline(numbers["floor"], color="black", linestyle="--", label="floor of every rank-1 network")
    figures.finish(right, "points N", "mean square error / variance", "at unseen x: y = |x|^2", log="xy")
    return figure


def caption(numbers: dict[str, Any]) -> str:
    rows = numbers["activations"]
    worst = {name: max(*row["noise"], *row["function"]) for name, row in rows.items()}
    unseen = min(min(row["fresh"]) for row in rows.values())
    condition = max(max(row["condition"]) for row in rows.values())
    agrees = max(worst.values()) < 1e-6 and unseen > 0.95 * numbers["floor"]
    errors = ", ".join(f"{name} {error:.0e}" for name, error in worst.items())
    return (
        "**Claim.** Networks of rank-1 layers interpolate any scalar data set exactly, but collapse where a function "
        "is to be approximated.\n\n"
        f"**Measured.** One hidden layer u v^T of N units, constructed, x in R^{numbers['dimension']}, N up to "
        f"{numbers['sizes'][-1]}, float64. Largest error at the data over max |y|, of all N: {errors}. That is "
        f"rounding times the condition of the N x N system (up to {condition:.0e}). The same networks through values "
        f"of |x|^2 err at unseen x by {unseen:.2f} of its variance at best, whatever N. No function of one v^T x can "
        f"come below {numbers['floor']:.3f}. {figures.verdict(agrees)}"
    )
