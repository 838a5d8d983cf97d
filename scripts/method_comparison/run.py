"""Runs the unmodified MetaMathQA harness of a PEFT checkout on one of the experiments beside this file.

    git clone https://github.com/huggingface/peft
    python scripts/method_comparison/run.py --peft peft llama-3.2-3B-rank32 -v --clean

What the harness lacks is only `import dlor_peft`: without it `PeftConfig.from_pretrained` knows no DLOR. So this
imports PEFT from the checkout, then dlor_peft, and executes the checkout's own run.py in its folder, with the path of
the experiment and every argument that is not known here. The experiment is copied to experiments/dlor/ there; nothing
else of the checkout is written but what the harness writes. The exit status is 0 where the harness ends with a row of
status "success": it reports the errors of a training as a row of its own, and ends as if all were well.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = Path(__file__).resolve().parent / "experiments" / "dlor"
HARNESS = Path("method_comparison") / "MetaMathQA"
DEFAULTS = "default_training_params.json"
NEEDED = (
    Path("src/peft/__init__.py"),
    *(HARNESS / name for name in ("run.py", "utils.py", "data.py", DEFAULTS, "README.md", "experiments")),
)
RESULTS = ("results", "temporary_results", "cancelled_results")


def check(checkout: Path, experiment: Path) -> Path:
    """The folder of the harness in `checkout`, when it, this Python and its PEFT can run `experiment`.

    Raises:
        FileNotFoundError: `checkout` is no PEFT checkout, or one whose harness is laid out differently.
        ValueError: its PEFT or this Python is too old, or the experiment sets a parameter that it does not know.
    """
    missing = [str(path) for path in NEEDED if not (checkout / path).exists()]
    if missing:
        raise FileNotFoundError(
            f"--peft {checkout} has no {', '.join(missing)}: give the folder of a clone of "
            f"https://github.com/huggingface/peft whose method comparison has this layout."
        )
    needed = _peft_requirement()
    found = re.search(r"""^__version__ = ["'](.+?)["']""", (checkout / NEEDED[0]).read_text(), re.MULTILINE)
    version = found[1] if found else "without a version"
    if not found or not needed.specifier.contains(version, prereleases=True):
        raise ValueError(f"--peft {checkout} is PEFT {version}, and dlor-peft needs {needed}: check out a newer one.")
    # below it the harness cannot measure the adapter file, and writes 99999999 bytes
    wanted = re.search(r"Python (\d+)\.(\d+)\+ is required", (checkout / HARNESS / "README.md").read_text())
    if wanted and sys.version_info < (int(wanted[1]), int(wanted[2])):
        raise ValueError(
            f"this is Python {sys.version_info.major}.{sys.version_info.minor}, and the harness in {checkout} asks "
            f"for {wanted[1]}.{wanted[2]} or newer: run this with such a Python."
        )
    known = _read(checkout / HARNESS / DEFAULTS)
    parameters = experiment / "training_params.json"
    unknown = sorted(set(_read(parameters)) - set(known)) if parameters.exists() else []
    if unknown:
        raise ValueError(
            f"{parameters} sets {', '.join(unknown)}, and {DEFAULTS} of {checkout} knows only "
            f"{', '.join(sorted(known))}: take another checkout or leave it out."
        )
    return (checkout / HARNESS).resolve()


def copy(experiment: Path, harness: Path) -> Path:
    """The path that the harness takes, relative to its folder, with the files of `experiment` there.

    Raises:
        FileExistsError: other files stand there already.
    """
    relative = Path("experiments") / "dlor" / experiment.name
    target = harness / relative
    if target.exists():
        if _texts(target) != _texts(experiment):
            raise FileExistsError(f"{target} differs from {experiment}: move it away, and it is copied anew.")
        return relative
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as half:
        shutil.copytree(experiment, Path(half) / target.name).rename(target)
    return relative


def execute(harness: Path, arguments: list[str]) -> None:
    """The harness's run.py as `python run.py` in its folder runs it, with DLOR a method of the checkout's PEFT."""
    source = harness.parents[1] / "src"
    sys.path[0:1] = [str(harness), str(source), str(ROOT)]
    os.chdir(harness)
    peft = importlib.import_module("peft")
    # the harness asks git for the branch in PEFT's own folder, and a PEFT from elsewhere is under no branch
    if not Path(str(peft.__file__)).resolve().is_relative_to(source):
        raise ImportError(f"peft came from {peft.__file__}, not from {source}: start this in a fresh process.")
    importlib.import_module("dlor_peft")
    for folder in RESULTS:
        # git keeps no empty folder, and the harness does not make the one it writes to at the very end
        (harness / folder).mkdir(exist_ok=True)
    sys.argv = ["run.py", *arguments]
    runpy.run_path("run.py", run_name="__main__")


def rows(harness: Path, experiment: str) -> dict[Path, dict[str, Any]]:
    """Every row of `experiment` under `harness`: file -> what it holds."""
    paths = (path for folder in RESULTS for path in (harness / folder).glob("dlor--*.json"))
    found = {path: _read(path) for path in paths}
    if strange := [path for path, row in found.items() if "run_info" not in row]:
        raise ValueError(f"{strange[0]} is no row of the harness: move it away.")
    return {path: row for path, row in found.items() if row["run_info"]["experiment_name"] == experiment}


def summary(path: Path, row: dict[str, Any]) -> str:
    """One line with what a reader compares first."""
    trained = row["train_info"]
    accuracy = [entry["test accuracy"] for entry in trained["metrics"] if "test accuracy" in entry]
    parts = [
        f"{path}: {trained['status']}",
        f"{trained['num_trainable_params']:,} trainable parameters",
        *(f"test accuracy {value:.3f}" for value in accuracy),
        *filter(None, [row["run_info"]["error_msg"]]),
    ]
    if path.parent.name == "temporary_results":
        parts.append(f"kept out of PEFT's table, as branch {row['run_info']['peft_branch']!r} is not 'main'")
    return "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = sorted(path.name for path in EXPERIMENTS.iterdir())
    parser.add_argument("--peft", type=Path, required=True, metavar="DIR", help="a clone of huggingface/peft")
    parser.add_argument("experiment", choices=names, metavar="EXPERIMENT", help=f"one of {', '.join(names)}")
    arguments, others = parser.parse_known_args()
    experiment = EXPERIMENTS / arguments.experiment
    name = f"dlor/{experiment.name}"
    try:
        harness = check(arguments.peft, experiment)
        before = {path: path.stat().st_mtime_ns for path in rows(harness, name)}
        relative = copy(experiment, harness)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    execute(harness, [*others, str(relative)])
    after = {path: row for path, row in rows(harness, name).items() if path.stat().st_mtime_ns != before.get(path)}
    if not after:
        sys.exit(f"the harness ended without a row for {name}")
    for path, row in after.items():
        print(summary(path, row))
    return int(any(row["train_info"]["status"] != "success" for row in after.values()))


def _peft_requirement() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(found for found in map(Requirement, project["dependencies"]) if found.name == "peft")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object, but {type(found).__name__}.")
    return found


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


if __name__ == "__main__":
    sys.exit(main())
