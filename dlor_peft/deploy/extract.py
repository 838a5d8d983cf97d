"""An adapter out of a model that was fine-tuned in full: layer by layer, from the files of both."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .. import __version__
from ..config import DLoRConfig
from .adapter import PREFIX, WEIGHTS, natural
from .checkpoint import Checkpoint
from .conversion import Unit, units
from .extract_report import Left, Report
from .fitting import Fitted, Wanted, fit
from .skeleton import bare_model, tied_names
from .writing import new_folder, write_json

RECORD = "dlor_extract.json"

# for the others, PEFT would have a head saved in full whether it changed or not
_TASKS = {"ForCausalLM": TaskType.CAUSAL_LM, "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM}

T = TypeVar("T")


class _Pair(NamedTuple):
    """A tensor of the model before and after the fine-tuning."""

    name: str
    base: Tensor | None
    tuned: Tensor

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def is_changed(self) -> bool:
        # a base of higher precision is compared as it would have been stored
        return self.base is None or not torch.equal(self.base.to(self.tuned.dtype), self.tuned)


class Extraction:
    """Finds the adapter with which `base` comes nearest to `tuned`."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        wanted: Wanted,
        modules_to_save: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """Match the two by the names of their tensors.

        Args:
            base: the model that the adapter is for.
            tuned: the same after fine-tuning; its class counts.
            wanted: the form of the adapter.
            modules_to_save: modules, by the ends of their names, that the adapter keeps as they are in `tuned`.
            device: where to compute; the two models stay in their files.

        Raises:
            ValueError: the two have no tensor in common; a module to save is not in the model.
        """
        self.base, self.tuned, self.wanted, self.device = base, tuned, wanted, torch.device(device)
        self.model = bare_model(tuned, ())
        self._base_units = self._units(base)
        self._tuned_units = self._units(tuned)
        self._modules = dict(self.model.named_modules())
        self._ties = tied_names(self.model)
        self._tied = self._names_of_tied_embeddings()
        self.saved_modules = self._resolve(modules_to_save)
        if not self._base_units.keys() & self._tuned_units.keys():
            raise ValueError(
                f"{base.folder.source} and {tuned.folder.source} have no tensor in common: they are different models."
            )

    def write(self, out: str | Path, overwrite: bool = False) -> Report:
        """Write the adapter to the folder `out`, and return what it is worth.

        Raises:
            FileExistsError: the folder is there.
            OSError: it cannot be written; nothing is left of it.
            ValueError: no linear layer changed, or a weight is not finite.
        """
        with new_folder(out, overwrite, [self.base.folder.path, self.tuned.folder.path]) as folder:
            report, saved = self._run()
            tensors = {
                f"{PREFIX}{name}.{part}.weight": tensor
                for name, fitted in report.layers.items()
                for part, tensor in fitted.tensors.items()
            }
            tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            self.config(report.layers).save_pretrained(str(folder))
            sources = {"base": self.base.folder, "tuned": self.tuned.folder}
            write_json(
                folder / RECORD,
                {
                    **{name: {"source": at.source, "revision": at.revision} for name, at in sources.items()},
                    "versions": {"dlor-peft": __version__},
                    **report.record(),
                },
            )
        if report.left:
            warnings.warn(
                f"{__name__}: {len(report.left)} changed tensors are not in the adapter, the first one "
                f"{report.left[0].name}: a DLoR adapter is extracted for the weights of linear layers only. Keep "
                "the modules that count in full by modules_to_save (--modules-to-save).",
                stacklevel=2,
            )
        return report

    def _run(self) -> tuple[Report, dict[str, Tensor]]:
        layers: dict[str, Fitted] = {}
        left: list[Left] = []
        saved: dict[str, Tensor] = {}
        num_unchanged = 0
        for pair in self._pairs():
            if self._is_saved(pair.name):
                # PEFT has a copy for each module with tied weights
                saved |= {name: pair.tuned.clone().contiguous() for name in self._names_of(pair.name)}
            elif not pair.is_changed:
                num_unchanged += self._is_linear(pair.name)
            elif pair.base is not None and pair.base.shape == pair.tuned.shape and self._is_linear(pair.name):
                layers[pair.module] = self._fit(pair, pair.base)
            else:
                left.append(self._left(pair))
        if not layers:
            changed = f"; these changed: {', '.join(item.name for item in left[:5])}" if left else ""
            raise ValueError(
                f"{self.base.folder.source} and {self.tuned.folder.source} have the same weights in all linear "
                f"layers: there is nothing to extract{changed}."
            )
        layers = {name: layers[name] for name in sorted(layers, key=natural)}
        return Report(layers, sorted(left, key=lambda item: natural(item.name)), sorted(saved), num_unchanged), saved

    def config(self, layers: Mapping[str, Fitted]) -> DLoRConfig:
        """The configuration of an adapter with these layers."""
        general, pattern = {}, {}
        # a mode without a side has the side "auto" in a config
        for field, value_of in {
            "mode": lambda fitted: fitted.mode,
            "side": lambda fitted: fitted.side or "auto",
            "rank": lambda fitted: fitted.r,
        }.items():
            general[field], pattern[field] = as_pattern({name: value_of(one) for name, one in layers.items()})
        class_name = type(self.model).__name__
        task = next((task for end, task in _TASKS.items() if class_name.endswith(end)), None)
        return DLoRConfig(
            r=general["rank"],
            mode=general["mode"],
            side=general["side"],
            diagonal=self.wanted.diagonal,
            mode_pattern=pattern["mode"],
            side_pattern=pattern["side"],
            rank_pattern=pattern["rank"],
            target_modules=list(layers),
            exclude_modules=self._beyond(layers) or None,
            modules_to_save=self.saved_modules or None,
            # or PEFT would leave what is tied to a module that is saved as it was
            ensure_weight_tying=any(self._is_saved(name) for names in self._ties for name in names),
            base_model_name_or_path=self.base.folder.source,
            revision=self.base.folder.revision,
            task_type=task,
            auto_mapping=None if task else {"base_model_class": class_name, "parent_library": "transformers"},
            inference_mode=True,
        )

    def _beyond(self, layers: Mapping[str, Fitted]) -> list[str]:
        """Modules that are no targets, but end with the whole name of one, which PEFT takes for a match."""
        return [
            name
            for name in self._modules
            if name not in layers and any(name.endswith(f".{target}") for target in layers)
        ]

    def _units(self, checkpoint: Checkpoint) -> dict[str, Unit]:
        found, _ = units(checkpoint.specs, checkpoint.read_empty, self.model)
        return {target: unit for unit in found for target in unit.targets}

    def _pairs(self) -> Iterator[_Pair]:
        """Each tensor of the model once, as the file of the tuned model has them in order."""
        done = set()
        for unit in tqdm([*{id(unit): unit for unit in self._tuned_units.values()}.values()], desc="extracting"):
            before: dict[str, Tensor] = {}
            for name, tuned in unit.to_model(self.tuned.read, self.model).items():
                if name in done:
                    continue
                done.add(name)
                source = self._base_units.get(name)
                if source is not None and name not in before:
                    before |= source.to_model(self.base.read, self.model)
                yield _Pair(name, before.get(name), tuned)
        self.base.close()
        self.tuned.close()

    def _fit(self, pair: _Pair, base: Tensor) -> Fitted:
        W, tuned = (self._matrix(pair.module, tensor) for tensor in (base, pair.tuned))
        try:
            return fit(tuned - W, W, self.wanted)
        except ValueError as error:
            raise ValueError(f"{pair.name}: {error}") from error

    def _matrix(self, module: str, stored: Tensor) -> Tensor:
        """(out_features, in_features), in float32, or float64 where it is stored so."""
        dtype = torch.promote_types(stored.dtype, torch.float32)
        W = stored.to(self.device, dtype)
        return W.mT if isinstance(self._modules[module], Conv1D) else W

    def _is_linear(self, name: str) -> bool:
        """Whether it is the weight of a layer that is adapted where it is called."""
        path, _, parameter = name.rpartition(".")
        module = self._modules.get(path)
        if parameter != "weight" or name in self._tied or not isinstance(module, nn.Linear | Conv1D):
            return False
        try:
            # the kernels of these models read the weight past the layer
            _check_lora_target_modules_mamba(PeftConfig(peft_type="LORA"), self.model, path.rpartition(".")[2])
        except ValueError:
            return False
        # and so does attention of torch
        return not isinstance(module, NonDynamicallyQuantizableLinear)

    def _left(self, pair: _Pair) -> Left:
        kind = type(self._modules.get(pair.module)).__name__
        if pair.name in self._tied:
            kind = f"{kind}, tied to the embedding"
        if pair.base is None:
            return Left(pair.name, kind, None, "not in the base")
        if pair.base.shape != pair.tuned.shape:
            return Left(pair.name, kind, None, f"{_size(pair.base)} in the base, {_size(pair.tuned)} after")
        W, tuned = pair.base.double(), pair.tuned.double()
        if not tuned.isfinite().all():
            return Left(pair.name, kind, None, "holds a NaN or an infinite number after")
        if not W.any():
            return Left(pair.name, kind, None, "all zeros in the base")
        return Left(pair.name, kind, (torch.linalg.norm(tuned - W) / torch.linalg.norm(W)).item(), "")

    def _names_of_tied_embeddings(self) -> set[str]:
        embeddings = {module.weight for module in self._modules.values() if isinstance(module, nn.Embedding)}
        parameters = self.model.named_parameters(remove_duplicate=False)
        modules = ((name, value, self._modules[name.rpartition(".")[0]]) for name, value in parameters)
        return {
            name for name, value, module in modules if value in embeddings and not isinstance(module, nn.Embedding)
        }

    def _names_of(self, name: str) -> list[str]:
        """All names in the model of the tensor that has this one."""
        return next((names for names in self._ties if name in names), [name])

    def _is_saved(self, name: str) -> bool:
        return any(other.startswith(f"{module}.") for other in self._names_of(name) for module in self.saved_modules)

    def _resolve(self, asked: Sequence[str]) -> list[str]:
        """The modules that end with the names that are asked for."""
        found = []
        for end in asked:
            names = [name for name in self._modules if f".{name}".endswith(f".{end}")]
            if not names:
                raise ValueError(
                    f"{__name__}: no module of {type(self.model).__name__} is called {end!r}, which is to be saved "
                    f"in full. At its top there are {', '.join(name for name, _ in self.model.named_children())}."
                )
            found += names
        return list(dict.fromkeys(found))


def as_pattern(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most common value, and for each other one a regex of its names: what a config takes, and its pattern."""
    ((common, _),) = Counter(values.values()).most_common(1)
    others = {name: value for name, value in values.items() if value != common}
    # a key matches all names that end with it too: the longer ones come first then, each with a key of its own
    inner = {name for name in values if any(name.endswith(f".{other}") for other in others)}
    if inner:
        named = sorted({*others, *inner}, key=len, reverse=True)
        return common, {re.escape(name): values[name] for name in named}
    names: dict[T, list[str]] = {}
    for name, value in others.items():
        names.setdefault(value, []).append(re.escape(name))
    return common, {"|".join(of_value): value for value, of_value in names.items()}


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
