"""Ratios to the frozen reference, measured in turn with it in one process.

    ratio of a round = contestant / mean(frozen before, frozen after)

A shared machine changes its speed in the course of a run: absolute times of two contestants cannot be compared, while
what was measured within a second can. Each round takes the contestants in an order of its own; a ratio is reported as
its median over the rounds, with the quartiles. Two contestants are compared by the quotient of their ratios, round by
round. The frozen reference is a contestant too: a run in which it is not as fast as itself is void.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

FROZEN = "frozen"
TOLERANCE = (0.97, 1.03)
"""Where the median ratio of the frozen reference to itself must lie."""


class Step(Protocol):
    def prepare(self) -> None:
        """What is not timed: takes the next input, drops the gradients of the last step."""
        ...

    def forward(self) -> Tensor: ...

    def run(self) -> None:
        """What is timed, forward and backward."""
        ...


class Spread(NamedTuple):
    median: float
    q1: float
    q3: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.q1:.3f}, {self.q3:.3f}]"


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3)


@dataclass(frozen=True)
class Rounds:
    """What a run measured: seconds of the frozen reference for one step, and each contestant's ratio in each round."""

    frozen_seconds: list[float]
    ratios: dict[str, list[float]]

    def ratio(self, name: str, over: str = FROZEN) -> Spread:
        """Time of `name` over that of `over`; the quotient of two contestants is formed round by round."""
        ratios = self.ratios[name]
        if over != FROZEN:
            ratios = [own / other for own, other in zip(ratios, self.ratios[over], strict=True)]
        return spread(ratios)

    @property
    def is_void(self) -> bool:
        return not TOLERANCE[0] <= self.ratio(FROZEN).median <= TOLERANCE[1]


def measure(
    frozen: Step, contestants: Mapping[str, Step], device: str, rounds: int, iterations: int, seed: int = 0
) -> Rounds:
    """Time of every contestant and of `frozen` itself, over that of `frozen`; all of them are warmed up already.

    CPU: time of the calling thread, in which autograd also runs; set_num_threads(1) is up to the caller. CUDA: event
    pairs around each step.
    """
    sample = _sample_cuda if device == "cuda" else _sample_cpu
    contestants = {FROZEN: frozen, **contestants}
    result = Rounds([], {name: [] for name in contestants})
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    gc.disable()
    for _ in range(rounds):
        gc.collect()
        shuffle(order)
        for name in order:
            before = sample(frozen, iterations)
            own = sample(contestants[name], iterations)
            after = sample(frozen, iterations)
            result.frozen_seconds.extend((before, after))
            result.ratios[name].append(2 * own / (before + after))
    gc.enable()
    return result


def _sample_cpu(step: Step, iterations: int) -> float:
    seconds = 0.0
    for _ in range(iterations):
        step.prepare()
        start = time.thread_time()
        step.run()
        seconds += time.thread_time() - start
    return seconds / iterations


def _sample_cuda(step: Step, iterations: int) -> float:
    # without events: from here on the host is ahead of the device, as it is in training
    step.prepare()
    step.run()
    pairs = []
    for _ in range(iterations):
        step.prepare()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step.run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / 1000 / iterations


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, each counted once, the input among them.

    Parameters and buffers of `module` are there anyway, and do not count.
    """
    resident = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    # holding on to them keeps an address from being given away twice
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())
