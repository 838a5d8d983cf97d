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
RATES = (3e-3, 1e-2, 3e-2, 1e-1)


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
        with torch.no_grad():
            made = exact(times)
            error = (made(unseen) - y_unseen).abs().max().item()
        parameters = sum(p.numel() for p in made.parameters())
        results[str(2 ** (times - 1))] = {"trained": rows, "exact_error": error, "exact_parameters": parameters}
    return {"steps": steps, "teeth": results}


def winner(rows: dict[str, Any]) -> tuple[str, bool]:
    """The kind of the lowest median, and whether its worst seed is below the best seed of every other."""
    first = min(rows, key=lambda kind: median(rows[kind]["errors"]))
    others = [min(row["errors"]) for kind, row in rows.items() if kind != first]
    return first, max(rows[first]["errors"]) < min(others)


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, right) = figures.panels(2)
    times = max(int(count).bit_length() for count in numbers["teeth"])
    x = torch.linspace(0, 1, 1025, dtype=torch.float64)
    left.plot(x, tent(x, times), linewidth=0.8)
    figures.finish(left, "x", "T(...T(x))", f"{2 ** (times - 1)} teeth", legend=False)
    for place, content in enumerate(numbers["teeth"].values()):
        for shift, (kind, row) in enumerate(content["trained"].items()):
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
    lines, beats = [], []
    for count, content in numbers["teeth"].items():
        rows = content["trained"]
        first, is_clear = winner(rows)
        if median(rows["depth"]["errors"]) < median(rows["width"]["errors"]):
            beats.append(count)
        told = ", ".join(f"{kind} {figures.spread(row['errors'])}" for kind, row in rows.items())
        lines.append(f"- {count} teeth: {told}. Lowest: {first}, {'in every seed' if is_clear else 'seeds overlap'}.")
    contents = list(numbers["teeth"].values())
    sizes = ", ".join(
        f"{kind} {row['parameters']} (width {row['width']})" for kind, row in contents[0]["trained"].items()
    )
    exact_error = max(content["exact_error"] for content in contents)
    exact_sizes = ", ".join(str(content["exact_parameters"]) for content in contents)
    agrees = len(beats) == len(contents)
    text = "Agrees" if agrees else f"Agrees at {', '.join(beats)} teeth only" if beats else "Does not agree"
    return (
        "**Claim.** Multiplicative depth gives more expressivity for a parameter than additive width.\n\n"
        "**Measured.** As a construction: one layer u v^T for each further tent map, two units wide, is the sawtooth "
        f"itself, with {exact_sizes} parameters and an error of {exact_error:.0e}. Trained: parameters {sizes}; "
        f"{numbers['steps']} steps of Adam, for each the best of the rates {', '.join(f'{r:g}' for r in RATES)}. "
        "Error over variance between the training points, median [lowest, highest] of the seeds:\n\n"
        + "\n".join(lines)
        + f'\n\nDepth against width, by the medians of trained networks: **{text}.** "depth, linear" is the '
        'function class of "width" in another parametrisation.'
    )
