"""The claims of the paper behind DLoR (arXiv 2605.05659), measured: a figure, numbers and a caption for each.

    python scripts/paper.py                       # all, to recipes/paper
    python scripts/paper.py --only a,d            # some; the others keep their numbers
    python scripts/paper.py --quick               # small sizes, to runs/paper

    a  interpolation   rank-1 layers interpolate scalars
    b  blindness       and cannot approximate functions
    c  repair          alpha I repairs it
    d  reconstruction  every matrix is a sum and a product of DLoR terms
    e  activations     any activation will do, as h goes to 0
    f  sawtooth        depth against width

One thread, the CPU, fixed seeds. Needs the extras train and factorise. Claims are taken from the paper's abstract.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmark.report import environment
from paper_parts import activations, blindness, figures, interpolation, reconstruction, repair, sawtooth

from dlor_peft.training.folder import atomic

ROOT = Path(__file__).parents[1]
PARTS = {
    "a": interpolation,
    "b": blindness,
    "c": repair,
    "d": reconstruction,
    "e": activations,
    "f": sawtooth,
}
TITLES = {
    "a": "Rank-1 networks interpolate",
    "b": "Rank-1 networks are blind",
    "c": "A diagonal repairs them",
    "d": "Exact reconstruction",
    "e": "General activations",
    "f": "Depth and width",
}
FIELDS = {"quick", "seconds", "environment", "numbers"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", metavar="a,b,...", default=",".join(PARTS), help="letters of experiments")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a test")
    parser.add_argument("--out", type=Path, help="folder (default: recipes/paper, with --quick runs/paper)")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := [letter for letter in arguments.only if letter not in PARTS]:
        parser.error(f"--only: {', '.join(map(repr, unknown))} is none of {', '.join(PARTS)}.")
    arguments.out = arguments.out or ROOT / ("runs" if arguments.quick else "recipes") / "paper"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        arguments.parts = read(arguments.out / "numbers.json")
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    return arguments


def read(path: Path) -> dict[str, Any]:
    """What is measured already.

    Raises:
        ValueError: the file is not of this script.
    """
    if not path.exists():
        return {}
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        is_ours = all(set(part) >= FIELDS for part in parts.values())
    except (ValueError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} holds other things than the numbers of this script: move it away")
    return parts


def file_name(letter: str) -> str:
    return f"{PARTS[letter].__name__.rpartition('.')[2]}.png"


def main() -> int:
    arguments = parse_arguments()
    # the sizes are small: a second thread costs more than it brings
    torch.set_num_threads(1)
    path, parts = arguments.out / "numbers.json", arguments.parts
    hardware = environment("cpu")
    for letter in arguments.only:
        started = time.perf_counter(), time.process_time()
        numbers = PARTS[letter].run(arguments.quick)
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        print(f"({letter}) {TITLES[letter]}: {wall:.0f} s, of the CPU {cpu:.0f} s", flush=True)
        measured = {"quick": arguments.quick, "seconds": round(wall, 1), "environment": hardware, "numbers": numbers}
        # the figure and the caption are made of what the file will hold
        parts[letter] = rounded(measured)
        with atomic(arguments.out / file_name(letter)) as partial:
            figures.save(PARTS[letter].draw(parts[letter]["numbers"]), partial)
        # after each, so that an interrupted run leaves what it has
        parts = {letter: parts[letter] for letter in PARTS if letter in parts}
        with atomic(path) as partial:
            partial.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        with atomic(arguments.out / "captions.md") as partial:
            partial.write_text(captions(parts), encoding="utf-8")
    print(f"{arguments.out}: {', '.join(file_name(letter) for letter in arguments.only)}, numbers.json, captions.md")
    return 0


def rounded(value: Any) -> Any:
    """As JSON gives it back, six digits of each float."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


def captions(parts: dict[str, Any]) -> str:
    """A section for each experiment, with its figure."""
    sections = [
        "# The paper, measured\n\nClaims are those of the abstract of arXiv 2605.05659; numbers are of `python "
        "scripts/paper.py`, in full in `numbers.json`. Every verdict is computed from them."
    ]
    for letter, part in parts.items():
        mark = " (quick run: too small to conclude from)" if part["quick"] else ""
        text = PARTS[letter].caption(part["numbers"])
        title = f"## ({letter}) {TITLES[letter]}{mark}"
        sections.append(f"{title}\n\n![{TITLES[letter]}]({file_name(letter)})\n\n{text}")
    machines: dict[str, dict[str, float]] = {}
    for letter, part in parts.items():
        hardware = part["environment"]
        where = f"{hardware['cpu']}, {hardware['threads']} thread, torch {hardware['versions']['torch']}"
        machines.setdefault(where, {})[letter] = part["seconds"]
    for where, times in machines.items():
        told = ", ".join(f"{letter} {seconds:.0f} s" for letter, seconds in times.items())
        sections.append(f"Run on {where}, in {sum(times.values()):.0f} s ({told}).")
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.exit(main())
