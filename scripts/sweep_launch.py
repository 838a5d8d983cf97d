"""Times candidates for the kernels' launch table on the GPU that is there, and prints the table with what was fastest.

    python scripts/sweep_launch.py                    # minutes, most of them compiling
    python scripts/sweep_launch.py --kernel mul --itemsize 4

For 8192 tokens, ranks 16 and 64. A candidate is first checked against the reference, then timed (median, cold L2) with
all operands and with the fewest, at two widths; the product of the times decides. Narrow layers get an entry of their
own where that is 3% faster. The table goes into dlor_peft/kernels/launch.py, in the place of the old one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from kernel_resources import arguments
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dlor_peft.kernels import launch, reference
from dlor_peft.kernels import triton as ops
from dlor_peft.kernels.launch import Config, Key, Table

TOKENS = 8192
RANKS = (16, 64)
# by the bound that an entry has
WIDTHS = {2048: (1024, 2048), None: (4096, 14336)}
TOLERANCE = {2: 1e-2, 4: 1e-3}

Timer = Callable[[Callable[[], Any]], float]


def candidates(kernel: str) -> Iterator[Config | None]:
    """Tiles of which a thread has from 8 to 64 numbers; None where the operation can do without the kernel."""
    stages = (1,) if kernel == "expand" else (2, 3)
    for blocks in itertools.product((16, 32, 64, 128), (32, 64, 128, 256), (4, 8), stages):
        config = Config(*blocks)
        if 8 <= config.tokens * config.columns // (32 * config.num_warps) <= 64:
            yield config
    if kernel in ("mul", "bwd_rows"):
        yield None


def is_right(kernel: str, operands: tuple[Any, ...]) -> bool:
    results, expected = getattr(ops, kernel)(*operands), getattr(reference, kernel)(*operands)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    tolerance = TOLERANCE[operands[1].element_size()]
    return all(
        (got.double() - true.double()).norm().item() <= tolerance * true.double().norm().item()
        for got, true in zip(results, expected, strict=True)
        if true is not None
    )


def times(kernel: str, draw: Callable[..., Tensor], rank: int, widths: tuple[int, ...], timer: Timer) -> dict:
    """The product of the times of every candidate that fits the GPU."""
    products = {}
    for config in candidates(kernel):
        products[config] = 1.0
        try:
            for width, with_all in itertools.product(widths, (True, False)):
                operands = arguments(kernel, draw, TOKENS, width, rank, with_all)
                with launch.forced(kernel, config):
                    if not is_right(kernel, operands):
                        sys.exit(f"scripts/sweep_launch.py: {kernel} in {config} differs from the reference")
                    products[config] *= timer(lambda operands=operands: getattr(ops, kernel)(*operands))
        except OutOfResources:
            products[config] = math.inf
    return products


def entries(
    capability: tuple[int, int], kernel: str, draw: Callable[..., Tensor], itemsize: int, timer: Timer
) -> dict[Key, Config | None]:
    """The fastest for each rank."""
    found = {}
    for rank in RANKS:
        narrow, any_width = (times(kernel, draw, rank, widths, timer) for widths in WIDTHS.values())
        best, best_narrow = min(any_width, key=any_width.__getitem__), min(narrow, key=narrow.__getitem__)
        # of as many times as there are in a product
        if (narrow[best_narrow] / narrow[best]) ** (1 / 2 / len(WIDTHS[2048])) < 0.97:
            found[Key(capability, itemsize, rank, 2048)] = best_narrow
        found[Key(capability, itemsize, rank, None)] = best
    return found


def merged(before: dict[Key, Config | None], found: dict[Key, Config | None]) -> dict[Key, Config | None]:
    """Those found, and those before for other GPUs and types."""
    replaced = {(key.capability, key.itemsize) for key in found}
    return found | {key: config for key, config in before.items() if (key.capability, key.itemsize) not in replaced}


def source(table: Table) -> str:
    """As it stands in launch.py."""
    lines = ["TABLE: Table = {"]
    for kernel, by_key in table.items():
        lines.append(f'    "{kernel}": {{')
        for key, config in by_key.items():
            lines.append(f"        Key{tuple(key)}: {config and f'Config{tuple(config)}'},")
        lines.append("    },")
    return "\n".join([*lines, "}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="*", choices=list(launch.TABLE), default=list(launch.TABLE))
    parser.add_argument("--itemsize", nargs="*", type=int, choices=(2, 4), default=[2], help="bytes an element")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/sweep_launch.py: no CUDA GPU, which is what it times. kernel_resources.py needs none.")
    table = dict(launch.TABLE)
    for kernel, itemsize in itertools.product(options.kernel, options.itemsize):
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        found = entries(
            torch.cuda.get_device_capability(),
            kernel,
            draw,
            itemsize,
            lambda run: triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"),
        )
        print(f"{kernel}, {itemsize} bytes: {found}", file=sys.stderr, flush=True)
        table[kernel] = merged(table[kernel], found)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(source(table))


if __name__ == "__main__":
    main()
