"""A folder in the layout of the Hugging Face cache, filled with what the suite would download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


def add(cache: Path, repo: str, fill: Callable[[Path], object], revisions: tuple[str, ...] = ("main",)) -> None:
    """Write one commit of a model repository.

    Args:
        cache: what HF_HUB_CACHE names.
        repo: "owner/name", or "name" for an old one without an owner.
        fill: writes the files into the folder that it is given.
        revisions: branches and tags that point to the commit.
    """
    folder = cache / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(" ".join(revisions).encode()).hexdigest()
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    fill(snapshot)
    (folder / "refs").mkdir(exist_ok=True)
    for revision in revisions:
        (folder / "refs" / revision).write_text(commit)
