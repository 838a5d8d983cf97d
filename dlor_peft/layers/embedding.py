"""DLoR on embeddings.

As a layer, y = x W^T with one-hot x: W (embedding_dim, num_embeddings) is the transpose of what is stored. Factors on
the output side act on the embedding; on the input side they would mix tokens, so that side is refused. The low-rank
term gives each token a row of V (num_embeddings, r).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DLoRConfig
from ..form import Form
from ..kernels import update, without_autocast
from .activation import ActivationLayer


class _Tokens(NamedTuple):
    """One-hot inputs after dropout: the ids, and the factor 0 or 1 / (1 - p) of each."""

    ids: Tensor
    factor: Tensor | None


class Embedding(ActivationLayer):
    """DLoR on torch.nn.Embedding. Dropout drops the low-rank update of whole tokens."""

    @property
    def fan_in_fan_out(self) -> bool:
        return True

    def resolve_form(self, config: DLoRConfig, r: int, depth: int) -> Form:
        if self.get_base_layer().max_norm is not None:
            raise ValueError(
                "dlor_peft.layers.embedding: an embedding with max_norm rescales its rows when it is called, so that "
                "no adapter of its weight could be merged. Keep it out of target_modules, or set max_norm to None."
            )
        try:
            return Form.resolve(config, r, depth, self.in_features, self.out_features, ("output",))
        except ValueError as error:
            raise ValueError(
                f"dlor_peft.layers.embedding: the input features of an embedding are its tokens: {error}"
            ) from None

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """V = 0 and U standard normal, as LoRA starts embeddings: training changes the tokens that occur, only."""
        super().reset_parameters(adapter_name, init_weights)
        if self.r[adapter_name] and self.form[adapter_name].mode != "multiplicative":
            nn.init.normal_(self.dlor_U[adapter_name]())
            nn.init.normal_(self.dlor_V[adapter_name](), std=0 if init_weights else 1)

    def factor_names(self, adapter_name: str) -> tuple[str, str]:
        is_added = self.form[adapter_name].mode != "multiplicative"
        return ("dlor_V", "dlor_U") if is_added else super().factor_names(adapter_name)

    def _dropped(self, dropout: nn.Module, x: Tensor) -> Tensor | _Tokens:
        if x.is_floating_point():
            return dropout(x)
        active = isinstance(dropout, nn.Dropout) and dropout.training
        return _Tokens(x, dropout(torch.ones(*x.shape, 1, device=x.device)) if active else None)

    @staticmethod
    def _mix(acc: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # autocast leaves the dtype of what is looked up, on which that of all that follows depends
        with without_autocast(acc.device.type):
            return update(acc, *args, **kwargs)

    def _term(
        self,
        acc: Tensor,
        x: _Tokens,
        q: Tensor | None,
        U: Tensor | None = None,
        V: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        assert U is not None
        assert V is not None
        base, ids = self.get_base_layer(), x.ids
        update_of_token = F.embedding(ids, V, padding_idx=base.padding_idx).to(acc.dtype) @ U.mT.to(acc.dtype)
        if q is not None:
            # the rectangular identity maps the first tokens to a feature each
            m = min(self.in_features, self.out_features)
            feature = ids.clamp(max=m - 1).unsqueeze(-1)
            value = q.expand(m)[feature] * (ids < m).unsqueeze(-1)
            if base.padding_idx is not None:
                # as in F.embedding, the padding token is not trained
                value = torch.where(ids.unsqueeze(-1) == base.padding_idx, value.detach(), value)
            # under autocast the product has a dtype of its own
            update_of_token = update_of_token.scatter_add(-1, feature, value.to(update_of_token.dtype))
        if x.factor is not None:
            update_of_token = update_of_token * x.factor.to(acc.dtype)
        # some embeddings multiply what they look up
        embed_scale = getattr(base, "embed_scale", None)
        if embed_scale is not None:
            # a buffer or a number; PEFT's helper puts the number where the weight is, which may be offloaded
            factor = embed_scale.to(acc.dtype) if isinstance(embed_scale, Tensor) else embed_scale
            update_of_token = update_of_token * factor
        return acc + scale * update_of_token
