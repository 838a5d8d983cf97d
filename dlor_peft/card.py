"""An adapter's folder explains itself: its card says what the adapter is, how it was trained and how to load it."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

_BEGIN = "<!-- dlor-peft: this part is written anew at each save -->"
_END = "<!-- dlor-peft: end -->"
_OWN_PART = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)

_INTRODUCTION = """\
It was made with the Python package dlor-peft. PEFT knows the method once that package is imported; without the import
it raises `KeyError: 'DLOR'`. For an adapter in a subfolder of a repository, pass `subfolder=` as well."""

_CODE = """\
import dlor_peft  # makes DLOR known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{source}")
"""

_NAMES = {
    "base_model_name_or_path": "base model",
    "revision": "its revision",
    "mode": "mode",
    "mode_pattern": "mode elsewhere",
    "side": "side",
    "side_pattern": "side elsewhere",
    "diagonal": "diagonal",
    "r": "r",
    "rank_pattern": "r elsewhere",
    "depth": "depth",
    "depth_pattern": "depth elsewhere",
    "target_modules": "adapted modules",
    "target_parameters": "adapted parameters",
    "modules_to_save": "trained in full",
    "dlor_version": "dlor-peft",
}


def describe(
    directory: str | Path,
    code: str | None = None,
    training: Mapping[str, str] | None = None,
    tags: Iterable[str] = (),
    source: str = "path/or/repo-id/of/this/adapter",
) -> None:
    """The model card (README.md) of `directory` says what its adapter is, what `training` tells, and how to load it.

    What the adapter is comes from adapter_config.json; where there is none, or it is of another PEFT method, the card
    does without. `code` loads the adapter, in place of PEFT's loader for DLoR with `source`. All of that stands in one
    part of the card, which the next call replaces; text and metadata around it stay, and `tags` are added to its own.

    The card is made where there is none. It is replaced in one step: an interrupted save leaves the former one.
    """
    path = Path(directory, "README.md")
    config = _read_config(Path(directory))
    is_dlor = config.get("peft_type", "DLOR") == "DLOR"
    parts = []
    if is_dlor:
        parts.append(f"## DLoR adapter\n\n{_table('diagonal plus low rank', _facts(config))}".rstrip())
    if training:
        parts.append(f"## How this adapter was trained\n\n{_table('training', training)}")
    if is_dlor or code:
        introduction = f"{_INTRODUCTION}\n\n" if is_dlor else ""
        lines = code or _CODE.format(source=source)
        parts.append(f"## How to load this adapter\n\n{introduction}```python\n{lines}```")
    card = _load(path)
    data = cast(ModelCardData, card.data)
    wanted: list[str] = [*(data.tags or []), *tags, *(("dlor", "peft") if is_dlor else ())]
    data.tags = list(dict.fromkeys(wanted)) or None
    if parts:
        card.text = _with_own_part(card.text, "\n\n".join([_BEGIN, *parts, _END]))
    partial = path.with_name(".README.md.partial")
    partial.write_text(str(card), encoding="utf-8")
    partial.replace(path)


def read_tags(directory: str | Path) -> list[str]:
    """The tags that the model card of `directory` has; none where there is no card."""
    return cast(ModelCardData, _load(Path(directory, "README.md")).data).tags or []


def _load(path: Path) -> ModelCard:
    if path.exists():
        return ModelCard.load(path, ignore_metadata_errors=True)
    return ModelCard(f"---\n{ModelCardData(library_name='peft').to_yaml()}\n---\n")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _facts(config: Mapping[str, Any]) -> dict[str, str]:
    """The values that are set, by their name for the reader."""
    facts = {}
    for field, name in _NAMES.items():
        value = config.get(field)
        if value in (None, [], {}) or (field == "side" and config["mode"] == "additive"):
            continue
        if isinstance(value, list):
            facts[name] = ", ".join(f"`{item}`" for item in sorted(value))
        elif isinstance(value, dict):
            facts[name] = ", ".join(f"`{key}`: {item}" for key, item in value.items())
        else:
            facts[name] = f"`{value}`" if isinstance(value, str) else str(value)
    return facts


def _table(title: str, facts: Mapping[str, str]) -> str:
    """Two columns; empty without facts."""
    rows = [f"| {name} | {_escape(value)} |" for name, value in facts.items()]
    return "\n".join([f"| {title} | |", "|---|---|", *rows]) if rows else ""


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _with_own_part(text: str, part: str) -> str:
    if not _OWN_PART.search(text):
        text = f"{text.rstrip()}\n\n{part}"
    # PEFT takes the last line end off
    return _OWN_PART.sub(lambda found: part, text, count=1).rstrip() + "\n"
