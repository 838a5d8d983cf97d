"""Input embeddings that other layers are tied to: with `ensure_weight_tying` they are adapted, or trained, as one."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .config import DLoRConfig
from .layers import DLoRLayer


class TyingTuner(BaseTuner):
    """The part of a DLoR model that keeps tied layers tied."""

    _tied_to_embedding: list[str] | None = None

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT finds them by the names of their parameters, which are others once the layers are wrapped
        if self._tied_to_embedding is None:
            self._tied_to_embedding = super()._get_module_names_tied_with_embedding()
        return self._tied_to_embedding

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        config = cast(DLoRConfig, peft_config)
        tied = self._get_module_names_tied_with_embedding() if config.ensure_weight_tying else []
        if tied:
            # PEFT knows the input embedding by two names only
            group = (*tied, self._input_embedding_name())
            if any(f".{key}".endswith(f".{name}") for key in group for name in config.modules_to_save or ()):
                return self._add_modules_to_save_to_tie(config, tied)
            if any(self._check_target_module_exists(config, key) for key in group):
                return self._add_targets_to_tie(config, tied)
        return super()._check_tied_modules(model, peft_config)

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Adapt the input embedding; the layers tied to it will share its adapter."""
        config = cast(DLoRConfig, peft_config)
        # an earlier adapter has moved the weight into its base layer
        config.target_modules_to_tie = {key.removesuffix(".base_layer") for key in tied_weight_keys}
        embedding = self._input_embedding_name()
        if isinstance(config.target_modules, str):
            config.target_modules = f"({config.target_modules})|{re.escape(embedding)}"
        else:
            config.target_modules = {*(config.target_modules or ()), embedding}  # pyright: ignore

    def _add_modules_to_save_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Train the input embedding in full; the layers tied to it will share the trained weight."""
        config = cast(DLoRConfig, peft_config)
        config.modules_to_tie = {key.removesuffix(".base_layer") for key in tied_weight_keys}
        embedding = self._input_embedding_name()
        others = [
            name
            for name in config.modules_to_save or ()
            if not any(f".{key}".endswith(f".{name}") for key in (*tied_weight_keys, embedding))
        ]
        config.modules_to_save = [*others, embedding]

    def _input_embedding_name(self) -> str:
        embedding = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        return next(name for name, module in self.model.named_modules() if module is embedding)


def tied_source(tuner: BaseTuner, config: DLoRConfig, adapter_name: str, key: str) -> DLoRLayer | None:
    """The input embedding, where the layer of that name shares its adapter."""
    if not tuner._check_tied_module_exists(config, key):
        return None
    embedding = tuner.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(embedding, DLoRLayer) or adapter_name not in embedding.form:
        raise ValueError(
            f"dlor_peft.tying: ensure_weight_tying ties {key!r} to the adapter of the input embedding, which has "
            "none. Do not exclude the embedding, or set ensure_weight_tying=False."
        )
    return embedding


def restore_kind(wrapper: ModulesToSaveWrapper, adapter_name: str) -> None:
    """Make what is trained in the place of a tied layer of its kind: PEFT puts a linear layer without bias there."""
    original, trained = cast(Any, wrapper.original_module), cast(Any, wrapper.modules_to_save[adapter_name])
    wrapper.modules_to_save[adapter_name] = copy.deepcopy(original, {id(original.weight): trained.weight})
    wrapper.modules_to_save[adapter_name].requires_grad_(trained.weight.requires_grad)
