"""(f) The sawtooth T(T(...T(x))) of the tent map T, learnt by dense nets and by sums and products of DLoR terms.

All have about as many parameters, ReLU, the same steps, batches, seeds and rates to choose from.

    dense              3 matrices n x n
    width              3 matrices alpha I + sum of K rank-1 terms
    depth              3 K matrices alpha I + u v^T, an activation after each
    depth, linear      3 products of K such matrices, an activation after each product
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dlor_peft.nn import DLoRLinear

from . import figures
from .networks import Activation, Ensemble, best_rate, chain, dlor_layer

NUM_LAYERS, NUM_TERMS = 3, 4
BUDGET = 900
NUM_POINTS = 256
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def dense(n: int) -> nn.Linear:
    """He's start, whose mean square passes ReLU unchanged."""
    layer = nn.Linear(n, n, dtype=torch.float64)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def factor(n: int) -> DLoRLinear:
    """alpha I + u v^T, which starts as one of the K factors of "depth, linear": so it trains better than by itself."""
    layer, whole = dlor_layer(n, n), dlor_layer(n, n, depth=NUM_TERMS)
    with torch.no_grad():
        for name, value in layer.named_parameters():
            value.copy_(whole.get_parameter(name)[: len(value)])
    return layer


KINDS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "dense": (NUM_LAYERS, dense),
    "width": (NUM_LAYERS, lambda n: dlor_layer(n, n, NUM_TERMS)),
    "depth": (NUM_LAYERS * NUM_TERMS, factor),
    "depth, linear": (NUM_LAYERS, lambda n: dlor_layer(n, n, depth=NUM_TERMS)),
}


def tent(x: Tensor, times: int) -> Tensor:
    """T applied `times` times, T(x) = 1 - |2 x - 1|: 2^(times - 1) teeth on [0, 1]."""
    for _ in range(times):
        x = 1 - (2 * x - 1).abs()
    return x


@torch.no_grad()
def exact(times: int) -> nn.Sequential:
    """The sawtooth itself, as a ReLU net of rank-1 matrices (alpha = 0), two units wide.

    T(x) = 2 relu(x) - 4 relu(x - 1/2) on [0, 1], whose kinks are the biases, and whose weights the next V.
    """
    first, last = nn.Linear(1, 2, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
    between = [dlor_layer(2, 2, alpha="zero") for _ in range(times - 1)]
    weights, kinks = torch.tensor([2.0, -4.0]), torch.tensor([0, -0.5])
    first.weight.fill_(1)
    for layer in between:
        layer.U.fill_(1)
        layer.V.copy_(weights[None, :, None])
    for layer in (first, *between):
        layer.bias.copy_(kinks)
    last.weight.copy_(weights[None])
    last.bias.zero_()
    parts = [part for layer in (first, *between) for part in (layer, Activation("ReLU"))]
    return nn.Sequential(*parts, last)


@torch.no_grad()
def exact_shallow(times: int) -> nn.Sequential:
    """The sawtooth as one hidden layer: a ReLU for each of its 2^times pieces, as few as there can be."""
    n = 2**times
    first, last = nn.Linear(1, n, dtype=torch.float64), nn.Linear(n, 1, dtype=torch.float64)
    first.weight.fill_(1)
    first.bias.copy_(-torch.arange(n) / n)
    # the slope n, then turned over at every kink
    last.weight.copy_(2 * n * (-1.0) ** torch.arange(n))
    last.weight[0, 0] = n
    last.bias.zero_()
    return nn.Sequential(first, Activation("ReLU"), last)


def constructions(times: int) -> dict[str, Any]:
    """Parameters and largest errors of the sawtooth by depth and by width."""
    x = torch.linspace(0, 1, 2**14 + 1, dtype=torch.float64)[:, None]
    numbers: dict[str, Any] = {"maps": times}
    for name, net in (("deep", exact(times)), ("shallow", exact_shallow(times))):
        with torch.no_grad():
            error = (net(x) - tent(x, times)).abs().max().item()
        numbers[name] = {"parameters": sum(p.numel() for p in net.parameters()), "error": error}
    return numbers


def build(kind: str, width: int) -> nn.Sequential:
    number, matrix = KINDS[kind]
    first = nn.Linear(1, width, dtype=torch.float64)
    return nn.Sequential(first, Activation("ReLU"), *chain([matrix(width) for _ in range(number)], width, "ReLU"))


def width_of(kind: str) -> int:
    """The width whose number of parameters is nearest to BUDGET."""
    return min(range(4, 64), key=lambda n: abs(sum(p.numel() for p in build(kind, n).parameters()) - BUDGET))


def run(quick: bool) -> dict[str, Any]:
    # x -> 2 x - 1 inside, so that the inputs are of mean 0
    num_seeds, steps, teeth = (2, 50, [2]) if quick else (5, 1500, [3, 4])
    grid = torch.arange(NUM_POINTS, dtype=torch.float64)[:, None]
    seen, unseen = grid / NUM_POINTS, (grid + 0.5) / NUM_POINTS
    results: dict[str, Any] = {}
    for times in teeth:
        y, y_unseen = tent(seen, times), tent(unseen, times)
        rows: dict[str, Any] = {}
        for kind in KINDS:
            width = width_of(kind)

            def train(nets: Ensemble, rate: float, y: Tensor = y) -> Ensemble:
                return nets.train(lambda: (2 * seen - 1, y), steps, rate)

            rate, nets = best_rate(
                partial(build, kind, width), num_seeds, RATES, train, lambda nets, y=y: nets.error(2 * seen - 1, y)
            )
            errors = nets.error(2 * unseen - 1, y_unseen)
            rows[kind] = {"width": width, "parameters": nets.num_parameters, "rate": rate, "errors": errors}
        results[str(2 ** (times - 1))] = rows
    maps = range(1, 4 if quick else 11)
    return {
        "steps": steps,
        "rates": list(RATES),
        "constructions": [constructions(times) for times in maps],
        "teeth": results,
    }


def winner(rows: dict[str, Any]) -> tuple[str, bool]:
    """The kind of the lowest median, and whether its worst seed is below the best seed of every other."""
    first = min(rows, key=lambda kind: median(rows[kind]["errors"]))
    others = [min(row["errors"]) for kind, row in rows.items() if kind != first]
    return first, max(rows[first]["errors"]) < min(others)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = figures.panels(2)
    for name, label in (("deep", "depth: u v^T, two units wide"), ("shallow", "width: one hidden layer")):
        made = numbers["constructions"]
        left.plot([row["maps"] for row in made], [row[name]["parameters"] for row in made], marker="o", label=label)
    figures.finish(left, "tent maps composed", "parameters", "the exact sawtooth, constructed", log="y")
    for place, rows in enumerate(numbers["teeth"].values()):
        for shift, (kind, row) in enumerate(rows.items()):
            errors = [min(error, 10) for error in row["errors"]]
            right.scatter(
                [place + 0.2 * (shift - 1.5)] * len(errors),
                errors,
                s=14,
                color=f"C{shift}",
                label="" if place else kind,
            )
    right.set_xticks(range(len(numbers["teeth"])), [f"{count} teeth" for count in numbers["teeth"]])
    figures.finish(right, "", "mean square error / variance", f"about {BUDGET} parameters each, every seed", log="y")
    return figure


def caption(numbers: dict[str, Any]) -> str:
    def depth_wins(measure: Callable[[list[float]], float]) -> list[str]:
        return [
            count
            for count, rows in numbers["teeth"].items()
            if measure(rows["depth"]["errors"]) < measure(rows["width"]["errors"])
        ]

    lines = []
    for count, rows in numbers["teeth"].items():
        first, is_clear = winner(rows)
        told = ", ".join(f"{kind} {figures.spread(row['errors'])}" for kind, row in rows.items())
        lines.append(f"- {count} teeth: {told}. Lowest: {first}, {'in every seed' if is_clear else 'seeds overlap'}.")
    every, rates = list(numbers["teeth"]), numbers["rates"]
    edges = [
        f"{kind} at {count} teeth"
        for count, rows in numbers["teeth"].items()
        for kind, row in rows.items()
        if row["rate"] in (rates[0], rates[-1])
    ]
    told_edges = f" At an edge of them, and perhaps better beyond: {', '.join(edges)}." if edges else ""
    sizes = ", ".join(
        f"{kind} {row['parameters']} (width {row['width']})" for kind, row in numbers["teeth"][every[0]].items()
    )
    made = numbers["constructions"]
    error = max(row[name]["error"] for row in made for name in ("deep", "shallow"))
    deep, shallow = (made[-1][name]["parameters"] for name in ("deep", "shallow"))
    beats, worst = depth_wins(median), depth_wins(max)
    text = "Agrees" if beats == every else f"Agrees at {', '.join(beats)} teeth only" if beats else "Does not agree"
    return (
        "**Claim.** Multiplicative depth gives more expressivity for a parameter than additive width.\n\n"
        f"**Measured, constructed.** {made[-1]['maps']} tent maps composed: {deep} parameters by depth, one layer "
        f"u v^T for each map, against {shallow} in one hidden layer, a unit for each piece. Depth adds "
        f"{deep / made[-1]['maps']:g} a map, width doubles. Largest error {error:.0e}. "
        f"{figures.verdict(error < 1e-9 and deep < shallow, ' for this function')} Here alpha is 0, and the one layer "
        "is dense: it is what depth does for any network, and owes nothing to the diagonal.\n\n"
        f"**Measured, trained.** Parameters {sizes}; {numbers['steps']} steps of Adam, for each the best of the "
        f"rates {', '.join(f'{rate:g}' for rate in rates)}.{told_edges} Error over variance between the training "
        "points, median [lowest, highest] of the seeds:\n\n"
        + "\n".join(lines)
        + f"\n\nDepth against width, by the medians: **{text}.** By the worst seed depth is better at "
        f'{" and ".join(worst) or "no number of"} teeth. "depth, linear" is the function class of "width" in '
        "another parametrisation."
    )
