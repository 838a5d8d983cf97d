"""The two orders that the frozen product and the adapter's term can be taken in, over a block's projections.

    product first   y = x W^T, then y += t U^T in place; backward dx = g W, then dx += h V^T in place
    prefill         y = t U^T, then y += x W^T in place; backward dx = h V^T, then dx += g W in place

Both write the result twice and read it once. In the second it is the matrix product that reads it, which is bound by
arithmetic and may hide that; in the first the adapter's kernel, which is bound by memory.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .measuring import FROZEN, Rounds, measure

RANK = 16
PREFILL = "prefill"

Projections = dict[tuple[int, int], int]  # (in_features, out_features) -> how many there are in a block

LLAMA_8B: Projections = {(4096, 4096): 2, (4096, 1024): 2, (4096, 14336): 2, (14336, 4096): 1}


class Set(NamedTuple):
    x: Tensor  # (T, I)
    g: Tensor  # (T, O)
    W: Tensor  # (O, I)
    t: Tensor  # (T, r)
    U: Tensor  # (O, r)
    h: Tensor  # (T, r)
    V: Tensor  # (I, r)
    out: Tensor  # (T, O)


class Calls:
    """A step that makes its calls, one after the other, on inputs that take turns."""

    def __init__(self, call: Callable[[Set], Any], turns: Sequence[Sequence[Set]]) -> None:
        self.call = call
        self.turns = itertools.cycle(turns)

    def prepare(self) -> None:
        self.sets = next(self.turns)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def run(self) -> None:
        for given in self.sets:
            self.call(given)


def mm(given: Set) -> Tensor:
    return torch.mm(given.x, given.W.T)


def addmm(given: Set) -> Tensor:
    return given.out.addmm_(given.x, given.W.T)


def forward_orders(ops: ModuleType) -> tuple[Callable[[Set], Any], Callable[[Set], Any]]:
    """Product first, and prefill, as `dlor_peft.kernels.autograd` takes them."""
    return (
        lambda s: ops.expand(s.t, s.U, F.linear(s.x, s.W), inplace=True),
        lambda s: ops.expand(s.t, s.U).addmm_(s.x, s.W.T),
    )


def backward_orders(ops: ModuleType) -> tuple[Callable[[Set], Any], Callable[[Set], Any]]:
    return (
        lambda s: ops.bwd_cols(s.g @ s.W, None, s.h, s.V, s.x, None, True)[0],
        lambda s: ops.bwd_cols(None, None, s.h, s.V, s.x)[0].addmm_(s.g, s.W),
    )


def draw(T: int, I: int, O: int, device: str) -> Set:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    # a weight's deviation keeps results near 1
    W = normal(O, I) / I**0.5
    return Set(
        normal(T, I),
        normal(T, O),
        W,
        normal(T, RANK),
        normal(O, RANK),
        normal(T, RANK),
        normal(I, RANK),
        normal(T, O),
    )


def is_go(rounds: Rounds) -> bool:
    """Prefill is faster by more than the spread: its upper quartile is below the lower one of the same order again."""
    return not rounds.is_void and rounds.ratio(PREFILL).q3 < min(1.0, rounds.ratio(FROZEN).q1)


def run(arguments: argparse.Namespace, ops: ModuleType, save: Callable[..., None]) -> None:
    T, projections, rounds = (8192, LLAMA_8B, 9) if not arguments.quick else (32, {(32, 32): 2, (32, 48): 1}, 1)
    device = arguments.device
    # four of each, the weights too: the L2 cache holds none of what comes next
    drawn = {shape: [draw(T, *shape, device) for _ in range(4)] for shape in projections}

    def compare(first: Callable, second: Callable, turns: Sequence[Sequence[Set]]) -> Rounds:
        steps = Calls(first, turns), Calls(second, turns)
        for step in steps:
            for _ in range(len(turns) + 1):
                step.prepare()
                step.run()
        return measure(steps[0], {PREFILL: steps[1]}, device, rounds, 5 if device == "cuda" else 1)

    def told(what: str, compared: Rounds) -> dict[str, Any]:
        frozen, ratio = torch.tensor(compared.frozen_seconds).median().item(), compared.ratio(PREFILL)
        print(f"  {what:34} {1000 * frozen:8.3f} ms   x {ratio}", flush=True)
        return {"seconds": frozen, "ratio": ratio, "to_itself": compared.ratio(FROZEN), "void": compared.is_void}

    print("time of the first order, and that of the second over it [quartiles]", flush=True)
    results: dict[str, Any] = {}
    for (I, O), sets in drawn.items():
        turns = [[one] for one in sets]
        for name, orders in (
            ("mm, addmm_", (mm, addmm)),
            ("forward", forward_orders(ops)),
            ("backward", backward_orders(ops)),
        ):
            results[f"{I} -> {O}, {name}"] = told(f"{I} -> {O}, {name}", compare(*orders, turns))
            save(products=results)
    block = [[drawn[shape][turn] for shape, number in projections.items() for _ in range(number)] for turn in range(4)]
    forward, backward = forward_orders(ops), backward_orders(ops)
    whole = [lambda s, order=order: (forward[order](s), backward[order](s)) for order in (0, 1)]
    total = compare(whole[0], whole[1], block)
    results["block"] = told("all projections, forward, backward", total)
    own, noise, go = total.ratio(PREFILL), total.ratio(FROZEN), is_go(total)
    print(f"  prefill {own}, product first to itself {noise}: {'go' if go else 'no-go'}", flush=True)
    save(products=results, go=go)
