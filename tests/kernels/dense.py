"""The operations written out in float64, and inputs for them."""

from __future__ import annotations

import torch
from interpreted import DEVICE
from torch import Tensor

# relative to the largest entry of the float64 result; Triton's interpreter truncates to bfloat16 instead of rounding
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# T, I, O, r: every number of tokens and every rank that is special
SIZES = [
    (0, 8, 5, 2),
    (1, 9, 31, 1),
    (7, 12, 12, 0),
    (63, 17, 17, 8),
    (100, 33, 20, 3),
    (257, 19, 24, 16),
    (20, 70, 66, 64),
]


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def draw_q(kind: str, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor | None:
    """A diagonal: "vector", "scalar" or "none"."""
    return None if kind == "none" else draw(size if kind == "vector" else 1, dtype=dtype, seed=seed)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies in float64, with gradients of their own."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def rectangular(q: Tensor | None, rows: int, columns: int) -> Tensor | float:
    """diag(q) of that shape."""
    if q is None:
        return 0.0
    m = min(rows, columns)
    return torch.nn.functional.pad(torch.diag(q.expand(m)), (0, columns - m, 0, rows - m))


def largest_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; what is not finite fails."""
    assert got.isfinite().all()
    assert got.shape == expected.shape
    if not got.numel():
        return 0.0
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
