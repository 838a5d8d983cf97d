"""A host's name of a field of DLoRConfig is the field's behind "dlor_": `dlor_r`, `dlor_mode`, `dlor_dropout`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import DLoRConfig

PREFIX = "dlor_"

# those of PEFT's own base class, such as the task, are the host's to set
_OWN = inspect.get_annotations(DLoRConfig).keys() - {"dlor_version"}

FIELDS: Mapping[str, dataclasses.Field] = MappingProxyType(
    {PREFIX + field.name.removeprefix(PREFIX): field for field in dataclasses.fields(DLoRConfig) if field.name in _OWN}
)


def read(given: Mapping[str, Any], place: str, elsewhere: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Field -> value of everything in `given` whose name starts with "dlor_"; a value of None was not given.

    `elsewhere` has the fields that the host sets by options of its own, and those options.

    Raises:
        ValueError: there is no such field, or the host has another name for it.
    """
    settings = {}
    for name, value in given.items():
        if not name.startswith(PREFIX) or value is None:
            continue
        if name not in FIELDS:
            # the prefix, which all share, is no likeness
            close = difflib.get_close_matches(name[len(PREFIX) :], [known[len(PREFIX) :] for known in FIELDS], n=1)
            hint = f"Did you mean {PREFIX + close[0]!r}? " if close else ""
            raise ValueError(f"{place}: {name!r} is no setting of DLoR. {hint}Known: {', '.join(FIELDS)}.")
        field = FIELDS[name].name
        if field in elsewhere:
            raise ValueError(f"{place}: {name!r} is set by {elsewhere[field]} here. Give it there.")
        settings[field] = value
    return settings
