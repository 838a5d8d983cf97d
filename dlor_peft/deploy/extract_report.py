"""What an extraction found, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..inspect_adapter import format_table
from .fitting import TIE, Fitted

HEADER = ["module", "shape", "changed by", "form", "r", "parameters", "residual", "LoRA's", "rows", "columns"]


class Left(NamedTuple):
    """A tensor that changed and is not extracted."""

    name: str
    kind: str
    change: float | None
    """||tuned - base||_F / ||base||_F, where the two have one shape."""
    reason: str


class Report(NamedTuple):
    """The layers of the adapter, what else changed, and what is saved in full."""

    layers: Mapping[str, Fitted]
    left: Sequence[Left]
    saved: Sequence[str]
    num_unchanged: int

    @property
    def residual(self) -> float:
        """Of all layers together: the root of the summed squares, by those of the updates."""
        return self._total([layer.residual for layer in self.layers.values()])

    @property
    def lora_residual(self) -> float:
        """The same for LoRA with as many parameters on each layer."""
        return self._total([layer.lora_residual for layer in self.layers.values()])

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values())

    def _total(self, residuals: Sequence[float]) -> float:
        sizes = [layer.size for layer in self.layers.values()]
        left = math.hypot(*(residual * size for residual, size in zip(residuals, sizes, strict=True)))
        return left / math.hypot(*sizes)

    def verdict(self) -> str:
        """Whether DLoR pays for this model."""
        ours, theirs = self.residual, self.lora_residual
        told = f"residual {ours:.4f}, LoRA of as many parameters {theirs:.4f}"
        if ours < theirs * (1 - TIE):
            return f"{told}: DLoR leaves {1 - ours / theirs:.1%} less of the updates over, it pays for this model"
        if theirs < ours * (1 - TIE):
            return f"{told}: LoRA leaves {1 - theirs / ours:.1%} less of the updates over, use LoRA for this model"
        return f"{told}: there is little between them, DLoR does not pay for this model"

    def text(self) -> str:
        """The table, one line a layer; what was not extracted; the totals."""
        lines = [format_table([HEADER, *(_row(name, layer) for name, layer in self.layers.items())]), ""]
        for item in self.left:
            change = item.reason if item.change is None else f"changed by {item.change:.3g}"
            lines.append(f"not extracted: {item.name} ({item.kind}): {change}")
        if self.saved:
            lines.append(f"saved in full: {', '.join(self.saved)}")
        lines.append(
            f"{len(self.layers)} layers, {self.num_parameters:,} parameters in DLoR tensors; {self.num_unchanged} "
            "linear layers did not change"
        )
        lines.append(self.verdict())
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        numbers = (
            "change", "residual", "lora_residual", "num_parameters", "row_alignment", "column_alignment", "mode",
            "side", "r", "shape",
        )  # fmt: skip
        return {
            "layers": {name: {key: getattr(layer, key) for key in numbers} for name, layer in self.layers.items()},
            "not_extracted": [item._asdict() for item in self.left],
            "saved": list(self.saved),
            "residual": self.residual,
            "lora_residual": self.lora_residual,
            "num_parameters": self.num_parameters,
        }


def _row(name: str, layer: Fitted) -> list[str]:
    O, I = layer.shape
    return [
        name,
        f"{O}x{I}",
        f"{layer.change:.3g}",
        layer.form,
        str(layer.r),
        f"{layer.num_parameters:,}",
        f"{layer.residual:.4f}",
        f"{layer.lora_residual:.4f}",
        f"{layer.row_alignment:.3g}",
        f"{layer.column_alignment:.3g}",
    ]
