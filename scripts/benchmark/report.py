"""What a benchmark leaves: tables, a JSON file, a bar chart."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .comparison import Result
from .measuring import FROZEN, TOLERANCE

MIB = 2**20


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, the columns aligned; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = (cell.ljust(widths[0]) if not i else cell.rjust(widths[i]) for i, cell in enumerate(cells))
        return f"| {' | '.join((first, *others))} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, (header, rule, *rows)))


def mib(value: int, over: int | None) -> str:
    """Mebibytes, and in brackets the quotient with `over`."""
    return f"{value / MIB:.2f}" + (f" ({value / over:.2f})" if over else "")


def show(result: Result, device: str, title: str, remark: str) -> None:
    """Prints the table of contestants, and the goals below it, with `remark` between the two."""
    rounds, entries = result.rounds, result.lineup.entries
    frozen = torch.tensor(result.rounds.frozen_seconds).median().item()
    print(f"\n## {title}, {result.dtype}\n\nfrozen: {1000 * frozen:.3f} ms, median of the samples\n")
    reference = entries["PEFT LoRA"].saved_bytes if "PEFT LoRA" in entries else None
    rows = [
        [name, f"{entries[name].parameters:,}", str(rounds.ratio(name)), mib(entries[name].saved_bytes, reference)]
        for name in rounds.ratios
    ]
    rows += [[name, "", reason, ""] for name, reason in result.lineup.failed.items()]
    print(table(["contestant", "parameters", "time / frozen [q1, q3]", "saved MiB (/ PEFT LoRA)"], rows))
    found = (goal.row(device, result.dtype, rounds, result.lineup) for goal in result.goals)
    if goals := [row for row in found if row is not None]:
        print(f"\n{remark}\n\n{table(['goal', 'limit', 'measured', 'met'], goals)}")
    if rounds.is_void:
        print(f"\n**VOID: the frozen reference is {rounds.ratio(FROZEN)} of itself, outside of {TOLERANCE}.**")


def finish(arguments: argparse.Namespace, results: list[Result], title: str) -> int:
    """Writes the files that were asked for; the exit status, 1 for a void run."""
    is_void = any(result.rounds.is_void for result in results)
    if arguments.json:
        content = {
            "title": title,
            "is_void": is_void,
            "environment": environment(arguments.device),
            "command": shlex.join(["python", *sys.argv]),
            "arguments": {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)},
            "results": [_as_json(result, arguments.device) for result in results],
        }
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if arguments.plot:
        _plot(arguments.plot, results, f"{title}{', VOID' * is_void}")
    if is_void:
        print("VOID: the frozen reference was not as fast as itself; measure again.", file=sys.stderr)
    return int(is_void)


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and commit."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else [platform.processor()]
    return {
        "cpu": f"{len(models)} x {models[0] if models else 'unknown'}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "dlor-peft")},
        "commit": _commit() or "unknown",
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # dlor-peft runs from its folder too
        return None


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _as_json(result: Result, device: str) -> dict[str, Any]:
    rounds, entries = result.rounds, result.lineup.entries
    keys = ("goal", "limit", "measured", "met")
    rows = (goal.row(device, result.dtype, rounds, result.lineup) for goal in result.goals)
    return {
        "dtype": result.dtype,
        "is_void": rounds.is_void,
        "frozen_seconds": rounds.frozen_seconds,
        "contestants": {
            name: {**asdict(entries[name]), **rounds.ratio(name)._asdict(), "ratios": ratios}
            for name, ratios in rounds.ratios.items()
        },
        "failed": result.lineup.failed,
        "goals": [dict(zip(keys, row, strict=True)) for row in rows if row],
        **result.more,
    }


def _plot(path: Path, results: list[Result], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1 + 0.3 * max(len(result.rounds.ratios) for result in results)
    figure, axes = pyplot.subplots(1, len(results), figsize=(7 * len(results), height), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        spreads = {name: result.rounds.ratio(name) for name in result.rounds.ratios}
        medians = [spread.median for spread in spreads.values()]
        errors = [[s.median - s.q1 for s in spreads.values()], [s.q3 - s.median for s in spreads.values()]]
        colours = ["tab:blue" if name.startswith("DLoR") else "tab:grey" for name in spreads]
        bars = axis.barh(list(spreads), medians, xerr=errors, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(result.dtype)
        axis.set_xlabel("time / frozen, median and quartiles")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
