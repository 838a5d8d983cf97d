"""Data-driven starts of a fresh adapter: the factor that is not 0 gets given directions, at the size that it had.

At U = 0 and delta = 0 V does not show in the output: whatever it holds, the adapter is the exact identity. (Where V is
what starts at 0, in the low-rank term of an embedding, U and V change places.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from .placement import offload_hook, overwrite, whole

if TYPE_CHECKING:
    from .base import DLoRLayer

_is_loading = ContextVar("is_loading", default=False)


@contextmanager
def loading() -> Iterator[None]:
    """While it lasts adapters are added whose tensors are read from a file afterwards: no start is computed."""
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


@torch.no_grad()
def start_from_weight(layer: DLoRLayer, adapter_name: str) -> None:
    """V <- the top right-singular vectors of what its term multiplies or is added to; see `set_directions`.

    That is W, a convolution's as a matrix (O, C K); W^T for factors on the output side; for those on the input side of
    a convolution (O K, C). Experts have directions of their own. Nothing happens where the weight is on the meta
    device, or where an adapter is loaded. O(d_in d_out L r) a layer, and its weight in float32.
    """
    form = layer.form[adapter_name]
    name = layer.factor_names(adapter_name)[1]
    if name not in form.shapes or _is_loading.get():
        return
    base_layer = layer.get_base_layer()
    stored = getattr(base_layer, layer.parameter_name, None)
    # HQQ's layers have no such attribute
    is_unknown = stored is not None and stored.is_meta and offload_hook(base_layer) is None
    if is_unknown or getattr(layer, name)[adapter_name].weight.is_meta:
        return
    with gather_params_ctx(base_layer.parameters(recurse=False), modifier_rank=None):
        W = form.read_by_update(layer._as_matrix(_weight(layer)))
        if name == "dlor_U":
            W = W.mT
        count = form.depth * form.r
        each = [top_right_singular_vectors(one, count) for one in (W if form.experts else W[None])]
    set_directions(layer, adapter_name, each)


def _weight(layer: DLoRLayer) -> Tensor:
    try:
        return layer.get_base_weight()
    except (NotImplementedError, TypeError) as error:
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f'dlor_peft.layers.start: init_weights="svd" needs the weight of this {kind}, which cannot be dequantised '
            f"({error}). Use init_weights=True, or dlor_peft.initialize_from_data, which needs no weight."
        ) from error


def top_right_singular_vectors(W: Tensor, count: int) -> Tensor:
    """(columns, c): those of the `count` largest singular values of W (rows, columns), c <= count without zeros.

    By 12 rounds of subspace iteration on twice as many vectors and 8 more, or by the whole SVD where that is no less.
    The same for the same W, on every process: the start of the iteration is its own (torch.svd_lowrank, the same
    algorithm, draws it from the random state of the process), and the largest entry of each vector is positive.
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if not W.isfinite().all():
        raise ValueError(
            'dlor_peft.layers.start: init_weights="svd" is asked for on a weight that is not finite. Repair the base '
            "model, or keep the layer out with exclude_modules."
        )
    num_vectors = 2 * count + 8
    if num_vectors < min(W.shape):
        Q = torch.linalg.qr(W @ fixed_normal(W.shape[1], num_vectors).to(W))[0]
        for _ in range(12):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q)[0])[0]
        _, sizes, transposed = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    else:
        _, sizes, transposed = torch.linalg.svd(W, full_matrices=False)
    vectors = transposed.mT
    kept = sizes[:count] > sizes.amax() * max(W.shape) * torch.finfo(W.dtype).eps
    return positive(vectors[:, :count][:, kept])


def fixed_normal(rows: int, columns: int) -> Tensor:
    """Normal numbers on the CPU, in float32, the same in every process; the random state is left alone."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def positive(vectors: Tensor) -> Tensor:
    """The columns, each with the sign that makes its largest entry positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


@torch.no_grad()
def set_directions(layer: DLoRLayer, adapter_name: str, each: Sequence[Tensor]) -> None:
    """V <- orthonormal columns, for each expert (q, c), scaled to the expected norm of the columns of a random start.

    A stack takes them in blocks of r, the first for F_1. Columns beyond c stay as they are.
    """
    form = layer.form[adapter_name]
    name = layer.factor_names(adapter_name)[1]
    weight = getattr(layer, name)[adapter_name].weight
    # a uniform column of V has the expected square 1/3, a normal one of U one for each entry
    size = 3**-0.5 if name == "dlor_V" else weight.shape[-2] ** 0.5
    value = whole(weight).clone()
    stacks = value.movedim(0, -2).reshape(-1, weight.shape[-2], form.depth * form.r)  # (E, q, L r)
    for stack, directions in zip(stacks, each, strict=True):
        stack[:, : directions.shape[1]] = size * directions
    value = stacks.unflatten(-1, (form.depth, form.r)).movedim(-2, 0).reshape(weight.shape)
    overwrite(weight, value)
