"""Options that every benchmark has."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from .contestants import CONTESTANTS


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        help="of the frozen weights and the activations (default: float32 and bfloat16, on cuda bfloat16)",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=rounds, help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="steps in a sample (default: 1, on cuda 5)")
    parser.add_argument("--inputs", type=int, default=4, help="inputs that take turns (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="REGEX", help="contestants with a match in their name, and none else")
    parser.add_argument("--list", action="store_true", help="print the names of the contestants and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was measured here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a bar chart, as PNG")


def settle(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those that depend on the device filled in; threads and the random seed are set."""
    arguments = parser.parse_args()
    if arguments.list:
        print(*CONTESTANTS, sep="\n")
        sys.exit()
    is_cpu = arguments.device == "cpu"
    if not is_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device. Use --device cpu.")
    if min(arguments.rounds, arguments.inputs, arguments.rank) < 1:
        parser.error("--rounds, --inputs and --rank must be at least 1.")
    arguments.dtype = arguments.dtype or (["float32", "bfloat16"] if is_cpu else ["bfloat16"])
    arguments.iterations = arguments.iterations or (1 if is_cpu else 5)
    # the time of a thread is the time of the work where there is one thread
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    return arguments


def choose(arguments: argparse.Namespace, dtype: str, among: list[str]) -> list[str]:
    """Names of the contestants to run: all that --only matches, or else `among`."""
    names = among
    if arguments.only:
        names = [name for name in CONTESTANTS if re.search(arguments.only, name)]
        if not names:
            sys.exit(f"--only {arguments.only!r} matches none of: {'; '.join(CONTESTANTS)}")
    # over a float32 base, PEFT's default already
    return [name for name in names if CONTESTANTS[name].is_float32 or dtype != "float32"]
