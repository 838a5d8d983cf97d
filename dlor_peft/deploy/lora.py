"""A saved LoRA adapter, read and checked: what it adds to each weight, or an error that says why DLoR has no equal.

Shapes: A (r, I), B (O, r); of a convolution A (r, I, *kernel), B (O, r, 1, ...); of an embedding I are the tokens; of
E experts A (E r, I), B (O, r E) with the expert the outer index of A and the inner one of B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from .adapter import PREFIX, WEIGHTS, damaged_config, natural, read_fields, read_tensors
from .hub import SMALL_FILES, fetch_folder

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<tensor>lora_(A|B)\.weight|lora_embedding_(A|B)|lora_magnitude_vector(\.weight)?)"
)
_LORA = re.compile(r"\.lora_[^.]+(\.[^.]+)?$")

# field -> why the adapter is no sum of a weight and a product
_VARIANTS = {
    "use_qalora": "QA-LoRA pools the inputs of lora_A",
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation only",
    "use_bdlora": "BD-LoRA stores blocks of its factors",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA changes the base weights as well",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "layer_replication": "it copies layers of the base",
    "megatron_config": "it is for layers of Megatron",
    "lora_bias": "lora_B has a bias, for which DLoR has no place: set lora_bias=False in the training",
}
# these subtract what they start with from the base weights, which the adapter does not hold
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "lora_ga", "loftq")


@dataclass(frozen=True)
class Low:
    """W' = W + scaling B A on one module, or diag(magnitude / ||W'||) W' for DoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    r: int
    scaling: float
    is_embedding: bool

    @property
    def is_conv(self) -> bool:
        return self.A.ndim > 2

    @property
    def num_experts(self) -> int:
        return self.A.shape[0] // self.r


@dataclass(frozen=True)
class SavedLora:
    """The names are those in the file, without PEFT's prefix; `others` is what is saved in full."""

    source: str
    folder: Path
    revision: str | None
    config: LoraConfig
    tensors: Mapping[str, Tensor]

    @property
    def others(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not _KEY.fullmatch(name)}

    @property
    def layers(self) -> dict[str, Low]:
        """Module -> its factors. ValueError where they are not those of the configuration."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if match := _KEY.fullmatch(name):
                found.setdefault(match["module"], {})[match["tensor"].removesuffix(".weight")] = tensor
        return {module: self._low(module, found[module]) for module in sorted(found, key=natural)}

    def _low(self, module: str, parts: dict[str, Tensor]) -> Low:
        is_embedding = "lora_embedding_A" in parts
        A, B = (parts.get(f"lora_embedding_{x}" if is_embedding else f"lora_{x}") for x in "AB")
        config = self.config
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), module), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        magnitude = parts.get("lora_magnitude_vector")
        is_of_parameter = bool(config.target_parameters)
        if A is None or B is None or not _fit(A, B, r, is_of_parameter):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
            raise ValueError(
                f"{self.source}: {module} has {shapes}, while its configuration says r={r} for it. The two files do "
                "not belong together, or one is damaged."
            )
        if config.use_dora != (magnitude is not None):
            raise ValueError(
                f"{self.source}: {module} has {'a' if magnitude is not None else 'no'} magnitude, while its "
                f"configuration says use_dora={config.use_dora}. The two files do not belong together."
            )
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        return Low(A, B, magnitude, r, scaling, is_embedding)


def _fit(A: Tensor, B: Tensor, r: int, is_of_parameter: bool) -> bool:
    rows = A.shape[0]
    return A.ndim == B.ndim >= 2 and rows == B.shape[1] and (rows == r or (is_of_parameter and rows % r == 0))


def read_lora(source: str | Path, revision: str | None = None, subfolder: str | None = None) -> SavedLora:
    """The LoRA or DoRA adapter in a folder or repository; only JSON and safetensors are read.

    Raises:
        OSError: the folder, repository or one of the two files is missing or cannot be read.
        ValueError: a file is damaged; the adapter is of another method, or of a variant that is no LoRA; a tensor
            holds NaN or infinity.
    """
    folder = fetch_folder(source, (*SMALL_FILES, WEIGHTS), revision, subfolder)
    read_fields(folder.path, "LORA", "LoRA")
    try:
        # warns of fields that this version of PEFT does not know
        config = LoraConfig.from_pretrained(str(folder.path))
    except Exception as error:
        raise damaged_config(folder.path, error) from error
    assert isinstance(config, LoraConfig)
    _refuse_variants(folder.source, config)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in read_tensors(folder.path / WEIGHTS).items()}
    strange = [name for name in tensors if _LORA.search(name) and not _KEY.fullmatch(name)]
    if strange:
        raise ValueError(f"{folder.source} holds {strange[0]}, which is no part of a LoRA that DLoR has a form for.")
    if not any(map(_KEY.fullmatch, tensors)):
        raise ValueError(f"{folder.source} holds no LoRA tensors: no key ends in lora_A.weight.")
    return SavedLora(folder.source, folder.path, folder.revision, config, tensors)


def _refuse_variants(source: str, config: LoraConfig) -> None:
    for name, reason in _VARIANTS.items():
        if getattr(config, name, None):
            raise ValueError(f"{source} cannot be converted: {name} is set, and {reason}.")
    start = str(config.init_lora_weights).lower()
    if start.startswith("loftq"):
        raise ValueError(
            f"{source} cannot be converted: LoftQ replaced the base weights by quantised ones, and the adapter is "
            "relative to those."
        )
    if start.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{source} cannot be converted: init_lora_weights={config.init_lora_weights!r} took what it started with "
            "out of the base weights, and the adapter is relative to what was left. Save it from PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) first, which makes it a plain LoRA."
        )
