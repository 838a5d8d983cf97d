"""What a run ran in: with the recipe, enough to run it again. No secrets, and no names of people or machines."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from .folder import atomic

VARIABLES = re.compile(
    r"DLOR_|ACCELERATE_|FSDP_|NCCL_|CUDA_|CUBLAS_|OMP_|MKL_|PYTORCH_|TORCH|TRITON_|XLA_|HF_HUB_OFFLINE$|HF_HOME$"
    r"|TOKENIZERS_PARALLELISM$|PYTHONHASHSEED$|WORLD_SIZE$"
)
"""The beginnings of the names of environment variables that decide how a run runs."""

SECRET = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
# a token of the Hub wherever it stands
HUB_TOKEN = re.compile(r"\bhf_\w+")
HIDDEN = "(hidden)"


def environment() -> dict[str, Any]:
    """Versions, hardware, the commit of a checkout, the command line, and the variables that matter."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": [Path(sys.argv[0]).name, *map(_shown, sys.argv[1:])],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "commit": _commit(Path(__file__).parents[2]),
        "variables": {
            name: _shown(f"{name}={value}").partition("=")[2]
            for name, value in sorted(os.environ.items())
            if VARIABLES.match(name)
        },
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
    }


def write_environment(file: Path) -> None:
    with atomic(file) as partial:
        partial.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def _shown(word: str) -> str:
    """A word of the command line, without a secret's value, and without the name of the user in a path."""
    key, equals, _ = word.partition("=")
    if equals and SECRET.search(key):
        return f"{key}={HIDDEN}"
    home = str(Path.home())
    return HUB_TOKEN.sub(HIDDEN, word).replace(home, "~") if home != "/" else HUB_TOKEN.sub(HIDDEN, word)


def _cpu() -> str:
    """The model's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """The commit of a checkout, "-dirty" at its end where tracked files were changed; None where there is none."""
    if not (folder / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None
