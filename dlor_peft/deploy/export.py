"""A DLoR adapter as one that PEFT itself knows: what can be one, under which names, and its files.

In the layout that serving engines read: `base_model.model.<module>.lora_A.weight` and `lora_B.weight`, one rank for
all layers, scaling 1, an explicit list of target modules, and nothing besides.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from ..form import Form, Residual
from ..layers.linear import Linear
from .adapter import CONFIG, PREFIX, WEIGHTS, SavedAdapter
from .checkpoint import Checkpoint
from .skeleton import Skeleton
from .weights import BaseWeights
from .writing import write_json


@dataclass(frozen=True)
class Adapted:
    """One adapted linear module: its form, and its factors in float32 or wider."""

    module: str
    form: Form
    residual: Residual


class Source:
    """An adapter on its base, which holds nothing but factors of linear layers.

    layers      the adapted modules in order
    weights     of the base
    """

    def __init__(self, base: Checkpoint, adapter: SavedAdapter) -> None:
        """Look at the names and shapes.

        Raises:
            ValueError: the adapter does not fit the base, or holds what is neither LoRA nor DoRA.
        """
        self.base, self.adapter = base, adapter
        self.skeleton = Skeleton(base, [adapter])
        self.weights = BaseWeights(base, self.skeleton)
        self._refuse_what_is_no_lora()
        (name,) = self.skeleton.names
        self.layers = [
            Adapted(module, layer.form[name], _wide(layer.residual(name)))
            for module, layer in self.skeleton.layers.items()
        ]

    @property
    def inputs(self) -> list[Path]:
        """The folders that are read."""
        return [self.base.folder.path, self.adapter.folder]

    @property
    def remedy(self) -> str:
        return f"To keep all of it, merge it: dlor merge --adapter {self.adapter.source} --out DIR"

    def _refuse_what_is_no_lora(self) -> None:
        found = [
            f"{module} ({type(layer.get_base_layer()).__name__})"
            for module, layer in self.skeleton.layers.items()
            if type(layer) is not Linear
        ]
        for name, change in self.skeleton.changes.items():
            found += [f"trained tokens of {name}"] if change.tokens else []
            if change.replacement is not None and not self._is_of_base(name, change.replacement):
                found.append(f"{name} in full")
        if found:
            raise ValueError(
                f"{self.adapter.source} is more than a LoRA of linear layers can hold: {_some(found)}. {self.remedy}."
            )

    def _is_of_base(self, name: str, tensor: Tensor) -> bool:
        """Whether it is the frozen weight, which PEFT saves along with an adapter of an output layer."""
        try:
            stored = self.weights.stored(name)
        except (OSError, ValueError):
            return False
        return tensor.shape == stored.shape and torch.equal(tensor.to(stored.dtype), stored)

    def config(self, r: int, use_dora: bool = False) -> LoraConfig:
        """A LoRA of rank r and scaling 1 on these modules and no others."""
        own, model = self.adapter.config, self.skeleton.model
        return LoraConfig(
            r=r,
            lora_alpha=r,
            use_dora=use_dora,
            target_modules=target_modules(model, [layer.module for layer in self.layers]),
            fan_in_fan_out=any(isinstance(model.get_submodule(layer.module), Conv1D) for layer in self.layers),
            task_type=own.task_type,
            base_model_name_or_path=self.base.folder.source,
            revision=self.base.folder.revision,
            inference_mode=True,
        )

    def names(self, config: LoraConfig) -> tuple[dict[str, str], list[str]]:
        """Module -> its name in the file, which PEFT reads; and modules not known by it in the base's files.

        Where transformers renames what it loads, the names are those in the base's files: vLLM and llama.cpp know no
        others, and PEFT renames those of a LoRA as transformers does.

        Raises:
            ValueError: PEFT reads a LoRA on this model in another way.
        """
        model, modules = self.skeleton.model, [layer.module for layer in self.layers]
        stored: dict[str, str | None] = {module: module for module in modules}
        if get_checkpoint_conversion_mapping(model.config.model_type) is not None:
            try:
                stored = self._stored_names(modules)
            except (OSError, ValueError):
                # nothing else may need the weights
                stored = dict.fromkeys(modules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(copy.deepcopy(model), copy.deepcopy(config), low_cpu_mem_usage=True)
        read = _read_as(wrapped, filter(None, stored.values()))
        names = {module: name if name and read.get(name) == module else module for module, name in stored.items()}
        wanted = {name: module for module, name in names.items()}
        if _read_as(wrapped, wanted) != wanted or not _targets(wrapped, modules):
            raise ValueError(
                f"PEFT turns a LoRA on {_some(modules)} of a {type(model).__name__} into another one as it loads it, "
                f"since transformers stores such layers in another way than it runs them. {self.remedy}."
            )
        return names, [module for module in modules if names[module] != stored[module]]

    def _stored_names(self, modules: list[str]) -> dict[str, str | None]:
        """Module -> its name in the base's files; None where it is there in another form."""
        units = {module: self.weights.units.get(f"{module}.weight") for module in modules}
        return {
            module: None if unit is None or unit.converter else unit.sources[0].removesuffix(".weight")
            for module, unit in units.items()
        }


def target_modules(model: nn.Module, modules: list[str]) -> list[str]:
    """The last parts of their names, as serving engines expect, or whole names where those would match others."""
    names = [name for name, _ in model.named_modules()]
    last = sorted({module.rpartition(".")[-1] for module in modules})
    config = LoraConfig(target_modules=last)
    matched = {name for name in names if check_target_module_exists(config, name)}
    return last if matched == set(modules) else modules


def _read_as(wrapped: PeftModel, names: Iterable[str]) -> dict[str, str]:
    """Name in a file -> the module that PEFT puts a LoRA of that name on."""
    listed = list(names)
    state = {f"{PREFIX}{name}.lora_A.weight": torch.tensor([at]) for at, name in enumerate(listed)}
    config = wrapped.peft_config["default"]
    read = convert_peft_adapter_state_dict_for_transformers(wrapped, config, state, "default")
    return {
        listed[int(at)]: key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for key, at in read.items()
        if at.numel() == 1
    }


def _targets(wrapped: PeftModel, modules: Iterable[str]) -> bool:
    """Whether a LoRA is on these modules and on no others."""
    found = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {key for key in found if key.endswith(".lora_A.weight")} == {
        f"{PREFIX}{module}.lora_A.weight" for module in modules
    }


def _wide(residual: Residual) -> Residual:
    return residual.to(torch.promote_types(residual.U.dtype, torch.float32))


def _some(names: Iterable[str], at_most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{', '.join(names[:at_most])}{more}"


def write_adapter(folder: Path, source: Source, config: LoraConfig, tensors: Mapping[str, Tensor], text: str) -> None:
    """adapter_config.json, adapter_model.safetensors and a card."""
    config.save_pretrained(str(folder))
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # a set has no order of its own
    write_json(folder / CONFIG, {**fields, "target_modules": sorted(fields["target_modules"])})
    save_file(
        {key: tensor.float().contiguous() for key, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    base, kind = source.base.folder, "dora" if config.use_dora else "lora"
    data = ModelCardData(library_name="peft", tags=["dlor", "exported", kind, "peft"])
    if not Path(base.source).is_dir():
        data.base_model = base.source
    body = (
        f"# {'DoRA' if config.use_dora else 'LoRA'} adapter\n\nFor {base.source}, exported from the DLoR adapter "
        f"{source.adapter.source}. {text}\n\nIt loads with PEFT alone:\n\n```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/or/repo-id/of/this/adapter")\n```\n'
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(folder / "README.md")
