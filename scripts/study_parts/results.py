"""Rows of finished runs, one JSON object a line, one file for each kind of hardware."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


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
    """Appended to as runs finish, by one process, while others may read."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.path = folder / f"{name or hardware()}.jsonl"
        text = self.path.read_bytes() if self.path.is_file() else b""
        # of a process that was killed while it wrote, or that is writing
        self._cut_off = text.rpartition(b"\n")[2]
        self.rows: dict[Run, dict[str, Any]] = {}
        for number, line in enumerate(text.removesuffix(self._cut_off).splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[Run(**row["run"])] = row
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{self.path}, line {number}, is no row of a run: mend or remove it") from error

    def add(self, run: Run, row: dict[str, Any]) -> None:
        self.rows[run] = {"run": asdict(run), **row}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._cut_off:
            os.truncate(self.path, self.path.stat().st_size - len(self._cut_off))
            self._cut_off = b""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[run]) + "\n")
            file.flush()
            os.fsync(file.fileno())
