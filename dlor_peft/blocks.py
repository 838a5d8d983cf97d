"""W' of one weight, block by block, so that what lies between W and W' stays in the cache.

Blocks are rows, or columns where a factor on the output side mixes the rows. Every merge goes through here, in memory
or on disk: equal weights and adapters give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .form import Form, Residual

BLOCK = 2**18
"""Numbers in a block: 1 MiB in float32."""


class Part(NamedTuple):
    """One adapter on one weight."""

    name: str
    form: Form
    residual: Residual
    scale: float = 1.0


def round_to_nearest(wide: Tensor, out: Tensor) -> None:
    """out <- wide in the dtype of out, the nearest, ties to even."""
    out.copy_(wide)


@torch.no_grad()
def write_adapted(
    W: Tensor,
    parts: Sequence[Part],
    out: Tensor,
    rounding: Callable[[Tensor, Tensor], None] = round_to_nearest,
    look: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    is_safe: bool = False,
) -> None:
    """out <- W adapted by each part in turn, in float32 or wider, with one rounding to the dtype of `out`.

    Args:
        W: (O, I K) or (E, O, I), any strides; not changed.
        parts: in the order of merging.
        out: of the shape of W; may not overlap it.
        rounding: writes its first argument into its second.
        look: is handed each block of W and of W', wide, and of `out`.
        is_safe: raise ValueError where what one of the parts makes of W is not finite in the dtype of `out`.
    """
    if W.ndim == 3:
        for e in range(W.shape[0]):
            of_expert = [part._replace(residual=part.residual.of_expert(e)) for part in parts]
            write_adapted(W[e], of_expert, out[e], rounding, look, is_safe)
        return
    wide_dtype = torch.promote_types(W.dtype, torch.float32)
    parts = [part._replace(residual=part.residual.to(wide_dtype)) for part in parts]
    for rows, columns in _blocks(W, {part.form.mixes for part in parts}):
        before = adapted = W[rows, columns].to(wide_dtype)
        for part in parts:
            adapted = adapted + part.form.delta_weight(part.residual, adapted, part.scale, rows.start)
            if is_safe and not adapted.to(out.dtype).isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {part.name} seems to be broken")
        rounding(adapted, out[rows, columns])
        if look is not None:
            look(before, adapted, out[rows, columns])


@torch.no_grad()
def update_blocks(W: Tensor, part: Part) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows and columns of a block, and there W and W' - W, in float32 or wider. W is (O, I K)."""
    wide_dtype = torch.promote_types(W.dtype, torch.float32)
    residual = part.residual.to(wide_dtype)
    for rows, columns in _blocks(W, {part.form.mixes}):
        before = W[rows, columns].to(wide_dtype)
        yield rows, columns, before, part.form.delta_weight(residual, before, part.scale, rows.start)


def _blocks(W: Tensor, mixes: set[str | None]) -> Iterator[tuple[slice, slice]]:
    num_rows, num_columns = W.shape
    if mixes >= {"rows", "columns"}:
        yield slice(0, num_rows), slice(0, num_columns)
    elif "rows" in mixes:
        # whole cache lines of each row
        step = max(64, BLOCK // max(1, num_rows))
        for start in range(0, num_columns, step):
            yield slice(0, num_rows), slice(start, min(start + step, num_columns))
    else:
        step = max(1, BLOCK // max(1, num_columns))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows)), slice(0, num_columns)
