"""The form of adapter for one matrix: the candidates, fitted to an update, and the choice between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import DLoRConfig
from ..maths import alignment_index
from ..nearest import Nearest, lora_residuals, nearest

TIE = 0.01
"""Residuals that differ by less than this share are taken for equal."""

NEGLIGIBLE = 1e-3
"""So are residuals that differ by less than this share of the update."""

_PARTS = {"dlor_diag": "q", "dlor_diag_in": "q_in", "dlor_U": "U", "dlor_V": "V"}


@dataclass(frozen=True)
class Wanted:
    """What is asked of every layer.

    r         rank; on a matrix with a dimension below it, that dimension
    mode      "additive", "scaled", "multiplicative", or "auto" for the nearest of them
    side      "input", "output", "both", or "auto" for the nearest of them
    diagonal  "vector", "scalar" or "none"
    """

    r: int
    mode: str = "auto"
    side: str = "auto"
    diagonal: str = "vector"

    def __post_init__(self) -> None:
        # says what is allowed, and which combinations have no meaning
        mode = ("multiplicative" if self.diagonal == "none" else "scaled") if self.mode == "auto" else self.mode
        DLoRConfig(r=self.r, mode=mode, side=self.side, diagonal=self.diagonal)

    def candidates(self, O: int, I: int) -> list[tuple[str, str | None]]:
        """Pairs of mode and side for a weight (O, I).

        The multiplicative form is one for the smaller side alone, unless it is asked for: on the other side, and on a
        square weight, it reaches what the scaled form of that side reaches, with as many parameters or more.
        """
        smaller = "output" if O < I else "input"
        found: list[tuple[str, str | None]] = []
        if self.mode in ("auto", "scaled"):
            sides = (None,) if self.diagonal == "none" else ("output", "input", "both")
            found += [("scaled", side) for side in sides if side is None or self.side in ("auto", side)]
        if self.mode == "additive" or (self.mode == "auto" and self.diagonal != "none" and self.side == "auto"):
            found.append(("additive", None))
        if self.mode == "multiplicative":
            found.append(("multiplicative", smaller if self.side == "auto" else self.side))
        elif self.mode == "auto" and O != I and self.side in ("auto", smaller):
            found.append(("multiplicative", smaller))
        return found


class Fitted(NamedTuple):
    """One layer's part of an adapter, and what it is worth."""

    mode: str
    side: str | None
    r: int
    tensors: dict[str, Tensor]
    """As an adapter stores them, in float32 on the CPU."""
    shape: tuple[int, int]
    change: float
    """||delta||_F / ||W||_F."""
    size: float
    """||delta||_F."""
    residual: float
    lora_residual: float
    """LoRA's with as many parameters."""
    num_parameters: int
    row_alignment: float
    column_alignment: float

    @property
    def form(self) -> str:
        return self.mode if self.side is None else f"{self.mode} {self.side}"


@torch.no_grad()
def fit(delta: Tensor, W: Tensor, wanted: Wanted) -> Fitted:
    """The adapter for W' = W + delta, of the candidate with the smallest residual once parameters are accounted for.

    Scaled and additive forms differ in their diagonals, which cost parameters: the one is chosen whose squared
    residual, less that of LoRA with as many parameters, is the smallest. A further diagonal must so bring more than
    LoRA gets for its parameters. The multiplicative form has a smaller U or V, and is contained in a scaled one: it
    is chosen where its residual is the same up to TIE or NEGLIGIBLE.
    """
    r = min(wanted.r, *W.shape)
    forms = wanted.candidates(*W.shape)
    fits = {(mode, side): nearest(delta, W, r, mode, side, wanted.diagonal) for mode, side in forms}
    numbers = [found.num_parameters for found in fits.values()]
    lora = dict(zip(fits, lora_residuals(delta, numbers), strict=True))
    products = [form for form in forms if form[0] == "multiplicative"]
    sums = [form for form in forms if form[0] != "multiplicative"]
    chosen = min(sums or products, key=lambda form: fits[form].residual ** 2 - lora[form] ** 2)
    limit = max(fits[chosen].residual * (1 + TIE), fits[chosen].residual + NEGLIGIBLE)
    chosen = next((form for form in products if fits[form].residual <= limit), chosen)
    found, size = fits[chosen], torch.linalg.norm(delta).item()
    return Fitted(
        *chosen,
        r,
        _stored(found),
        (W.shape[0], W.shape[1]),
        size / (torch.linalg.norm(W).item() or 1.0),
        size,
        found.residual,
        lora[chosen],
        found.num_parameters,
        alignment_index(delta, W).item(),
        alignment_index(delta.mT, W.mT).item(),
    )


def _stored(found: Nearest) -> dict[str, Tensor]:
    parts = {name: getattr(found, part) for name, part in _PARTS.items()}
    return {
        name: part[None].to("cpu", torch.float32).contiguous()
        for name, part in parts.items()
        if part is not None and part.numel()
    }
