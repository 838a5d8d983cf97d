"""Whether the Triton kernels may be used on the GPU that is there, in which order, and how fast they are.

    python scripts/gpu_check.py                        # under nine minutes; numbers go to gpu_check.json
    python scripts/gpu_check.py --only gemm times
    python scripts/gpu_check.py --quick --device cpu   # does the script itself work: tiny sizes, interpreted kernels

Stages, each in a process of its own, so that none takes another's results along:

    gemm          the frozen product onto the adapter's term, against the adapter's term onto the product
    correctness   every entry of the launch table against float64, then tests/kernels
    times         the five operations: time, bandwidth, and the same by PyTorch
    table         one block of Llama-3-8B beside the frozen block and PEFT's methods: what the goals are stated for

The last lines are a summary, with the lines for dlor_peft/kernels/choice.py. The exit status is 1 unless the kernels
are usable.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from benchmark import block_runs, correctness, kernel_times, orders, report

from dlor_peft.kernels import choice

ROOT = Path(__file__).parents[1]

STAGES = {"gemm": orders, "correctness": correctness, "times": kernel_times, "table": block_runs}
# seconds that a stage may take at most: what it leaves is for those after it
LIMITS = {"gemm": 90, "correctness": 210, "times": 90, "table": 600}

Results = dict[str, dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--budget", type=float, default=530, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for trying the script itself")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder of gpu_check.json (default: .)"
    )
    # one stage, in this process
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--prefill", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device. --quick --device cpu tries the script itself.")
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu needs --quick: interpreted kernels are slow, and their times say nothing.")
    return arguments


def run_stage(arguments: argparse.Namespace) -> None:
    """In the process of the stage: its results go to --out as they come."""
    # it ends itself before it is ended
    arguments.deadline = arguments.until - 5
    torch.manual_seed(0)
    capability = torch.cuda.get_device_capability() if arguments.device == "cuda" else None
    hardware = {**report.environment(arguments.device), "capability": capability, "driver": driver()}

    def save(**results: Any) -> None:
        arguments.out.write_text(json.dumps({"hardware": hardware, **results}), encoding="utf-8")

    save()
    ops = import_module("dlor_peft.kernels.triton")
    STAGES[arguments.stage].run(arguments, ops, save)


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown"


def stage_process(name: str, arguments: argparse.Namespace, limit: float, is_go: bool) -> dict[str, Any]:
    """What the stage wrote before it ended, or was ended."""
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DLOR_KERNELS")}
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths)}
    if arguments.device == "cpu":
        env["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        options = ["--device", arguments.device, "--until", str(time.monotonic() + limit), "--out", str(path)]
        options += ["--quick"] * arguments.quick + ["--prefill"] * is_go
        command = [sys.executable, __file__, "--stage", name, *options]
        process = subprocess.Popen(command, env=env, start_new_session=True)
        ended = "ended"
        try:
            if process.wait(limit):
                ended = f"failed with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit:.0f} s"
        finally:
            # with all that it started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {**results, "ended": ended}


def source_lines(capability: tuple[int, int] | None, is_usable: bool, is_go: bool | None) -> list[str]:
    """MEASURED and PREFILLS as they should stand in choice.py; `is_go` None leaves the order as it is."""
    if not is_usable or capability is None:
        return ["choice.py stays as it is: a capability enters it once its kernels are found usable."]
    prefills = choice.PREFILLS
    if is_go is not None:
        prefills = prefills | {capability} if is_go else prefills - {capability}
    return [_source("MEASURED", choice.MEASURED | {capability}), _source("PREFILLS", prefills)]


def _source(name: str, capabilities: frozenset) -> str:
    inside = f"{{{', '.join(map(str, sorted(capabilities)))}}}" if capabilities else ""
    return f"{name}: frozenset[Capability] = frozenset({inside})"


def summary(results: Results) -> list[str]:
    lines = ["", "## Summary", ""]
    hardware = next((found["hardware"] for found in results.values() if "hardware" in found), {})
    versions = hardware.get("versions", {})
    lines += [
        f"{hardware.get('gpu')}, capability {hardware.get('capability')}, driver and memory {hardware.get('driver')}",
        f"CUDA {hardware.get('cuda')}, Python {hardware.get('python')}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {hardware.get('commit')}",
    ]
    lines += [f"{name}: {found['ended']}, {found.get('elapsed', 0):.0f} s" for name, found in results.items()]
    gemm = results.get("gemm", {})
    if "products" in gemm:
        block = gemm["products"].get("block")
        ratio = f", {block['ratio'][0]:.3f} of the time of product first" if block else ""
        lines.append(f"prefill: {gemm_verdict(gemm)}{ratio}")
    says = correctness.verdict(results["correctness"]) if "correctness" in results else "undecided: not checked"
    lines.append(f"kernels: {says}")
    for entry in results.get("correctness", {}).get("entries", []):
        lines += [f"  {entry['kernel']} {entry['key']} {entry['config']}: {why}" for why in entry["failures"][:1]]
    times = results.get("times", {})
    if times.get("kernels"):
        lines.append(f"copy {times['copy'] / 1e9:.0f} GB/s; share of it, and torch's time over that of the kernel:")
        lines += kernel_shares(times["kernels"])
    if "runs" in results.get("table", {}):
        runs = results["table"]["runs"]
        lines += [f"{name}: {run['failed'][:200]}" for name, run in runs.items() if "failed" in run]
        lines += ["", block_runs.goals_table(runs)]
    capability = tuple(hardware["capability"]) if hardware.get("capability") else None
    lines += ["", *source_lines(capability, says == "usable", gemm.get("go"))]
    return lines


def gemm_verdict(gemm: dict[str, Any]) -> str:
    return {None: "undecided", True: "go", False: "no-go"}[gemm.get("go")]


def kernel_shares(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each operation and number of operands: every width and rank."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row["kernel"], row["operands"]), []).append(
            f"{row['width']}/{row['rank']}: {100 * row['share_of_copy']:.0f} %, "
            f"{row['torch_seconds'] / row['seconds']:.2f}"
        )
    return [f"  {kernel:8} {operands:6} {'  '.join(of)}" for (kernel, operands), of in cells.items()]


def main() -> int:
    arguments = parse_arguments()
    if arguments.stage:
        run_stage(arguments)
        return 0
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for name in (stage for stage in STAGES if stage in arguments.only):
        left = started + arguments.budget - time.monotonic()
        before = time.monotonic()
        print(f"\n## {name}\n", flush=True)
        is_go = bool(results.get("gemm", {}).get("go"))
        limit = min(LIMITS[name], left)
        results[name] = stage_process(name, arguments, limit, is_go) if left > 10 else {"ended": "no time left"}
        results[name]["elapsed"] = time.monotonic() - before
        print(f"\n[{name}: {results[name]['ended']}, {results[name]['elapsed']:.0f} s]", flush=True)
        (arguments.out / "gpu_check.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n".join(summary(results)))
    return int(correctness.verdict(results.get("correctness", {})) != "usable")


if __name__ == "__main__":
    sys.exit(main())
