"""Which implementation of the five operations runs, and in which order: decided here and nowhere else.

`DLOR_KERNELS` asks for one: auto (default), triton, torch or reference.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import eager, operators, reference
from .launch import MAX_RANK

Capability = tuple[int, int]

CHOICES = ("auto", "triton", "torch", "reference")

# compute capabilities on which scripts/gpu_check.py has passed and measured: elsewhere "auto" takes PyTorch's kernels,
# and "triton" has to be asked for
MEASURED: frozenset[Capability] = frozenset({(9, 0)})
# those of them on which the frozen product is faster when it accumulates onto the adapter's term than when the term is
# added to it. On a CPU it is not: scripts/bench_layer.py
PREFILLS: frozenset[Capability] = frozenset()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _requested() -> str:
    value = os.environ.get("DLOR_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(
            f"dlor_peft.kernels: DLOR_KERNELS={value!r} is none of {', '.join(CHOICES)}. Unset it for the default."
        )
    return value


# read once: a change would need compiled models to be compiled again
requested = _requested()


def implementation(x: Tensor, r: int) -> ModuleType:
    """The module whose five operations run for x at rank r: `eager`, `reference`, `triton` or its `operators`.

    ValueError or ImportError where DLOR_KERNELS=triton and Triton cannot run there.
    """
    if requested == "reference":
        return reference
    device = x.device
    if requested == "torch" or (requested == "auto" and device.type != "cuda"):
        return eager
    obstacle = _obstacle(device.type, device.index, x.dtype, r)
    if obstacle is None:
        # torch.compile sees an operator each where it cannot look into a kernel
        return operators if torch.compiler.is_compiling() else operators.kernels()
    if requested == "auto":
        return eager
    error = ImportError if not _has_triton() else ValueError
    raise error(f"dlor_peft.kernels: DLOR_KERNELS=triton, but {obstacle}. Set it to auto or torch.")


def prefills(x: Tensor) -> bool:
    """Whether `linear` writes the adapter's term first and lets the frozen product accumulate onto it."""
    return _prefills(x.device.type, x.device.index)


def _prefills(device: str, index: int | None) -> bool:
    return device == "cuda" and _capability(index) in PREFILLS


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _obstacle(device: str, index: int | None, dtype: torch.dtype, r: int) -> str | None:
    """Why the Triton kernels do not run; None where they do."""
    if not _has_triton():
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"Triton runs on CUDA devices, and on the CPU under TRITON_INTERPRET=1, not on {device}"
    if dtype not in _DTYPES:
        return f"the kernels take {', '.join(map(str, _DTYPES))}, not {dtype}"
    if r > MAX_RANK:
        return f"the kernels take ranks to {MAX_RANK} (r times depth), not {r}"
    if requested == "auto" and _capability(index) not in MEASURED:
        return "scripts/gpu_check.py has not been run on a GPU of this compute capability yet"
    return None


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> Capability:
    # torch remembers it
    return torch.cuda.get_device_capability(index)


def report(model: nn.Module | None = None) -> str:
    """What runs on each device, and why; for the layers of a model also how they run.

    Lines of text. Rank 16 stands for all ranks.
    """
    lines = [f"DLOR_KERNELS={requested}"]
    places = [("cpu", None), *(("cuda", index) for index in range(torch.cuda.device_count()))]
    for kind, index in places:
        name = kind if index is None else f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        for dtype in _DTYPES:
            lines.append(f"{name}, {dtype}: {_explain(kind, index, dtype)}")
        lines.append(f"{name}, order: {'adapter first' if _prefills(kind, index) else 'frozen product first'}")
    if model is not None:
        layers: list[Any] = [module for module in model.modules() if hasattr(module, "explain_kernels")]
        whys = Counter(layer.explain_kernels() for layer in layers)
        lines += [f"{count} layers: {why}" for why, count in whys.most_common()]
    return "\n".join(lines)


def _explain(device: str, index: int | None, dtype: torch.dtype) -> str:
    if requested in ("torch", "reference"):
        return f"{requested}, asked for"
    if requested == "auto" and device == "cpu":
        return "torch: the kernels are for GPUs"
    obstacle = _obstacle(device, index, dtype, 16)
    if obstacle is None:
        return "triton"
    return f"torch: {obstacle}" if requested == "auto" else f"an error: {obstacle}"
