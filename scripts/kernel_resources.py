"""What every entry of the kernels' launch table compiles to, on a machine without a GPU.

    python scripts/kernel_resources.py                # minutes
    python scripts/kernel_resources.py --kernel mul

One line an entry and GPU: registers of a thread, bytes that it spills, shared memory of a program, and how many
programs fit a multiprocessor. Each is compiled for all ranks that take it, with all operands and with the fewest,
float32 also with tf32 products; the worst is shown. Fails on a spill, and on more shared memory than a program can
have: 48 KiB in entries for any GPU.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dlor_peft.kernels import launch
from dlor_peft.kernels import triton as ops

# KiB of shared memory: of a program, of a multiprocessor, which keeps one for each program
SHARED = {80: (163, 164), 90: (227, 228)}
ANY_GPU = 48
REGISTERS, THREADS = 65536, 2048
RANKS = (16, 32, 64, 128)


def arguments(kernel: str, draw: Callable[..., Tensor], T: int, width: int, r: int, with_all: bool) -> tuple[Any, ...]:
    """Of the operation of that name, with all operands or with the fewest that need the kernel."""
    x, y, z, q = draw(T, width), draw(T, width), draw(T, width), draw(width)
    t, U, V = draw(T, r), draw(width, r), draw(width, r)
    if with_all:
        return {
            "down": (x, V, q),
            "expand": (t, U, y, x, q, q),
            "mul": (y, x, q, U, V),
            "bwd_rows": (x, U, t, q, y),
            "bwd_cols": (y, z, t, V, x, q),
        }[kernel]
    return {
        "down": (x, V),
        "expand": (t, U),
        "mul": (None, x, None, U, V),
        "bwd_rows": (x, U, t),
        "bwd_cols": (None, None, t, V, x),
    }[kernel]


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # kernels are kept for each device
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """In it, what is launched is compiled and collected instead."""
    run, compiled = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(compiled: Any) -> tuple[int, int, int]:
    """Registers, bytes spilled, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # a stack frame is what spills: the kernels have no arrays
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack), compiled.metadata.shared


def worst(capability: int, kernel: str, config: launch.Config, itemsize: int, ranks: list[int], width: int):
    """The largest of each of `resources`."""
    driver.set_active(NoDevice(capability))
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with launch.forced(kernel, config), compiling() as compiled:
        for precision, rank, with_all in itertools.product(("highest", "high"), ranks, (True, False)):
            torch.set_float32_matmul_precision(precision)
            getattr(ops, kernel)(*arguments(kernel, draw, 8192, width, rank, with_all))
    return tuple(max(values) for values in zip(*map(resources, compiled), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(launch.TABLE), help="only this one's entries")
    only = parser.parse_args().kernel
    failed = False
    print(f"{'kernel':9} {'GPU':5} {'entry':28} {'tokens':>6} {'columns':>7} {'warps':>5} {'stages':>6} "
          f"{'registers':>9} {'spilled':>7} {'shared':>7} {'programs':>8}")  # fmt: skip
    for kernel, key, config in launch.configurations():
        if only not in (None, kernel):
            continue
        for capability, (of_program, of_multiprocessor) in SHARED.items():
            if key.capability not in (None, divmod(capability, 10)):
                continue
            owner, width = divmod(capability, 10), key.width or 4096
            ranks = [r for r in RANKS if launch.choose(kernel, owner, key.itemsize, r, width) is config]
            if not ranks:
                continue
            registers, spilled, shared = worst(capability, kernel, config, key.itemsize, ranks, width)
            threads = 32 * config.num_warps
            programs = min(
                REGISTERS // (threads * registers), THREADS // threads, (of_multiprocessor << 10) // (shared + 1024)
            )
            limit = ANY_GPU if key.capability is None else of_program
            failed |= bool(spilled) or shared > limit << 10
            entry = f"{key.itemsize} bytes, rank {key.rank}" + (f", width {key.width}" if key.width else "")
            print(f"{kernel:9} sm_{capability} {entry:28} {config.tokens:6} {config.columns:7} {config.num_warps:5} "
                  f"{config.num_stages:6} {registers:9} {spilled:7} {shared:7} {programs:8}", flush=True)  # fmt: skip
    if failed:
        sys.exit(
            "scripts/kernel_resources.py: an entry spills, or needs too much shared memory: give it smaller blocks."
        )


if __name__ == "__main__":
    main()
