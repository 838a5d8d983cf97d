"""A DLoR adapter as a DoRA, exactly.

PEFT's DoRA is W' = diag(m / n) (W + B A), n_i = ||(W + B A)_i||. So diag(D) W + B' A with D = 1 + gain > 0 is one with
B = D^-1 B' and m_i = ||(diag(D) W + B' A)_i||. Source: Liu et al., arXiv 2402.09353, and peft/tuners/lora/dora.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from . import low_rank
from .adapter import PREFIX, SavedAdapter
from .checkpoint import Checkpoint
from .export import Adapted, Source, write_adapter
from .writing import new_folder


class DoraExport:
    """What a DoRA of the adapter is; `write` writes it."""

    def __init__(self, base: Checkpoint, adapter: SavedAdapter) -> None:
        """Check that it is one.

        Raises:
            ValueError: the adapter does not fit the base, holds what no DoRA can, or has another form.
        """
        self.source = Source(base, adapter)
        for layer in self.source.layers:
            self._gain(layer)
        self.rank = max(1, *(layer.residual.U.shape[1] for layer in self.source.layers))

    @property
    def num_layers(self) -> int:
        return len(self.source.layers)

    def write(self, out: str | Path, overwrite: bool = False) -> None:
        """Write the adapter to the folder `out`; errors as `LoraExport.write`, or a row of W' is zero."""
        config = self.source.config(self.rank, use_dora=True)
        names, _ = self.source.names(config)
        with new_folder(out, overwrite, self.source.inputs) as folder:
            tensors = dict(self._tensors(names))
            text = f"It has rank {self.rank} and is the same update. vLLM, SGLang and llama.cpp read no DoRA."
            write_adapter(folder, self.source, config, tensors, text)
        self.source.base.close()

    def _gain(self, layer: Adapted) -> Tensor:
        gain = low_rank.gain(layer.form, layer.residual)
        form = layer.form
        if gain is None:
            raise ValueError(
                f"{layer.module} is no DoRA: mode {form.mode!r}{f', side {form.side!r}' if form.side else ''} with a "
                f"trained diagonal {form.diagonal!r}. Those with a diagonal on the outputs are: mode 'scaled' or "
                f"'multiplicative' with side 'output', and all others where the diagonal is 'none', not trained, or, "
                f"on the inputs, 'scalar'. {self.source.remedy}."
            )
        if (gain <= -1).any():
            row = int((gain <= -1).nonzero()[0])
            raise ValueError(
                f"{layer.module} is no DoRA: row {row} of its weight is scaled by {1 + gain[row].item():.4g}, and the "
                f"magnitudes of a DoRA are positive. {self.source.remedy}."
            )
        return gain

    def _tensors(self, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        for layer in self.source.layers:
            W = self.source.weights.matrix(layer.module)
            D = 1 + self._gain(layer)
            B, A = low_rank.product(layer.form, layer.residual, W)
            magnitude = (D[:, None] * W + B @ A).norm(dim=1)
            if not magnitude.all():
                raise ValueError(
                    f"{layer.module} is no DoRA: row {int((magnitude == 0).nonzero()[0])} of its adapted weight is "
                    f"zero, and a DoRA divides by its norm. {self.source.remedy}."
                )
            key, more = f"{PREFIX}{names[layer.module]}", self.rank - A.shape[0]
            yield f"{key}.lora_A.weight", F.pad(A, (0, 0, 0, more))
            yield f"{key}.lora_B.weight", F.pad(B / D[:, None], (0, more))
            yield f"{key}.lora_magnitude_vector", magnitude
