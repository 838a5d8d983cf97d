"""A model's safetensors files, tensor by tensor, with little memory whatever their size."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .hub import SMALL_FILES, Folder, fetch_folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""What safetensors calls them."""

# how much of a mapped file may be in memory before it is mapped anew
_MAPPED = 2**26


class Spec(NamedTuple):
    """Where a tensor is, and what."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Checkpoint:
    """The tensors of a saved model by their names in its files, in the order in which they lie there."""

    def __init__(self, source: str | Path, revision: str | None = None, with_weights: bool = True) -> None:
        """Open a folder or repository.

        Args:
            source: the folder or repository.
            revision: of a repository.
            with_weights: find the weights now, and not when they are first asked for.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is damaged, or the model is quantised.
        """
        self.folder: Folder = fetch_folder(source, SMALL_FILES, revision)
        self.config: dict[str, Any] = self._read_json("config.json")
        self._open: Any = None
        self._path: Path | None = None
        self._mapped = 0
        if with_weights:
            _ = self.specs

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Name -> where the tensor is, and what. Raises as the constructor does."""
        source = self.folder.source
        quantization = self.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method is not None:
            raise ValueError(
                f"{source} is quantised ({method}): what an adapter adds would be rounded to its few levels. Name the "
                "unquantised original as the base."
            )
        if self.folder.revision is not None:
            self.folder = fetch_folder(source, (*SMALL_FILES, SINGLE), self.folder.revision)
        names = self._weight_files()
        if self.folder.revision is not None and names != [SINGLE]:
            self.folder = fetch_folder(source, (*SMALL_FILES, *names), self.folder.revision)
        return {key: spec for name in names for key, spec in self._read_specs(self.folder.path / name).items()}

    def read(self, key: str) -> Tensor:
        """The tensor of that name; its memory is that of the file."""
        spec = self.specs[key]
        if self._path != spec.file or self._mapped > _MAPPED:
            self.close()
            self._open, self._path, self._mapped = safe_open(spec.file, framework="pt"), spec.file, 0
        self._mapped += spec.num_bytes
        return self._open.get_tensor(key)

    def read_empty(self, key: str) -> Tensor:
        """Its shape and dtype, on the meta device."""
        return self.specs[key].empty()

    def close(self) -> None:
        """Let go of the file that was read last."""
        self._open = self._path = None

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder.source} is not a saved model: it has no {name}.")
        with suppress(ValueError, RecursionError):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
        raise ValueError(f"{path} is damaged: no JSON object. Save or download the model again.")

    def _weight_files(self) -> list[str]:
        folder = self.folder.path
        # where there are both, transformers loads the single file
        if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map of names.")
            names = sorted(set(weight_map.values()))
            others = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
            if others:
                raise ValueError(
                    f"{folder / INDEX} names {others[0]!r}, which is outside of the folder or no safetensors file."
                )
            return names
        return [SINGLE]

    def _read_specs(self, path: Path) -> dict[str, Spec]:
        if not path.is_file():
            pickled = " Pickled weights are never read." if any(path.parent.glob("pytorch_model*.bin")) else ""
            raise FileNotFoundError(
                f"{self.folder.source} has no {path.name}.{pickled} Save the model with transformers' save_pretrained."
            )
        try:
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.offset_keys()}
                return {key: Spec(path, tuple(s.get_shape()), DTYPES[s.get_dtype()]) for key, s in slices.items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged or truncated ({error}). Download or copy it again.") from error
        except KeyError as error:
            raise ValueError(f"{path} holds tensors of the type {error}, which cannot be adapted.") from None
