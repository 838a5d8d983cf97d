"""Time and achieved bandwidth of the five operations, beside the same operations in PyTorch.

Bytes are those of `dlor_peft.kernels.launch`, the bandwidth to compare with is that of a large copy in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from kernel_resources import arguments as operands_of
from torch import Tensor

from dlor_peft.kernels import eager, launch
from dlor_peft.kernels.launch import Config

# call, and the operands that take turns -> seconds of one call
Timer = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], float]


def bytes_moved(kernel: str, T: int, width: int, r: int, e: int, has_all: bool, config: Config | None) -> int:
    """Of an operation on T tokens, all widths equal, e bytes an element: with all operands, or with the fewest.

    Without `config` it is two passes, see `launch`.
    """
    of_width, of_rank, chunks = e * T * width, e * T * r, launch.chunks(T, width)[1]
    partial_sums = 8 * chunks * width * (r + has_all)
    if kernel == "down":
        return of_width + of_rank + has_all * of_width
    if kernel == "expand":
        return of_width + of_rank + has_all * 2 * of_width
    if kernel == "mul":
        if config is None:
            return 2 * (of_width + of_rank) + has_all * 2 * of_width
        return 2 * of_width + of_rank + has_all * of_width
    if kernel == "bwd_rows":
        if config is None:
            # down of g, and bwd_cols without dx; of the gradient of q
            return 2 * (of_width + of_rank) + has_all * 2 * of_width + partial_sums
        return of_width + 2 * of_rank + has_all * 2 * of_width + 8 * r * width * T // config.columns + partial_sums
    if kernel == "bwd_cols":
        return 2 * of_width + of_rank + has_all * 2 * of_width + partial_sums
    raise ValueError(f"{__name__}: no formula for {kernel!r}")


def cuda_timer(call: Callable[..., Any], turns: Sequence[tuple[Any, ...]]) -> float:
    """Median of batches of one call for each of `turns`, whose results are all kept: no call finds its own in L2."""
    batches = []
    for batch in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # the host gets ahead meanwhile, so that no launch is waited for
        torch.cuda._sleep(6_000_000)
        start.record()
        kept = [call(*operands) for operands in turns]
        end.record()
        torch.cuda.synchronize()
        del kept
        if batch > 2:
            batches.append(start.elapsed_time(end) / 1000 / len(turns))
    return statistics.median(batches)


def host_timer(call: Callable[..., Any], turns: Sequence[tuple[Any, ...]]) -> float:
    start = time.perf_counter()
    for operands in turns:
        call(*operands)
    return (time.perf_counter() - start) / len(turns)


def copy_bandwidth(device: str, timer: Timer, size: int) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timer(target.copy_, [(source,)])


def measure(
    ops: ModuleType, T: int, widths: Sequence[int], ranks: Sequence[int], device: str, timer: Timer, copy: float
) -> list[dict[str, Any]]:
    """A row for each operation, width, rank, and with all operands or the fewest."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    rows = []

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    for kernel, width, r, has_all in itertools.product(launch.TABLE, widths, ranks, (False, True)):
        turns = [operands_of(kernel, draw, T, width, r, has_all) for _ in range(4)]
        seconds, by_torch = timer(getattr(ops, kernel), turns), timer(getattr(eager, kernel), turns)
        config = launch.choose(kernel, capability, 2, r, width)
        moved = bytes_moved(kernel, T, width, r, 2, has_all, config)
        rows.append(
            {
                "kernel": kernel,
                "width": width,
                "rank": r,
                "operands": "all" if has_all else "fewest",
                "seconds": seconds,
                "torch_seconds": by_torch,
                "bytes": moved,
                "share_of_copy": moved / seconds / copy,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    speed, faster = row["bytes"] / row["seconds"] / 1e9, row["torch_seconds"] / row["seconds"]
    return (
        f"{row['kernel']:9} {row['width']:6} {row['rank']:4} {row['operands']:6} {1e6 * row['seconds']:9.1f} us "
        f"{speed:7.0f} GB/s {100 * row['share_of_copy']:5.0f} % of copy, torch {faster:5.2f} x as long"
    )


def run(arguments: argparse.Namespace, ops: ModuleType, save: Callable[..., None]) -> None:
    is_cuda = arguments.device == "cuda"
    timer = cuda_timer if is_cuda else host_timer
    T, widths, ranks, size = (32, (32, 48), (4,), 2**20) if arguments.quick else (8192, (4096, 14336), (16, 64), 2**32)
    copy = copy_bandwidth(arguments.device, timer, size)
    print(f"  copy: {copy / 1e9:.0f} GB/s read and written", flush=True)
    rows: list[dict[str, Any]] = []
    save(copy=copy, kernels=rows)
    for width in widths:
        for row in measure(ops, T, (width,), ranks, arguments.device, timer, copy):
            rows.append(row)
            print(f"  {line(row)}", flush=True)
        save(copy=copy, kernels=rows)
