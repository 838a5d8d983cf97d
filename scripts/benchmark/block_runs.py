"""bench_model.py on one block, with the Triton kernels and with PyTorch's, a process for each group of contestants.

What is slow comes last, with fewer rounds, so that the rest is there if the time does not suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .report import table

ROOT = Path(__file__).parents[2]

# the order is no option of a model's run: it is what choice.py says of the GPU
AS_SHIPPED = """
import runpy, sys
from dlor_peft.kernels import autograd
is_prefill = sys.argv.pop(1) == "prefill"
autograd.prefills = lambda x: is_prefill
sys.argv[0] = "scripts/bench_model.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Group(NamedTuple):
    name: str
    kernels: str
    only: str
    rounds: int
    iterations: int


# whatever is compiled layer by layer is measured as a layer
OURS = "^(?!.*compiled)(DLoR|PEFT LoRA|addmm_)"
GROUPS = [
    Group("triton", "triton", OURS, 7, 5),
    Group("torch", "torch", OURS, 7, 5),
    Group("others", "triton", "^DLoR scaled$|PEFT OFT|PEFT DoRA", 5, 5),
    # some ten times as slow: the products of their matrices, of width 14336, are in float32
    Group("HRA", "triton", "^DLoR scaled$|PEFT HRA", 3, 1),
    Group("BOFT", "triton", "^DLoR scaled$|PEFT BOFT", 3, 1),
]
QUICK_ONLY = "^DLoR scaled$|^PEFT LoRA$"
QUICK = "--hidden 64 --intermediate 96 --heads 2 --kv-heads 1 --batch 1 --sequence 16 --dtype bfloat16 --rank 4"


def command(group: Group, arguments: argparse.Namespace, order: str, path: Path) -> list[str]:
    rounds, iterations = (1, 1) if arguments.quick else (group.rounds, group.iterations)
    options = ["--block", "small", *QUICK.split()] if arguments.quick else ["--block", "llama-8b"]
    only = QUICK_ONLY if arguments.quick else group.only
    options += ["--device", arguments.device, "--only", only, "--json", str(path)]
    options += ["--rounds", str(rounds), "--iterations", str(iterations)]
    return [sys.executable, "-c", AS_SHIPPED, order, *options]


def measure(group: Group, arguments: argparse.Namespace, order: str, timeout: float) -> dict[str, Any]:
    """What the run wrote, and why it did not where it did not."""
    env = {**os.environ, "DLOR_KERNELS": group.kernels, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        try:
            done = subprocess.run(
                command(group, arguments, order, path),
                cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"cut off after {timeout:.0f} s"}
        if not path.exists():
            return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-600:]}"}
        return json.loads(path.read_text(encoding="utf-8"))


def goal_rows(runs: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Every goal that a run has: what it says, limit, measured and met with Triton's kernels, then with PyTorch's."""
    by_kernels: dict[str, dict[str, dict[str, str]]] = {"triton": {}, "torch": {}}
    for name, run in runs.items():
        for goal in run.get("results", [{"goals": []}])[0]["goals"]:
            by_kernels["torch" if name == "torch" else "triton"].setdefault(goal["goal"], goal)
    rows = []
    for name, goal in {**by_kernels["torch"], **by_kernels["triton"]}.items():
        cells = [by_kernels[kernels].get(name, {"measured": "", "met": ""}) for kernels in ("triton", "torch")]
        rows.append([name, goal["limit"], *(cell[key] for cell in cells for key in ("measured", "met"))])
    return rows


def goals_table(runs: dict[str, dict[str, Any]]) -> str:
    return table(["goal", "limit", "Triton", "met", "PyTorch", "met"], goal_rows(runs))


def _ratios(run: dict[str, Any]) -> list[str]:
    result = run["results"][0]
    lines = [
        f"    {name:38} {found['median']:7.3f} [{found['q1']:.3f}, {found['q3']:.3f}]"
        for name, found in result["contestants"].items()
    ]
    lines += [f"    {name:38} left out: {why[:120]}" for name, why in result["failed"].items()]
    return lines


def run(arguments: argparse.Namespace, ops: ModuleType, save: Callable[..., None]) -> None:
    order = "prefill" if arguments.prefill else "product first"
    runs: dict[str, dict[str, Any]] = {}
    for group in GROUPS[:2] if arguments.quick else GROUPS:
        started, left = time.monotonic(), arguments.deadline - time.monotonic()
        # PyTorch's kernels ship with the order that this GPU gets, too
        found = measure(group, arguments, order, left) if left > 10 else {"failed": "no time left"}
        runs[group.name] = found
        save(runs=runs, order=order)
        print(f"  {group.name}, kernels: {group.kernels}, {order}, {time.monotonic() - started:.0f} s", flush=True)
        void = ["    VOID: the frozen block was not as fast as itself"] * found.get("is_void", False)
        print("\n".join([f"    {found['failed']}"] if "failed" in found else [*_ratios(found), *void]), flush=True)
