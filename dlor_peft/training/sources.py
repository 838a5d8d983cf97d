"""A recipe before its types are checked: strict YAML, packaged recipes, dotted overrides, the origin of each value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .packaged import packaged_recipes

RECIPE_FILE = "recipe"
COMMAND_LINE = "command line"
DEFAULT = "default"


class _StrictLoader(yaml.SafeLoader):
    """PyYAML, but 1e-3 is a number and no is a word as in YAML 1.2, and a key that stands twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|false|False$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in the error of a text that is not YAML."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML: {problem}.") from error


def find_recipe(name: str) -> Path:
    """The file behind a path or behind the name of a packaged recipe."""
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"no recipe {name!r}: it is neither a file nor a packaged recipe.{suggest(name, packaged, 'Packaged recipes')}"
    )


def suggest(name: str, known: Iterable[str], what: str = "Known") -> str:
    """An error message's end: " Did you mean 'mode'? Known: depth, mode, r.", with a guess only where one is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(name, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" {what}: {', '.join(known) or 'none'}."


class Sources:
    """The recipe file's mapping with the command line's overrides laid over it.

    An override is `dotted.key=value`, its value YAML. A mapping replaces the whole section; an empty value
    (`adapter.mode=`) drops the key, so that its default applies.
    """

    def __init__(self, path: Path, overrides: Iterable[str] = ()) -> None:
        self.path = path
        self.values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(self.values, dict):
            raise ValueError(f"{path}: a recipe is a mapping with keys such as model, task and data.")
        _expand_task(self.values)
        self._origins = dict.fromkeys(_leaves(self.values), RECIPE_FILE)
        for override in overrides:
            self._override(override)

    def origin(self, key: str) -> str:
        """`RECIPE_FILE`, `COMMAND_LINE` or `DEFAULT`."""
        return self._origins.get(key, DEFAULT)

    def _override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ValueError(f"override {override!r}: write key=value with a dotted key, for example adapter.r=4.")
        section = self.values
        for depth, part in enumerate(parts[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ValueError(
                    f"override {override!r}: {'.'.join(parts[:depth])} is {section!r}, not a section with keys. "
                    f"Override {'.'.join(parts[:depth])} itself."
                )
        for known in [known for known in self._origins if known == key or known.startswith(f"{key}.")]:
            del self._origins[known]
        if not text:
            if parts[-1] not in section:
                there = suggest(parts[-1], section, "Set there")
                raise ValueError(f"override {override!r}: there is no {key} to drop.{there}")
            del section[parts[-1]]
            return
        section[parts[-1]] = parse_yaml(text, f"override {override!r}")
        _expand_task(self.values)
        written = section[parts[-1]]
        self._origins |= dict.fromkeys(_leaves(written, key), COMMAND_LINE)


def _expand_task(values: dict[str, Any]) -> None:
    # "task: sft" is short for "task: {type: sft}"
    if isinstance(values.get("task"), str):
        values["task"] = {"type": values["task"]}


def _leaves(value: Any, key: str = "") -> Iterator[str]:
    if not isinstance(value, dict) or not value:
        yield key
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))
