"""Which modules an adapter's patterns match; one that matches nothing is a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from .sources import suggest


def unmatched(given: dict[str, Any], config: PeftConfig, modules: list[str], adapted: list[str]) -> list[str]:
    """A message for each pattern of the recipe's adapter section that matches nothing.

    Args:
        given: the adapter section as the recipe has it.
        config: the PEFT config after the model was adapted, which may have translated the targets.
        modules: names of all modules of the base model.
        adapted: names of the modules and parameters that are adapted.
    """
    problems: list[str] = []

    def check(field: str, items: Iterable[Any], matches: Callable[[Any], bool], known: Iterable[str]) -> None:
        for item in items:
            if not matches(item):
                problems.append(f"adapter.{field}: {item!r} matches nothing.{suggest(str(item), set(known), 'There')}")

    def adapted_ends(item: str) -> bool:
        return any(_ends(name, item) for name in adapted)

    all_leaves, adapted_leaves = _leaves(modules), _leaves(adapted)
    targets = given.get("target_modules")
    translated = getattr(config, "target_modules", None)
    if isinstance(targets, list):
        # a name that PEFT or DLoR translated stands no longer among them
        asked = [item for item in targets if not isinstance(translated, set) or item in translated]
        check("target_modules", asked, adapted_ends, all_leaves)
    check("target_parameters", given.get("target_parameters") or (), adapted_ends, all_leaves)
    excluded = given.get("exclude_modules") or ()
    if isinstance(excluded, str):
        check(
            "exclude_modules", [excluded], lambda item: any(re.fullmatch(item, name) for name in modules), all_leaves
        )
    else:
        check("exclude_modules", excluded, lambda item: any(_ends(name, item) for name in modules), all_leaves)
    saved = given.get("modules_to_save") or ()
    check("modules_to_save", saved, lambda item: any(name.endswith(item) for name in modules), all_leaves)
    for field, pattern in given.items():
        if field.endswith("_pattern") and isinstance(pattern, dict):
            check(field, pattern, lambda key: any(get_pattern_key([key], n) == key for n in adapted), adapted_leaves)
    layers = given.get("layers_to_transform")
    indices = {match for name in adapted for match in re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")}
    of_layers = [layers] if isinstance(layers, int) else layers or ()
    check("layers_to_transform", of_layers, lambda index: str(index) in indices, indices)
    return problems


def describe_targets(given: dict[str, Any], modules: list[str]) -> str:
    """What the recipe targets, and what the model has: for the error of a method that found nothing to adapt."""
    asked = given.get("target_modules")
    first = asked[0] if isinstance(asked, list) and asked else str(asked)
    return f"adapter.target_modules is {asked!r}.{suggest(first, _leaves(modules), 'There')}"


def _ends(name: str, item: str) -> bool:
    return f".{name}".endswith(f".{item}")


def _leaves(names: list[str]) -> set[str]:
    return {leaf for name in names if (leaf := name.rpartition(".")[2]) and not leaf.isdigit()}
