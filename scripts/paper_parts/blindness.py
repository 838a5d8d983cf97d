"""(b) A net of rank-1 layers is a function of one number v^T x: blind to all directions orthogonal to v, for ever.

Whatever is trained, E (f(x) - g(x))^2 >= min_v E Var(g(x) | v^T x). For x normal and g a quadratic form this floor is
known in closed form, which is why they are the targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import figures
from .networks import Ensemble, best_rate, dlor_net

NUM_LAYERS, WIDTH, ACTIVATION = 3, 32, "GELU"
RATES = (3e-3, 1e-2)


@dataclass
class Quadratic:
    """g(x) = x^T A x - tr A, A symmetric, ||A||_F^2 = 1/2: of mean 0 and variance 1 for x normal in R^d."""

    A: Tensor

    @classmethod
    def isotropic(cls, d: int) -> Quadratic:
        """(|x|^2 - d) / sqrt(2 d), alike in all directions."""
        return cls(torch.eye(d, dtype=torch.float64) / (2 * d) ** 0.5)

    @classmethod
    def product(cls) -> Quadratic:
        """x_1 x_2."""
        return cls(torch.tensor([[0, 0.5], [0.5, 0]], dtype=torch.float64))

    @property
    def floor(self) -> float:
        """min_v E Var(g | v^T x) = 2 (||A||_F^2 - max_v (v^T A v)^2): 1 - 1/d where A is a multiple of I."""
        return 1 - 2 * torch.linalg.eigvalsh(self.A).square().max().item()

    def __call__(self, x: Tensor) -> Tensor:
        return ((x @ self.A) * x).sum(-1, keepdim=True) - self.A.trace()


TARGETS = {
    "x1 x2": Quadratic.product(),
    **{f"|x|^2, d = {d}": Quadratic.isotropic(d) for d in (2, 4, 8)},
}


def sample(target: Quadratic, size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, len(target.A), dtype=torch.float64)
    return x, target(x)


@cache
def fit(name: str, alpha: str, quick: bool, width: int = WIDTH) -> dict[str, Any]:
    """Nets trained on fresh normal x, at the better of the two rates: how they err, and what they see across v."""
    target = TARGETS[name]
    d, num_seeds, steps = len(target.A), 2 if quick else 5, 100 if quick else 1000
    make = partial(dlor_net, d, width, NUM_LAYERS, ACTIVATION, alpha)
    torch.manual_seed(2**31)
    unseen = sample(target, 2**16)
    chosen = sample(target, 2**13)

    def train(nets: Ensemble, rate: float) -> Ensemble:
        torch.manual_seed(2**30)
        return nets.train(partial(sample, target, 256), steps, rate)

    before = across(Ensemble(make, num_seeds), unseen[0][:256])
    rate, nets = best_rate(make, num_seeds, RATES, train, lambda nets: nets.error(*chosen))
    deltas = [1 + value.detach().flatten(1) for name, value in nets.parameters.items() if name.endswith("delta")]
    return {
        "width": width,
        "parameters": nets.num_parameters,
        "rate": rate,
        "floor": target.floor,
        "errors": nets.error(*unseen),
        "across_before": before,
        "across_after": across(nets, unseen[0][:256]),
        "alphas": torch.cat(deltas, 1).tolist(),
    }


@torch.no_grad()
def across(nets: Ensemble, x: Tensor) -> list[float]:
    """max |f(x + w) - f(x)| / max |f(x) - mean f| over w of length 1 to 100 orthogonal to v, for each net.

    v is the one column of V in the first layer.
    """
    V = nets.parameters["0.end_V"]
    v = V / V.norm(dim=1, keepdim=True)
    torch.manual_seed(0)
    w = torch.randn_like(x)
    changes = []
    for e in range(len(v)):
        direction = w - (w @ v[e]) * v[e].T
        direction /= direction.norm(dim=1, keepdim=True)
        here = nets(x)[e]
        there = torch.stack([nets(x + length * direction)[e] for length in (1, 10, 100)])
        changes.append(((there - here).abs().max() / (here - here.mean()).abs().max()).item())
    return changes


def run(quick: bool) -> dict[str, Any]:
    names = list(TARGETS)
    numbers = {name: [fit(name, "zero", quick)] for name in (names[:1] if quick else names)}
    # that width does not help shows on the easiest and on the hardest
    for name in () if quick else (names[0], names[-1]):
        numbers[name].append(fit(name, "zero", quick, 4 * WIDTH))
    return numbers


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = figures.panels(2)
    for place, rows in enumerate(numbers.values()):
        for row, colour in zip(rows, ("tab:blue", "tab:orange"), strict=False):
            label = f"width {row['width']}" if place == 0 else None
            left.scatter([place] * len(row["errors"]), row["errors"], color=colour, s=14, label=label)
        left.hlines(
            rows[0]["floor"], place - 0.3, place + 0.3, "black", label="" if place else "floor", linestyle="--"
        )
        for key, colour in (("across_before", "tab:grey"), ("across_after", "tab:red")):
            values = [max(value, 1e-18) for row in rows for value in row[key]]
            label = {"across_before": "before training", "across_after": "after"}[key] if place == 0 else None
            right.scatter([place] * len(values), values, color=colour, s=14, label=label)
    left.set_ylim(0, 1.1)
    figures.finish(left, "", "mean square error / variance", "rank-1 networks, trained")
    figures.finish(right, "", "relative change of f", "along w orthogonal to v, |w| to 100", log="y")
    right.set_ylim(1e-18, 1)
    for axis in (left, right):
        axis.set_xticks(range(len(numbers)), list(numbers), fontsize=7)
    return figure


def caption(numbers: dict[str, Any]) -> str:
    rows = [row for rows in numbers.values() for row in rows]
    change = max(max(row["across_before"] + row["across_after"]) for row in rows)
    told = "; ".join(
        f"{name}: {figures.spread([error for row in rows for error in row['errors']])}, floor {rows[0]['floor']:.3f}"
        for name, rows in numbers.items()
    )
    widths = " and ".join(map(str, sorted({row["width"] for row in rows})))
    # a sample of 2^16 knows the floor to about 2 %
    below = min(min(row["errors"]) / row["floor"] for row in rows)
    near = max(median(row["errors"]) / row["floor"] for row in rows)
    return (
        "**Claim.** Rank-1 layers collapse where a function is to be approximated: they see x in one direction v "
        'only ("orthogonal blindness").\n\n'
        f"**Measured.** {NUM_LAYERS} layers u v^T, {ACTIVATION}, of widths {widths}, x normal. Across v the output "
        f"changes by {change:.0e} of its range at most, before and after training alike: rounding. Error over "
        f"variance, median [lowest, highest] of the seeds and widths: {told}. The floor is the conditional variance "
        f"min_v E Var(g | v^T x). The lowest error is {below:.3f} of its floor (the sample of the test knows it to "
        f"2 %), the largest median {near:.2f}. {figures.verdict(change < 1e-9 and below > 0.97)}"
    )
