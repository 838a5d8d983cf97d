"""The one rounding of a merged weight, and how much of the update is left after it."""

from __future__ import annotations

import math
import zlib
from dataclasses import astuple, dataclass

import torch

from ..blocks import Block, round_to_nearest

ROUNDINGS = ("nearest", "stochastic")


def round_stochastically(block: Block, seed: int) -> None:
    """out <- one of the two values around each of `adapted`, the nearer the likelier: right on average.

    E[out] = adapted, exactly. Equal seeds and places give equal draws. Source: Gupta et al., arXiv 1502.02551.
    """
    round_to_nearest(block)
    wide, out = block.adapted, block.out
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
    generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, block.at)).encode()))
    chance = torch.rand(wide.shape, generator=generator, dtype=wide.dtype)
    takes_other = (chance * (other - nearest).abs() < error.abs()) & other.isfinite()
    out.copy_(torch.where(takes_other, other, nearest))


@dataclass
class Survival:
    """Sums over a weight, in float64: W before, D = W' - W before rounding, R = what is stored less W."""

    W_W: float = 0.0
    D_D: float = 0.0
    D_R: float = 0.0
    R_R: float = 0.0

    @classmethod
    def of_block(cls, block: Block) -> Survival:
        W = block.before.flatten()
        D = (block.adapted - block.before).flatten()
        R = (block.out.to(block.before.dtype) - block.before).flatten()
        return cls(*torch.stack([W.dot(W), D.dot(D), D.dot(R), R.dot(R)]).double().tolist())

    def __add__(self, other: Survival) -> Survival:
        sums = zip(astuple(self), astuple(other), strict=True)
        return Survival(*(mine + theirs for mine, theirs in sums))

    @property
    def is_finite(self) -> bool:
        """Whether all of W' is, and of what is stored."""
        return all(map(math.isfinite, astuple(self)))

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
