"""A saved DLoR adapter, read and checked: all of it, or an error that says what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import DLoRConfig
from .hub import SMALL_FILES, fetch_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")

# of the configuration: what no default may stand in for
_REQUIRED = ("mode", "side", "diagonal", "r", "depth")
# what PEFT takes down, and does not check
_RECORDS = ("base_model_name_or_path", "revision", "peft_version", "dlor_version")
_MAX_SIZE = 2**20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEY = re.compile(rf"(?P<module>.+)\.(?P<tensor>{'|'.join(FACTORS)})\.weight")


@dataclass(frozen=True)
class SavedAdapter:
    """What is stored: the factors of each adapted module, and the tensors that are saved in full.

    The names are those in the model, without PEFT's prefix. The shapes are those of `form.Form`.
    """

    source: str
    folder: Path
    revision: str | None
    sha256: str
    config: DLoRConfig
    layers: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in the file."""
        factors = {
            f"{PREFIX}{module}.{name}.weight": tensor
            for module, tensors in self.layers.items()
            for name, tensor in tensors.items()
        }
        return factors | {f"{PREFIX}{name}": tensor for name, tensor in self.others.items()}


def read_adapter(source: str | Path, revision: str | None = None, subfolder: str | None = None) -> SavedAdapter:
    """The adapter in a folder or repository; only JSON and safetensors are read.

    Raises:
        OSError: the folder, repository or one of the two files is missing or cannot be read.
        ValueError: a file is damaged; the adapter is of another method; a field of its configuration is not allowed;
            a tensor is missing, has another shape than the configuration says, or holds NaN or infinity.
    """
    folder = fetch_folder(source, (*SMALL_FILES, WEIGHTS), revision, subfolder)
    config = _read_config(folder.path)
    tensors = read_tensors(folder.path / WEIGHTS)
    layers, others = _sorted_out(tensors, folder.path / WEIGHTS)
    for module, factors in layers.items():
        _check_layer(module, factors, config, folder.path)
    with (folder.path / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return SavedAdapter(folder.source, folder.path, folder.revision, sha256, config, layers, others)


def _read_config(folder: Path) -> DLoRConfig:
    fields, path = read_fields(folder, "DLOR", "DLoR"), folder / CONFIG
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}. Save the adapter again.")
    mapping = fields.get("auto_mapping") or {}
    records = {**{name: fields.get(name) for name in _RECORDS}, **(mapping if isinstance(mapping, dict) else {"": 0})}
    if not all(isinstance(value, str | None) for value in records.values()):
        raise ValueError(f"{path} is damaged: {', '.join(_RECORDS)} and what is in auto_mapping are text or null.")
    try:
        config = PeftConfig.from_peft_type(**fields)
    except Exception as error:
        raise damaged_config(folder, error) from error
    assert isinstance(config, DLoRConfig)
    sizes = (config.r, config.depth, *config.rank_pattern.values(), *config.depth_pattern.values())
    if max(sizes) > _MAX_SIZE:
        raise ValueError(f"{path} is damaged: a rank or depth of {max(sizes)} is more than any layer has.")
    return config


def read_fields(folder: Path, peft_type: str, method: str) -> dict[str, Any]:
    """What adapter_config.json of an adapter of that type says; errors as `read_adapter`."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a saved adapter: it has no {CONFIG}. Give the folder that save_pretrained wrote."
        )
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(fields, dict) or fields.get("peft_type") != peft_type:
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
        raise ValueError(f"{folder} is not a {method} adapter: its peft_type is {kind!r}, not {peft_type!r}.")
    return fields


def damaged_config(folder: Path, error: Exception) -> ValueError:
    """For whatever a field of the wrong kind leads to, in PEFT too."""
    return ValueError(f"{folder / CONFIG} is not what save_pretrained writes: {error}. Save the adapter again.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter by the names in its file; errors as `read_adapter`."""
    if not path.is_file():
        hint = " Pickled weights are never read." if path.with_name("adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{path.parent} has no {WEIGHTS}.{hint} Save the adapter again with save_pretrained.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). Save or copy the adapter again.") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            known = ", ".join(map(str, _DTYPES))
            raise ValueError(f"{path}: {key} has the dtype {tensor.dtype}, where an adapter has one of {known}.")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinity. The training that made it diverged, or the file is damaged: go "
                "back to an earlier checkpoint."
            )
    return tensors


def _sorted_out(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(name)
        if match:
            layers.setdefault(match["module"], {})[match["tensor"]] = tensor
        else:
            others[name] = tensor
    if not layers:
        raise ValueError(f"{path} holds no DLoR tensors: no key ends in {', '.join(f'{n}.weight' for n in FACTORS)}.")
    return {module: layers[module] for module in sorted(layers, key=natural)}, others


def _check_layer(module: str, factors: Mapping[str, Tensor], config: DLoRConfig, folder: Path) -> None:
    """ValueError where the tensors are not those of the configuration, as far as they show without the base model."""
    layers = _for_layer(module, config)
    findings = [_finding(factors, layer) for layer in layers]
    if all(findings):
        layer = layers[0]
        raise ValueError(
            f"{folder}: {module} {findings[0]}, while {CONFIG} says mode {layer.mode!r}, side {layer.side!r}, "
            f"diagonal {layer.diagonal!r}, r {layer.r}, depth {layer.depth} for it. The two files do not belong "
            "together, or one is damaged."
        )


def layer_config(module: str, factors: Mapping[str, Tensor], config: DLoRConfig) -> DLoRConfig:
    """What the configuration has for the layer with these tensors, without its patterns."""
    return next(layer for layer in _for_layer(module, config) if _finding(factors, layer) is None)


def _for_layer(module: str, config: DLoRConfig) -> list[DLoRConfig]:
    """What the configuration may have for the tensors under that name: parameters of one module nest in any order."""
    name = module.replace(".base_layer", "")
    parameters = [parameter.rpartition(".") for parameter in config.target_parameters or ()]
    leaves = [leaf for owner, _, leaf in parameters if not owner or f".{name}".endswith(f".{owner}")]
    # a linear layer may be called like the owner of a parameter that is named alone
    return [config.for_layer(name), *(config.for_layer(f"{name}.{leaf}") for leaf in leaves)]


def _finding(factors: Mapping[str, Tensor], config: DLoRConfig) -> str | None:
    """What is wrong with the tensors of a layer that has this configuration."""
    expected = {"dlor_U", "dlor_V"} if config.r else set()
    if config.diagonal != "none":
        expected |= {"dlor_diag", "dlor_diag_in"} if config.side == "both" else {"dlor_diag"}
    if missing := sorted(expected - factors.keys()):
        return f"has no {', '.join(missing)}"
    if extra := sorted(factors.keys() - expected):
        return f"has {', '.join(extra)}"
    for name, tensor in factors.items():
        rank = 2 if name.startswith("dlor_diag") else 3
        is_of_rank = rank == 2 or tensor.shape[-1] == config.r
        is_scalar = rank == 3 or config.diagonal != "scalar" or tensor.shape[-1] == 1
        is_stack = tensor.ndim in (rank, rank + 1) and tensor.shape[0] == config.depth
        if not (is_of_rank and is_scalar and is_stack):
            return f"has a {name} of shape {tuple(tensor.shape)}"
    stacks = {tensor.shape[1 : -1 if "diag" in name else -2] for name, tensor in factors.items()}
    if len(stacks) > 1 or not _widths_agree(factors, config):
        return f"has {', '.join(f'a {name} of shape {tuple(tensor.shape)}' for name, tensor in factors.items())}"
    return None


def _widths_agree(factors: Mapping[str, Tensor], config: DLoRConfig) -> bool:
    """Whether one layer can have all of these, a convolution among them: V has a row for each tap of a channel."""
    width = {name: tensor.shape[-1 if "diag" in name else -2] for name, tensor in factors.items()}
    d, p, q = (width.get(name) for name in ("dlor_diag", "dlor_U", "dlor_V"))
    if p is None or q is None:
        return True
    if config.mode == "multiplicative" and p != q:
        return False
    if config.diagonal != "vector" or d is None:
        return True
    on_output, on_input = d == p, d > 0 and q % d == 0
    if config.mode == "multiplicative":
        return on_output
    if config.mode == "additive":
        return on_output or (d < p and on_input)
    if config.side == "both":
        d_in = width["dlor_diag_in"]
        return on_output and d_in > 0 and q % d_in == 0
    return {"output": on_output, "input": on_input}.get(config.side, on_output or on_input)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
