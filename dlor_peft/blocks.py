"""W' of one weight, block by block, so that what lies between W and W' stays in the cache.

Blocks are rows, or columns where a factor on the output side mixes the rows. Every merge goes through here, in memory
or on disk: equal weights and adapters give equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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


class Block(NamedTuple):
    """A piece of a weight: before, adapted, and rounded. `at` tells it from the others of its weight."""

    at: tuple[int, int, int]
    before: Tensor
    adapted: Tensor
    out: Tensor


def round_to_nearest(block: Block) -> None:
    """out <- adapted in the dtype of out, the nearest, ties to even."""
    block.out.copy_(block.adapted)


@torch.no_grad()
def write_adapted(
    W: Tensor,
    parts: Sequence[Part],
    out: Tensor,
    finish: Callable[[Block], Any] = round_to_nearest,
    each: Callable[[Callable, Iterable], Iterable[Any]] = map,
    is_safe: bool = False,
) -> list[Any]:
    """out <- W adapted by each part in turn, in float32 or wider, with one rounding to the dtype of `out`.

    Args:
        W: (O, I K) or (E, O, I), any strides; not changed.
        parts: in the order of merging.
        out: of the shape of W; may not overlap it.
        finish: rounds a block into its `out`. What it returns is returned for each block, in their order.
        each: calls a function on each block, which need not be one after the other.
        is_safe: raise ValueError where what one of the parts makes of W is not finite in the dtype of `out`.
    """
    wide_dtype = torch.promote_types(W.dtype, torch.float32)
    parts = [part._replace(residual=part.residual.to(wide_dtype)) for part in parts]
    # as experts, where they are none
    stack, out_stack = (W, out) if W.ndim == 3 else (W[None], out[None])

    @torch.no_grad()
    def adapt(place: tuple[int, slice, slice]) -> Any:
        e, rows, columns = place
        before = adapted = stack[e, rows, columns].to(wide_dtype)
        for part in parts:
            residual = part.residual.of_expert(e) if W.ndim == 3 else part.residual
            delta = part.form.delta_weight(residual, adapted, rows.start)
            adapted = torch.add(adapted, delta, alpha=part.scale)
            if is_safe and not adapted.to(out.dtype).isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {part.name} seems to be broken")
        return finish(Block((e, rows.start, columns.start), before, adapted, out_stack[e, rows, columns]))

    places = _blocks(stack.shape[1:], {part.form.mixes for part in parts})
    return list(each(adapt, [(e, *place) for e in range(len(stack)) for place in places]))


def _blocks(shape: torch.Size, mixes: set[str | None]) -> list[tuple[slice, slice]]:
    num_rows, num_columns = shape
    if mixes >= {"rows", "columns"}:
        return [(slice(0, num_rows), slice(0, num_columns))]
    if "rows" in mixes:
        # whole cache lines of each row
        step = max(64, BLOCK // max(1, num_rows))
        return [(slice(0, num_rows), columns) for columns in _slices(num_columns, step)]
    step = max(1, BLOCK // max(1, num_columns))
    return [(rows, slice(0, num_columns)) for rows in _slices(num_rows, step)]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
