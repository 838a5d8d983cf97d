"""The recipe's splits as `datasets.Dataset`s whose columns are named by their role."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import check_values, source_of
from .schema import DataSection, Recipe
from .sources import suggest

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_splits(recipe: Recipe, allowed: Sequence[tuple[str, ...]]) -> dict[str, Dataset]:
    """All rows of every split that the recipe names, with one of the `allowed` sets of columns.

    Raises:
        FileNotFoundError: a local file is missing.
        ValueError: a file of unknown kind, or a column that a split does not have.
    """
    columns = _columns(recipe, allowed)
    splits = _load_files(recipe.data) if recipe.data.files else _load_hub(recipe.data)
    for name, split in splits.items():
        for role, column in columns.items():
            if column not in split.column_names:
                raise ValueError(
                    f"data.columns.{role}: the {name} split has no column {column!r}."
                    f"{suggest(column, split.column_names, 'Its columns')}"
                )
        renames = {column: role for role, column in columns.items() if column != role}
        splits[name] = split.select_columns(list(columns.values())).rename_columns(renames)
        check_values(splits[name], source_of(recipe, name))
    return splits


def draw_rows(splits: dict[str, Dataset], recipe: Recipe) -> dict[str, Dataset]:
    """At most data.max_rows rows of each split, drawn with the recipe's seed; all rows in order without it."""
    count = recipe.data.max_rows
    if count is None:
        return splits
    return {
        name: split.shuffle(seed=recipe.seed).select(range(min(count, len(split)))) for name, split in splits.items()
    }


def _columns(recipe: Recipe, allowed: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """Role -> name of the column, in the order of the roles."""
    given = {str(role): column for role, column in recipe.data.columns.items()}
    # those that are named in full go before those of which a part is named
    for roles in sorted(allowed, key=lambda roles: set(roles) != set(given)):
        # a role that is not named is that of the column of its name
        if set(given) <= set(roles):
            return {role: given.get(role, role) for role in roles}
    choices = "; ".join(" and ".join(roles) for roles in allowed)
    raise ValueError(f"data.columns: {recipe.task.type} reads {choices}. Given: {', '.join(given)}.")


def _load_files(data: DataSection) -> dict[str, Dataset]:
    splits = {}
    for name, file in data.files.items():
        builder = BUILDERS.get(Path(file).suffix)
        if builder is None:
            raise ValueError(f"data.files.{name}: {file} is of no known kind. Known: {', '.join(BUILDERS)}.")
        if not Path(file).is_file():
            raise FileNotFoundError(f"data.files.{name}: no file {file}.")
        if not os.access(file, os.R_OK):
            raise PermissionError(f"data.files.{name}: {file} may not be read.")
        splits[name] = _load(f"data.files.{name}: {file}", builder, data_files=file, split="train")
    return splits


def _load_hub(data: DataSection) -> dict[str, Dataset]:
    names = data.splits or {"train": "train", "test": "test"}
    where = f"data.dataset: {data.dataset}"
    return {str(name): _load(where, data.dataset, data.name, split=split) for name, split in names.items()}


def _load(where: str, *args: Any, **kwargs: Any) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        split = load_dataset(*args, **kwargs)
    except (DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"{where} cannot be read: {error.__cause__ or error or 'it is empty'}.") from error
    except KeyError as error:
        # datasets before 4.8 looks for each column in each row
        raise ValueError(f"{where} cannot be read: a row has no {error.args[0]}.") from error
    if not len(split):
        raise ValueError(f"{where} has no rows.")
    return split
