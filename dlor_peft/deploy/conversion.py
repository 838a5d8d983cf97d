"""From the names in a checkpoint to those in the model, and back, as transformers does it when it loads and saves.

transformers renames some tensors, and stacks or fuses others, such as the weights of experts. The tensors of a
checkpoint that become one or several of the model together are a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Read = Callable[[str], Tensor]


@dataclass
class Unit:
    """Tensors of a checkpoint, and what they are in the model."""

    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    # as written again: a name without the prefix of the base model would not be read in company of one with it
    name: str | None = None
    converter: WeightConverter | None = None
    patterns: list[str] = field(default_factory=list)

    def to_model(self, read: Read, model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors by their names in the model."""
        if self.converter is None:
            return {self.targets[0]: read(self.sources[0])}
        converter = deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], source, pattern, read(source))  # pyright: ignore[reportArgumentType]
        converted = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: found[0] if isinstance(found, list) else found for name, found in converted.items()}

    def to_checkpoint(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The inverse of `to_model`."""
        if self.converter is None:
            assert self.name is not None
            return {self.name: tensors[self.targets[0]]}
        return revert_weight_conversion(model, dict(tensors))


def units(keys: Iterable[str], read_empty: Read, model: PreTrainedModel) -> tuple[list[Unit], list[str]]:
    """The units of a checkpoint with these names, in their order, and the names that are nothing in the model.

    Afterwards `model` knows which conversions were used, which is what saving reverts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    in_model, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Unit] = {}
    unknown = []
    # the order in which transformers stacks
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, in_model)
        if target not in in_model and key in in_model:
            target, pattern = rename_source_key(key, [], [], prefix, in_model)
        if target not in in_model:
            unknown.append(key)
            continue
        unit = found.setdefault(target, Unit(targets=[target]))
        unit.sources.append(key)
        if pattern is not None:
            unit.converter = by_pattern[pattern]
            unit.patterns.append(pattern)
        else:
            without_prefix, _ = rename_source_key(key, renamings, converters)
            unit.name = key if without_prefix == target else target
    used = [conversion for conversion in mapping if conversion.was_used()]
    model._weight_conversions = used  # pyright: ignore[reportArgumentType]
    for unit in found.values():
        if unit.converter is not None:
            unit.targets = list(unit.to_model(read_empty, model))
    order = {key: at for at, key in enumerate(keys)}
    return sorted(found.values(), key=lambda unit: order[unit.sources[0]]), unknown
