"""Every entry of the kernels' launch table against float64 on the device that is there, and the kernels' tests.

Each entry has a process of its own: a bad memory access ends all that its process does on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlor_peft.kernels import launch
from dlor_peft.kernels.launch import Config, Key

from .kernel_cases import TF32_TOLERANCE, TOLERANCE, cases, errors

ROOT = Path(__file__).parents[2]
# of tokens, in_features, out_features: with remainders in all blocks, and as in a model
SIZES = ((333, 1037, 771), (1027, 4096, 14336))
QUICK_SIZES = ((7, 20, 33), (130, 16, 48))
# dtype and torch.set_float32_matmul_precision, by bytes an element
DTYPES = {
    2: ((torch.bfloat16, "highest"), (torch.float16, "highest")),
    4: ((torch.float32, "highest"), (torch.float32, "high")),
}

Entry = tuple[str, Key, Config]


def entries(capability: tuple[int, int] | None) -> list[Entry]:
    """Those of that GPU, and those for any."""
    return [entry for entry in launch.configurations() if entry[1].capability in (None, capability)]


def ranks(kernel: str, key: Key) -> list[int]:
    return [key.rank, key.rank - 3, 3 * key.rank // 8, *[0] * (kernel in ("down", "expand", "bwd_cols"))]


def check(ops: ModuleType, entry: Entry, device: str, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> dict:
    """How often the entry was run, its largest error over the tolerance, and where that was above 1 or it raised."""
    kernel, key, config = entry
    found: dict[str, Any] = {"kernel": kernel, "key": list(key), "config": list(config), "runs": 0, "worst": 0.0}
    failures = found["failures"] = []
    for turn, (dtype, precision) in enumerate(DTYPES[key.itemsize]):
        torch.set_float32_matmul_precision(precision)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        for number, rank in enumerate(ranks(kernel, key)):
            # every rank and dtype at one size, every rank at both
            size = sizes[(number + turn) % len(sizes)]
            for what, operands in cases(kernel, draw, *size, rank):
                where = f"{dtype}, {precision}, {size}, rank {rank}, {what}"
                found["runs"] += 1
                try:
                    with launch.forced(kernel, config):
                        measured = errors(ops, kernel, operands)
                # whatever a compiler or a driver raises
                except Exception as raised:
                    failures.append(f"{where}: {type(raised).__name__}: {str(raised).strip()[:200]}")
                    continue
                for error, result in measured:
                    tolerance = TF32_TOLERANCE if precision == "high" else TOLERANCE[result, dtype]
                    found["worst"] = max(found["worst"], error / tolerance)
                    if error > tolerance:
                        failures.append(f"{where}: error {error:.2g}, tolerance {tolerance:.2g}")
    torch.set_float32_matmul_precision("highest")
    return found


def check_apart(number: int, entry: Entry, arguments: argparse.Namespace) -> dict:
    """`check` in a process of its own."""
    command = [sys.executable, "-m", "benchmark.correctness", str(number), arguments.device, str(int(arguments.quick))]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT / "scripts",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1, arguments.deadline - time.monotonic()),
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        why, is_cut_off = f"exit status {done.returncode}: {done.stderr.strip()[-300:]}", False
    except subprocess.TimeoutExpired:
        why, is_cut_off = "cut off: no time left", True
    kernel, key, config = entry
    found = {"kernel": kernel, "key": list(key), "config": list(config), "runs": 0, "worst": 0.0}
    return {**found, "failures": [] if is_cut_off else [why], "cut_off": is_cut_off}


def run_tests(arguments: argparse.Namespace, timeout: float) -> dict[str, Any]:
    """The tests of the kernels, on as many processes as there are cores where pytest-xdist is there."""
    which = ["tests/kernels/test_triton.py", "-k", "the_table"] if arguments.quick else ["tests/kernels"]
    # what the versions of a machine warn of says nothing of the kernels
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-W", "default", "-p", "no:cacheprovider", *which]
    if not arguments.quick and find_spec("xdist"):
        command += ["-n", str(workers())]
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DLOR_KERNELS")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=max(1, timeout)
        )
    except subprocess.TimeoutExpired as cut:
        output = cut.stdout or b""
        output = output if isinstance(output, str) else output.decode(errors="replace")
        return {"cut_off": True, "failed": _failed(output), "last": f"cut off after {timeout:.0f} s"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = _failed(done.stdout)
    if done.returncode and not failed:
        failed = [line[:200] for line in (done.stdout + done.stderr).strip().splitlines()[-5:]]
    return {"cut_off": False, "status": done.returncode, "failed": failed, "last": lines[-1]}


def _failed(output: str) -> list[str]:
    return [line[:200] for line in output.splitlines() if re.match("(FAILED|ERROR) ", line)]


def workers() -> int:
    return max(1, min(12, len(os.sched_getaffinity(0)) - 1))


def run(arguments: argparse.Namespace, ops: ModuleType, save: Callable[..., None]) -> None:
    capability = torch.cuda.get_device_capability() if arguments.device == "cuda" else None
    chosen = list(enumerate(entries(capability)))
    if arguments.quick:
        # the first of each kernel
        chosen = [(number, entry) for number, entry in chosen if entry == next(
            other for _, other in chosen if other[0] == entry[0])]  # fmt: skip
    found: list[dict] = []
    with ThreadPoolExecutor(workers()) as pool:
        for one in pool.map(lambda pair: check_apart(*pair, arguments), chosen):
            found.append(one)
            save(entries=found)
            say = "cut off" if one.get("cut_off") else f"{one['runs']} runs, worst {one['worst']:.2f} of the tolerance"
            print(f"  {one['kernel']:9} {one['key']} {one['config']}: {say}", flush=True)
            for failure in one["failures"][:3]:
                print(f"    FAILED {failure}", flush=True)
    tests = run_tests(arguments, arguments.deadline - time.monotonic())
    save(entries=found, tests=tests)
    print(f"  tests/kernels: {tests['last']}", flush=True)
    for line in tests["failed"][:12]:
        print(f"    {line}", flush=True)


def verdict(correctness: dict[str, Any]) -> str:
    """ "usable" where everything ran and nothing failed, else "not usable" or "undecided", and why."""
    tests, found = correctness.get("tests"), correctness.get("entries", [])
    failed = sum(bool(one["failures"]) for one in found)
    if failed or (tests and tests["failed"]):
        return f"not usable: {failed} entries and {len(tests['failed']) if tests else 0} tests failed"
    if not found or tests is None or tests["cut_off"] or any(one.get("cut_off") for one in found):
        return "undecided: not everything was run"
    return "usable"


if __name__ == "__main__":
    number, device, is_quick = sys.argv[1:]
    torch.manual_seed(int(number))
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    ops = import_module("dlor_peft.kernels.triton")
    entry = entries(capability)[int(number)]
    print(json.dumps(check(ops, entry, device, QUICK_SIZES if int(is_quick) else SIZES)))
