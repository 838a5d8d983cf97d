"""A run's output folder: what is in it, whether its run is finished, and writes that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .recipe import to_yaml
from .schema import Recipe

HEADER = "# resolved by dlor train"
CHECKPOINT_MARK = "dlor_checkpoint.json"
"""The file that a checkpoint gets last."""


class RunFolder:
    """The paths that one run writes. metrics.json comes last: where it is, the run is finished."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.curves = self.path / "curves.png"
        self.updates = self.path / "updates.png"
        self.layers = self.path / "layers.jsonl"
        self.environment = self.path / "environment.json"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.json"

    def check(self, overwrite: bool, resume: bool = False) -> None:
        """Nothing that a run would replace belongs to somebody else, nor, unless asked, to an unfinished run.

        Raises:
            ValueError: output_dir is a file, or holds such a thing.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir: {self.path} is a file. Give a folder: output_dir=OTHER.")
        if self.recipe.is_file() and self.recipe.read_text(encoding="utf-8").startswith(HEADER):
            if not overwrite and not resume and not self.metrics.is_file():
                self._refuse_unfinished()
            return
        files = (self.metrics, self.curves, self.updates, self.layers, self.environment, self.recipe)
        for path in (self.adapter, self.checkpoints, *files):
            if path.exists():
                raise ValueError(f"output_dir: {path} is not of a dlor run. Choose another folder: output_dir=OTHER.")

    def _refuse_unfinished(self) -> None:
        remedy = "replace it with --overwrite, or give another folder (output_dir=OTHER)."
        if any(self.checkpoints.glob("checkpoint-*")):
            raise ValueError(
                f"output_dir: {self.checkpoints} holds the checkpoints of an unfinished run. Go on with --resume, "
                f"{remedy}"
            )
        if self.adapter.exists():
            raise ValueError(
                f"output_dir: {self.adapter} is of a run that broke off after it was trained. Keep it elsewhere, "
                f"{remedy}"
            )

    def finished_results(self, recipe: Recipe) -> dict[str, Any] | None:
        """The results of a finished run of the same recipe; None where no run is finished.

        Raises:
            ValueError: the finished run is of another recipe, or its metrics.json is damaged.
        """
        if not self.metrics.is_file():
            return None
        remedy = "Choose another folder (output_dir=OTHER), or run with --overwrite to replace it."
        try:
            results = json.loads(self.metrics.read_text(encoding="utf-8"))
            finished = results["recipe"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"output_dir: {self.metrics} is damaged. {remedy}") from error
        changed = [key for key in changed_keys(recipe.model_dump(mode="json"), finished) if key != "output_dir"]
        if changed:
            raise ValueError(
                f"output_dir: {self.path} holds the finished run of another recipe (different: {', '.join(changed)}). "
                f"{remedy}"
            )
        return results

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Where the block fails, the empty folders go that a trainer makes for what it will not write."""
        try:
            yield
        except BaseException:
            for path in (self.checkpoints, self.path):
                # fails where there is something in it
                with suppress(OSError):
                    path.rmdir()
            raise

    def create(self, recipe: Recipe) -> None:
        """Remove what an earlier run wrote, and nothing else; write the resolved recipe."""
        # metrics.json first: an unfinished folder must not look finished
        for file in (self.metrics, self.curves, self.updates, self.layers):
            file.unlink(missing_ok=True)
        for folder in (self.adapter, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic(self.recipe) as partial:
            partial.write_text(f"{HEADER}\n{to_yaml(recipe)}", encoding="utf-8")

    def write_metrics(self, results: dict[str, Any]) -> None:
        with atomic(self.metrics) as partial:
            partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def changed_keys(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted keys of two nested mappings that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [prefix.removesuffix(".")]
    names = sorted({*one, *other})
    return [
        key
        for name in names
        for key in (
            changed_keys(one[name], other[name], f"{prefix}{name}.")
            if name in one and name in other
            else [f"{prefix}{name}"]
        )
    ]


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary name beside `target` to write a file or folder to; it gets its name when the block succeeds."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
