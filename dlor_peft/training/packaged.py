"""The recipes that come with dlor-peft. Loads nothing, so that `dlor train --help` can list them."""

from __future__ import annotations

import textwrap
from pathlib import Path


def packaged_recipes() -> dict[str, Path]:
    """The packaged recipes' files by name: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def list_recipes(width: int) -> str:
    """A line for each: its name, and the first sentence of its header, below the command."""
    recipes = packaged_recipes()
    names = max(map(len, recipes), default=0)
    return "\n".join(f"  {name:<{names}}  {_summary(path, width - names - 4)}" for name, path in recipes.items())


def _summary(path: Path, width: int) -> str:
    header, _, _ = path.read_text(encoding="utf-8").partition("\n\n")
    _, *lines = (line.removeprefix("#").strip() for line in header.splitlines())
    sentence, *_ = " ".join(lines).strip().split(". ")
    return textwrap.shorten(sentence, width, placeholder=" ...")
