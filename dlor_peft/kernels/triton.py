"""The five operations of `reference`, whose shapes and meanings they have, as Triton kernels.

Operands are bfloat16, float16 or float32, of any strides, and of a rank up to `launch.MAX_RANK`; sums are taken in
float32. Results of the operands' dtype are contiguous, but for what is written in place. Gradients of U, V and q are
float32: every program writes its part of a sum over tokens, and the parts are added up in a fixed order, so that they
are the same from run to run. `launch` says how many bytes each of them moves, and in which blocks.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import launch
from .launch import Config
from .triton_kernels import (
    INTERPRETED,
    bwd_cols_kernel,
    bwd_rows_kernel,
    down_kernel,
    expand_kernel,
    mul_kernel,
    sum_kernel,
)

# rows and columns of partial sums that are loaded at once
SUM_PARTS, SUM_BLOCK = 16, 128


def down(x: Tensor, V: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (T, I), r = x.shape, V.shape[1]
    t = _new(x, T, r)
    z = x if q is None else _new(x, T, I)
    if T and (r or q is not None):
        config = _config("down", x, r, I)
        tensors = x, V, q, t, z
        strides = *x.stride(), *V.stride(), _stride(q)
        _launch(down_kernel, _blocks(T, config.tokens), x, r, config, *tensors, T, I, r, *strides)
    return t, z


def expand(
    t: Tensor,
    U: Tensor,
    acc: Tensor | None = None,
    x: Tensor | None = None,
    q: Tensor | None = None,
    bias: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    T, (O, r) = t.shape[0], U.shape
    out = acc if inplace and acc is not None else _new(t, T, O)
    m = 0
    if q is not None:
        assert x is not None
        m = min(x.shape[1], O)
    # read once
    x = None if q is None or x is acc else x
    if T:
        config = _config("expand", t, r, O)
        tensors = t, U, acc, x, q, bias, out
        strides = *t.stride(), *U.stride(), *_strides(acc), *_strides(x), _stride(q), _stride(bias), *out.stride()
        programs = _blocks(T, config.tokens) * _blocks(O, config.columns)
        _launch(expand_kernel, programs, t, r, config, *tensors, T, O, m, r, *strides)
    return out


def mul(acc: Tensor | None, x: Tensor, q: Tensor | None, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    (T, I), (O, r) = x.shape, U.shape
    config = launch.choose("mul", _capability(x.device), x.element_size(), r, max(I, O))
    if config is None or not (T and r):
        t, _ = down(x, V)
        return expand(t, U, acc, x, q), t
    t, out = _new(x, T, r), _new(x, T, O)
    acc_is_x = acc is x
    tensors = None if acc_is_x else acc, x, q, U, V, t, out
    strides = *_strides(acc), *x.stride(), _stride(q), *U.stride(), *V.stride()
    programs = _blocks(T, config.tokens)
    _launch(mul_kernel, programs, x, r, config, *tensors, T, I, O, min(I, O), r, *strides, acc_is_x)
    return out, t


def bwd_rows(
    g: Tensor, U: Tensor, t: Tensor | None = None, q: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    y = None if q is None else y
    if t is None and y is None:
        h, scaled = down(g, U, q)
        return h, None, scaled, None
    (T, O), r = g.shape, U.shape[1]
    config = launch.choose("bwd_rows", _capability(g.device), g.element_size(), r, O)
    if config is None or t is None:
        h, scaled = down(g, U, q)
        # without t a factor without columns
        right = _new(g, T, 0) if t is None else t
        _, dU, dq = bwd_cols(None, y, right, U[:, : right.shape[1]], g, None if y is None else q, needs_dx=False)
        return h, None if t is None else dU, scaled, dq
    chunk, chunks = launch.chunks(T, O)
    blocks = _blocks(O, config.columns)
    width = O * r + (0 if y is None else O)
    h_parts, parts = _new(g, blocks, T * r, dtype=torch.float32), _new(g, chunks, width, dtype=torch.float32)
    scaled = g if q is None else _new(g, T, O)
    if T and (r or q is not None):
        tensors = g, U, t, q, y, h_parts, scaled, parts
        strides = *g.stride(), *U.stride(), *t.stride(), _stride(q), *_strides(y)
        _launch(bwd_rows_kernel, blocks * chunks, g, r, config, *tensors, T, O, r, chunk, width, *strides)
    h = _sum(h_parts, g.dtype).view(T, r)
    dU, dq = _split(_sum(parts, torch.float32), O, r, None if y is None else q)
    return h, dU, scaled, dq


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
    if x is None:
        return expand(h, V, acc, g, q, inplace=inplace) if needs_dx else None, None, None
    (T, I), r = x.shape, V.shape[1]
    m = 0
    if q is not None:
        assert g is not None
        m = min(I, g.shape[1])
    dx = None
    if needs_dx:
        dx = acc if inplace and acc is not None else _new(x, T, I)
    else:
        acc = None
    # read once
    g = None if q is None or g is acc else g
    chunk, chunks = launch.chunks(T, I)
    width = I * r + m
    parts = _new(x, chunks, width, dtype=torch.float32)
    if T and (needs_dx or width):
        config = _config("bwd_cols", x, r, I)
        tensors = acc, g, h, V, x, q, dx, parts
        strides = *_strides(acc), *_strides(g), *h.stride(), *V.stride(), *x.stride(), _stride(q), *_strides(dx)
        programs = _blocks(I, config.columns) * chunks
        _launch(bwd_cols_kernel, programs, x, r, config, *tensors, T, I, m, r, chunk, width, *strides)
    dV, dq = _split(_sum(parts, torch.float32), I, r, q)
    return dx, dV, dq


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first of two dimensions."""
    num_parts, size = parts.shape
    if not num_parts:
        return parts.new_zeros(size, dtype=dtype)
    out = _new(parts, size, dtype=dtype)
    if size:
        kernel: Any = sum_kernel
        with _on(parts):
            kernel[(_blocks(size, SUM_BLOCK),)](parts, out, num_parts, size, SUM_PARTS, SUM_BLOCK)
    return out


def _split(sums: Tensor, width: int, r: int, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of a factor (width, r) and of q, which lie one after the other."""
    factor, columns = sums[: width * r].view(width, r), sums[width * r :]
    if q is None:
        return factor, None
    return factor, columns if q.numel() == columns.numel() else columns.sum(0, keepdim=True)


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _config(kernel: str, x: Tensor, r: int, width: int) -> Config:
    config = launch.choose(kernel, _capability(x.device), x.element_size(), r, width)
    assert config is not None
    return config


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _launch(kernel: Any, programs: int, x: Tensor, r: int, config: Config, *args: Any) -> None:
    # not torch.get_float32_matmul_precision, which raises where the precision was set through torch.backends
    exact = x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    with _on(x):
        kernel[(programs,)](
            *args,
            R=launch.padded(r),
            BLOCK_T=config.tokens,
            BLOCK_K=config.columns,
            PRECISION="ieee" if exact else "tf32",
            INTERPRETED=INTERPRETED,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _on(x: Tensor) -> AbstractContextManager:
    # Triton launches on the current device, whichever the tensors are on
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _stride(q: Tensor | None) -> int:
    # a scalar is every column's
    return 0 if q is None or q.numel() == 1 else q.stride(0)
