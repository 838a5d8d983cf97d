"""A folder that is given by path, or as a repository on the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

# tokenizers, configurations, chat templates
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")


class Folder(NamedTuple):
    """A local folder with the files that were asked for, and the commit on the Hub that it is of, if it is of one."""

    path: Path
    source: str
    revision: str | None


def fetch_folder(
    source: str | Path, patterns: Iterable[str], revision: str | None = None, subfolder: str | None = None
) -> Folder:
    """The folder `source`, or, where there is none, the files of that repository that match the patterns.

    Args:
        source: a path or a repository id. What exists as a folder is one.
        patterns: names of files, with wildcards; for repositories.
        revision: branch, tag or commit of a repository.
        subfolder: of the folder or repository.

    Raises:
        FileNotFoundError: it is no folder, and no repository can have that name; or the subfolder is not there.
        OSError: the repository cannot be read.
    """
    path = Path(source).expanduser()
    sha = None
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a folder, and revision={revision!r} is for repositories: leave it out, or move the "
                "folder out of the way."
            )
    else:
        path = _download(str(source), patterns, revision, subfolder)
        sha = path.name
    folder = path / subfolder if subfolder else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} has no subfolder {subfolder!r}.")
    return Folder(folder, str(source), sha)


def _download(source: str, patterns: Iterable[str], revision: str | None, subfolder: str | None) -> Path:
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {source}, and a repository on the Hub cannot be called that. Give the path of a "
            "folder, or a repository as org/name."
        ) from None
    within = f"{subfolder}/" if subfolder else ""
    try:
        found = snapshot_download(source, revision=revision, allow_patterns=[f"{within}{name}" for name in patterns])
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{source} is no folder here, not in the cache of the Hub, and the Hub cannot be reached: {error}"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"{source} is no folder here, and the Hub does not give it: {error}") from error
    return Path(found)
