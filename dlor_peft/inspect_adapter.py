"""`dlor inspect`: what is stored in a saved DLoR adapter, read from its JSON and safetensors files alone."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FACTS = (
    "mode",
    "mode_pattern",
    "side",
    "side_pattern",
    "diagonal",
    "r",
    "depth",
    "base_model_name_or_path",
    "dlor_version",
)
TENSORS = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
_KEY = re.compile(rf"(?:base_model\.model\.)?(?P<module>.+)\.(?P<tensor>{'|'.join(TENSORS)})\.weight")


@dataclasses.dataclass
class Layer:
    """One adapted module: diagonals (depth, d), dlor_U (depth, p, r) and dlor_V (depth, q, r)."""

    module: str
    tensors: dict[str, Tensor]

    @property
    def depth(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def r(self) -> int:
        return self.tensors["dlor_U"].shape[-1] if "dlor_U" in self.tensors else 0

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def row(self) -> list[str]:
        """The layer's line of the table."""
        diagonals = [tensor for name, tensor in self.tensors.items() if name.startswith("dlor_diag")]
        delta = max((tensor.float().abs().max().item() for tensor in diagonals), default=None)
        norms = [
            tensor.float().norm().item() if (tensor := self.tensors.get(n)) is not None else None for n in TENSORS[2:]
        ]
        shapes = [f"{name.removeprefix('dlor_')} {'x'.join(map(str, t.shape))}" for name, t in self.tensors.items()]
        numbers = ["-" if number is None else f"{number:.3g}" for number in (delta, *norms)]
        return [self.module, str(self.r), str(self.depth), f"{self.num_parameters:,}", *numbers, ", ".join(shapes)]


def inspect_adapter(folder: str | Path) -> str:
    """The report: config facts, a table with one line a layer, totals.

    delta is the largest absolute entry of the diagonals: how far they moved from "no change". U and V are Frobenius
    norms.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is damaged, or the adapter is not a DLoR adapter.
    """
    folder = Path(folder)
    config = _read_config(folder)
    layers, others = _read_layers(folder)
    header = ["module", "r", "depth", "parameters", "max |delta|", "||U||", "||V||", "shapes"]
    facts = [f"{name}: {config[name]}" for name in FACTS if config.get(name) not in (None, {})]
    num_parameters = sum(layer.num_parameters for layer in layers)
    lines = [*facts, "", format_table([header, *(layer.row() for layer in layers)]), ""]
    lines.append(f"{len(layers)} layers, {num_parameters:,} parameters in DLoR tensors")
    if others:
        names = ", ".join(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in others.items())
        lines.append(f"{sum(tensor.numel() for tensor in others.values()):,} parameters saved in full: {names}")
    return "\n".join(lines)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, text to the left and numbers to the right; the first row is the header."""
    columns = list(zip(*rows, strict=True))
    numeric = [all(cell == "-" or cell[0].isdigit() for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Iterable[str]) -> str:
        aligned = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(rows[0]), *(line(row) for row in rows[1:])])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        problem = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"{folder} is not a saved adapter: {problem}. Give the folder that save_pretrained wrote."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: not valid JSON ({error}). Save the adapter again.") from error
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type != "DLOR":
        raise ValueError(f"{folder} is not a DLoR adapter: its peft_type is {peft_type!r}, not 'DLOR'.")
    return config


def _read_layers(folder: Path) -> tuple[list[Layer], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        hint = " Pickled weights are never read." if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}.{hint} Save the adapter again with save_pretrained.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). Save or copy the adapter again.") from error
    layers: dict[str, Layer] = {}
    others = {}
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            layer = layers.setdefault(match["module"], Layer(match["module"], {}))
            layer.tensors[match["tensor"]] = tensor
        else:
            others[key.removeprefix("base_model.model.")] = tensor
    if not layers:
        raise ValueError(f"{path} holds no DLoR tensors: no key ends in {', '.join(f'{n}.weight' for n in TENSORS)}.")
    return sorted(layers.values(), key=lambda layer: _natural(layer.module)), others


def _natural(name: str) -> list[tuple[int, str]]:
    # layer 2 before layer 10
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
