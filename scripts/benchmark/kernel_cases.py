"""Operands for the five operations, and how far their results are from those in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, nan
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlor_peft.kernels import reference

Draw = Callable[..., Tensor]

# by the dtype of the result and of the operands: relative to an entry plus the root mean square of all
TOLERANCE = {
    (torch.bfloat16, torch.bfloat16): 3e-2,
    (torch.float16, torch.float16): 4e-3,
    (torch.float32, torch.float32): 1e-4,
    # products of half precision are exact, their sums are not
    (torch.float32, torch.bfloat16): 5e-4,
    (torch.float32, torch.float16): 5e-4,
}
TF32_TOLERANCE = 1e-2


def cases(kernel: str, draw: Draw, T: int, I: int, O: int, r: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What is asked of the operation, and its operands: with and without each of those that it can do without."""
    x, y, t, U, V, one = draw(T, I), draw(T, O), draw(T, r), draw(O, r), draw(I, r), draw(1)
    q_I, q_O, q, g = draw(I), draw(O), draw(min(I, O)), draw(T, O)
    if kernel == "down":
        if r:
            yield "no q", (x, V)
        yield "q", (x, V, q_I)
        yield "scalar q", (x, V, one)
    elif kernel == "expand":
        yield "no acc, no q", (t, U)
        yield "all", (t, U, y, x, q, q_O)
        yield "in place, x is acc", (t, U, y, y, q_O, None, True)
        yield "no acc, scalar q", (t, U, None, x, one)
    elif kernel == "mul":
        yield "no acc, no q", (None, x, None, U, V)
        yield "acc, q", (y, x, q, U, V)
        yield "acc is x, q", (x, x, q_I, draw(I, r), V)
        yield "acc is x, no q", (x, x, None, draw(I, r), V)
    elif kernel == "bwd_rows":
        yield "no q", (g, U, t)
        yield "q", (g, U, t, q_O)
        yield "q, y", (g, U, t, q_O, y)
        yield "scalar q, y", (g, U, t, one, y)
    elif kernel == "bwd_cols":
        if r:
            yield "no acc, no q", (None, None, t, V, x)
        yield "acc, q", (draw(T, I), g, t, V, x, q)
        yield "in place, g is acc", (*[draw(T, I)] * 2, t, V, x, q_I, True)
        yield "no dx, q", (None, g, t, V, x, q, False, False)
        yield "acc, scalar q", (draw(T, I), g, t, V, x, one)
    else:
        raise ValueError(f"{__name__}: no operands for {kernel!r}")


def error(got: Tensor | None, true: Tensor | None) -> float:
    """The largest difference, relative to the entry plus the root mean square; infinite where one is not finite."""
    if got is None or true is None:
        return 0.0 if got is true else inf
    if got.shape != true.shape:
        return inf
    if not true.numel():
        return 0.0
    scale = true.abs() + true.square().mean().sqrt().clamp_min(1e-30)
    largest = ((got.double() - true).abs() / scale).max().item()
    return largest if largest < inf else inf


def errors(ops: ModuleType, kernel: str, operands: tuple[Any, ...]) -> list[tuple[float, torch.dtype]]:
    """Of each result, and its dtype; the outputs are NaN before the kernel writes them."""
    wide: dict[int, Tensor] = {}
    # what is one tensor stays one
    doubled = [wide.setdefault(id(one), one.double()) if isinstance(one, Tensor) else one for one in operands]
    expected = _as_tuple(getattr(reference, kernel)(*doubled))
    with unwritten_is_nan(ops):
        results = _as_tuple(getattr(ops, kernel)(*operands))
    return [
        (error(got, true), torch.float32 if got is None else got.dtype)
        for got, true in zip(results, expected, strict=True)
    ]


def _as_tuple(results: Any) -> tuple[Tensor | None, ...]:
    return (results,) if isinstance(results, Tensor) else results


@contextmanager
def unwritten_is_nan(ops: ModuleType) -> Iterator[None]:
    new = ops._new
    ops._new = lambda *args, **options: new(*args, **options).fill_(nan)
    try:
        yield
    finally:
        ops._new = new
