"""The one rounding of a merged weight, and how much of the update is left after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")


class Stochastic:
    """out <- one of the two values around each of `wide`, the nearer the likelier: right on average.

    E[out] = wide, exactly, with a generator of its own. Source: Gupta et al., arXiv 1502.02551.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, wide: Tensor, out: Tensor) -> None:
        out.copy_(wide)
        if out.dtype.itemsize >= wide.dtype.itemsize:
            return
        nearest = out.to(wide.dtype)
        error = wide - nearest
        # the neighbour on the other side: one step in the bits, which grow with the magnitude
        grows = (error > 0) == (nearest > 0)
        bits = out.contiguous().view(torch.int16)
        other = (bits + torch.where(grows, 1, -1).to(torch.int16)).view(out.dtype).to(wide.dtype)
        # around zero there is no smaller magnitude
        smallest = torch.tensor(1, dtype=torch.int16).view(out.dtype).to(wide.dtype)
        other = torch.where(nearest == 0, smallest.copysign(error), other)
        chance = torch.rand(wide.shape, generator=self._generator, dtype=wide.dtype)
        takes_other = (chance * (other - nearest).abs() < error.abs()) & other.isfinite()
        out.copy_(torch.where(takes_other, other, nearest))


@dataclass
class Survival:
    """Sums over the blocks of one weight, in float64: W before, D = W' - W wide, R = what is stored less W."""

    W_W: float = 0.0
    D_D: float = 0.0
    D_R: float = 0.0
    R_R: float = 0.0

    def look(self, before: Tensor, adapted: Tensor, stored: Tensor) -> None:
        D = (adapted - before).flatten()
        R = (stored.to(before.dtype) - before).flatten()
        W = before.flatten()
        sums = torch.stack([W.dot(W), D.dot(D), D.dot(R), R.dot(R)]).double().tolist()
        self.W_W, self.D_D = self.W_W + sums[0], self.D_D + sums[1]
        self.D_R, self.R_R = self.D_R + sums[2], self.R_R + sums[3]

    @property
    def update_ratio(self) -> float:
        """||D|| / ||W||."""
        return math.sqrt(self.D_D / self.W_W) if self.W_W else math.inf if self.D_D else 0.0

    @property
    def survived(self) -> float:
        """<R, D> / ||D||^2: the share of the update that is in the stored weight; 1 where there was no update.

        Rounding to the nearest drops what is smaller than half a step: below 1. Stochastic rounding keeps it on
        average.
        """
        return self.D_R / self.D_D if self.D_D else 1.0

    @property
    def rounding_error(self) -> float:
        """||R - D|| / ||D||."""
        return math.sqrt(max(0.0, self.R_R - 2 * self.D_R + self.D_D) / self.D_D) if self.D_D else 0.0
