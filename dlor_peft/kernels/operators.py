"""The Triton kernels as operators, for torch.compile, which cannot look into them: the five functions, none in place.

An operator returns tensors only: one that is empty stands for None, or for an input that would be handed back.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def down(x: Tensor, V: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    t, z = torch.ops.dlor.down(x, V, q)
    return t, x if q is None else z


def expand(
    t: Tensor,
    U: Tensor,
    acc: Tensor | None = None,
    x: Tensor | None = None,
    q: Tensor | None = None,
    bias: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    return torch.ops.dlor.expand(t, U, acc, x, q, bias)


def mul(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dlor.mul(acc, x, q, U, V)


def bwd_rows(
    g: Tensor, U: Tensor, t: Tensor | None = None, q: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    h, dU, scaled, dq = torch.ops.dlor.bwd_rows(g, U, t, q, y)
    return h, None if t is None else dU, g if q is None else scaled, None if q is None or y is None else dq


def bwd_cols(
    acc: Tensor | None,
    g: Tensor | None,
    h: Tensor,
    V: Tensor,
    x: Tensor | None = None,
    q: Tensor | None = None,
    inplace: bool = False,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dx, dV, dq = torch.ops.dlor.bwd_cols(acc, g, h, V, x, q, needs_dx)
    return dx if needs_dx else None, None if x is None else dV, None if x is None or q is None else dq


@cache
def kernels() -> ModuleType:
    """`triton`, which is imported when it is first used."""
    return import_module(".triton", __package__)


def _or_empty(like: Tensor, result: Tensor | None) -> Tensor:
    return like.new_empty(0) if result is None else result


def _apart(like: Tensor, dq: Tensor | None) -> Tensor:
    # the gradients of q and of a factor lie in one piece of memory, which results of an operator may not share
    return like.new_empty(0) if dq is None else dq.clone()


@torch.library.custom_op("dlor::down", mutates_args=())
def _down(x: Tensor, V: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    t, z = kernels().down(x, V, q)
    return t, _or_empty(x, None if q is None else z)


@_down.register_fake
def _(x: Tensor, V: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], V.shape[1]), x.new_empty(0 if q is None else x.shape)


@torch.library.custom_op("dlor::expand", mutates_args=())
def _expand(
    t: Tensor, U: Tensor, acc: Tensor | None, x: Tensor | None, q: Tensor | None, bias: Tensor | None
) -> Tensor:
    return kernels().expand(t, U, acc, x, q, bias)


@_expand.register_fake
def _(t: Tensor, U: Tensor, acc: Tensor | None, x: Tensor | None, q: Tensor | None, bias: Tensor | None) -> Tensor:
    return t.new_empty(t.shape[0], U.shape[0])


@torch.library.custom_op("dlor::mul", mutates_args=())
def _mul(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return kernels().mul(acc, x, q, U, V)


@_mul.register_fake
def _(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], U.shape[0]), x.new_empty(x.shape[0], U.shape[1])


@torch.library.custom_op("dlor::bwd_rows", mutates_args=())
def _bwd_rows(
    g: Tensor, U: Tensor, t: Tensor | None, q: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, dU, scaled, dq = kernels().bwd_rows(g, U, t, q, y)
    return h, _or_empty(g, dU), _or_empty(g, None if q is None else scaled), _apart(g, dq)


@_bwd_rows.register_fake
def _(
    g: Tensor, U: Tensor, t: Tensor | None, q: Tensor | None, y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        g.new_empty(g.shape[0], U.shape[1]),
        g.new_empty(0) if t is None else g.new_empty(U.shape, dtype=torch.float32),
        g.new_empty(0 if q is None else g.shape),
        g.new_empty(0) if q is None or y is None else g.new_empty(q.shape, dtype=torch.float32),
    )


@torch.library.custom_op("dlor::bwd_cols", mutates_args=())
def _bwd_cols(
    acc: Tensor | None,
    g: Tensor | None,
    h: Tensor,
    V: Tensor,
    x: Tensor | None,
    q: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dV, dq = kernels().bwd_cols(acc, g, h, V, x, q, needs_dx=needs_dx)
    return _or_empty(h, dx), _or_empty(h, dV), _apart(h, dq)


@_bwd_cols.register_fake
def _(
    acc: Tensor | None,
    g: Tensor | None,
    h: Tensor,
    V: Tensor,
    x: Tensor | None,
    q: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        h.new_empty(h.shape[0], V.shape[0]) if needs_dx else h.new_empty(0),
        h.new_empty(0) if x is None else h.new_empty(V.shape, dtype=torch.float32),
        h.new_empty(0) if x is None or q is None else h.new_empty(q.shape, dtype=torch.float32),
    )
