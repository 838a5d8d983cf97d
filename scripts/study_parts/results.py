"""Rows of finished runs, one JSON object a line, one file for each kind of hardware."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("results")


@dataclass(frozen=True, order=True)
class Run:
    """What makes a run what it is: with the same values it is not run again."""

    task: str
    method: str
    k: int
    """The budget, the rank of the LoRA that has as many parameters; 0 where there is none."""

    lr: float
    seed: int


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}"


class Results:
    """Appended to as runs finish, by one process."""

    def __init__(self, folder: Path = FOLDER, name: str | None = None) -> None:
        self.path = folder / f"{name or hardware()}.jsonl"
        self.rows: dict[Run, dict[str, Any]] = {}
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole, _, cut_off = text.rpartition("\n")
            if cut_off:
                # a process that was killed while it wrote
                self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            for line in whole.splitlines():
                row = json.loads(line)
                self.rows[Run(**row["run"])] = row

    def add(self, run: Run, row: dict[str, Any]) -> None:
        self.rows[run] = {"run": asdict(run), **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[run]) + "\n")
            file.flush()
            os.fsync(file.fileno())
