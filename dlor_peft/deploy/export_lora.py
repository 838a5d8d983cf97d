"""A DLoR adapter as an ordinary LoRA: exactly where its form is one, and else to a rank with the error measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import low_rank
from .adapter import PREFIX, SavedAdapter
from .checkpoint import Checkpoint
from .export import Adapted, Source, write_adapter
from .tables import format_table
from .writing import new_folder

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's --max-lora-rank takes these (vllm/config/lora.py, MaxLoRARanks), and 1."""

MAX_ERROR = 0.1


@dataclass
class Fit:
    """How near a LoRA comes to the update of one layer.

    exact_rank  the rank at which it is the update, known from the form; None where there is no such rank up to 512
    update      ||Delta||_F^2
    sigma       the singular values that are known, largest first
    error       ||Delta - B A||_F^2 at the rank that was written
    """

    adapted: Adapted
    exact_rank: int | None
    update: float
    sigma: Tensor
    error: float = 0.0

    def is_exact_at(self, rank: int) -> bool:
        return self.exact_rank is not None and rank >= self.exact_rank

    def error_at(self, rank: int) -> float:
        if self.is_exact_at(rank):
            return 0.0
        return max(0.0, self.update - self.sigma[:rank].double().square().sum().item())


@dataclass
class LoraExport:
    """What a LoRA of the adapter would be, measured layer by layer; then `write` writes it.

    base        its configuration is read, and its weights where a form needs them, one at a time
    adapter     at scale 1
    r           the rank of all layers; where None, the smallest that is exact, or within max_error
    max_error   of all layers together, ||Delta - B A||_F / ||Delta||_F at most
    """

    base: Checkpoint
    adapter: SavedAdapter
    r: int | None = None
    max_error: float = MAX_ERROR
    fits: list[Fit] = field(init=False)
    foreign: list[str] = field(init=False, default_factory=list)
    """Modules that the base's files have not, or by another name than the LoRA."""

    def __post_init__(self) -> None:
        """Measure.

        Raises:
            ValueError: the adapter does not fit the base, holds what no LoRA can, or is farther from any allowed LoRA
                than max_error.
        """
        if self.r is not None and self.r not in RANKS:
            raise ValueError(f"r={self.r} is none of {', '.join(map(str, RANKS))}, which serving engines take.")
        if not 0 <= self.max_error < 1:
            raise ValueError(f"max_error={self.max_error} must be at least 0 and below 1: a share of the update.")
        self.source = Source(self.base, self.adapter)
        self.fits = [self._fit(layer) for layer in tqdm(self.source.layers, "measuring", unit="layer")]
        self._candidates = self._allowed_ranks()

    @property
    def error(self) -> float:
        """||Delta - B A||_F / ||Delta||_F over all layers, as written."""
        return _ratio(sum(fit.error for fit in self.fits), sum(fit.update for fit in self.fits))

    @property
    def is_exact(self) -> bool:
        """Whether it is the update by its form, whatever is lost to rounding."""
        return all(fit.is_exact_at(self.rank) for fit in self.fits)

    @property
    def rank(self) -> int:
        return self._candidates[0]

    def write(self, out: str | Path, overwrite: bool = False) -> None:
        """Write the adapter to the folder `out`.

        Raises:
            FileExistsError: the folder is there.
            OSError: it cannot be written; nothing is left of it.
            ValueError: no allowed rank comes near enough, or PEFT would read it as something else.
        """
        config = self.source.config(self.rank)
        names, self.foreign = self.source.names(config)
        with new_folder(out, overwrite, self.source.inputs) as folder:
            tensors = self._tensors_of_first_that_fits(names)
            if self.rank != config.r:
                config.r = config.lora_alpha = self.rank
            share = (
                "is the same update" if self.is_exact else f"differs from the update by {self.error:.1e} of its norm"
            )
            write_adapter(folder, self.source, config, tensors, f"It has rank {self.rank} and {share}.")
        self.base.close()

    def caveats(self) -> list[str]:
        """What reads the LoRA as PEFT does, and what does not."""
        found = []
        if self.foreign:
            found.append(
                f"PEFT reads it; vLLM, SGLang and llama.cpp, which go by the names in the base's files, may not know "
                f"{self.foreign[0]}{f' and {len(self.foreign) - 1} more' if len(self.foreign) > 1 else ''}"
            )
        tied = {name for names in self.source.skeleton.ties for name in names}
        if shared := [fit.adapted.module for fit in self.fits if f"{fit.adapted.module}.weight" in tied]:
            found.append(f"llama.cpp does not read it: {shared[0]} has no weight of its own in the base")
        return found

    def table(self) -> str:
        """One line a layer, and the whole."""
        rows = [["module", "form", "rank", "relative error"]]
        for fit in self.fits:
            form = fit.adapted.form
            what = " ".join(filter(None, (form.mode, form.side, f"diagonal {form.diagonal}")))
            is_exact = fit.is_exact_at(self.rank)
            rank = fit.exact_rank if is_exact else min(self.rank, len(fit.sigma))
            error = "0 (exact)" if is_exact else f"{_ratio(fit.error, fit.update):.2e}"
            rows.append([fit.adapted.module, what, str(rank), error])
        rows.append(["all", "", str(self.rank), "0 (exact)" if self.is_exact else f"{self.error:.2e}"])
        return format_table(rows)

    def _fit(self, adapted: Adapted) -> Fit:
        product = self._product(adapted)
        if product is not None:
            sigma = low_rank.singular_values(*product)
            # there may be more columns than the update has
            rank = min(product[0].shape[1], *_shape(adapted)) if sigma.any() else 0
            return Fit(adapted, rank if rank <= RANKS[-1] else None, sigma.square().sum().item(), sigma)
        delta = self._delta(adapted)
        update = low_rank.squared(delta)
        if not update:
            return Fit(adapted, 0, 0.0, delta.new_zeros(0))
        _, _, sigma = low_rank.nearest(delta, self.r or RANKS[-1])
        return Fit(adapted, None, update, sigma)

    def _product(self, adapted: Adapted) -> tuple[Tensor, Tensor] | None:
        """B and A where the update is B A, which is known before the weight is read."""
        gain = low_rank.gain(adapted.form, adapted.residual)
        if gain is None or gain.any():
            return None
        W = self.source.weights.matrix(adapted.module) if low_rank.reads_weight(adapted.form) else None
        return low_rank.product(adapted.form, adapted.residual, W)

    def _delta(self, adapted: Adapted) -> Tensor:
        W = self.source.weights.matrix(adapted.module)
        return adapted.form.delta_weight(adapted.residual, W)

    def _allowed_ranks(self) -> list[int]:
        update = sum(fit.update for fit in self.fits)
        errors = {rank: _ratio(sum(fit.error_at(rank) for fit in self.fits), update) for rank in RANKS}
        if self.r is not None:
            found = [self.r] if errors[self.r] <= self.max_error else []
        else:
            exact = max((fit.exact_rank for fit in self.fits if fit.exact_rank is not None), default=0)
            found = [rank for rank in RANKS if rank >= exact and errors[rank] <= self.max_error]
        if not found:
            self._refuse({self.r: errors[self.r]} if self.r is not None else errors)
        return found

    def _refuse(self, errors: dict[int, float]) -> None:
        worst = max(self.fits, key=lambda fit: fit.error_at(max(errors)))
        listed = ", ".join(f"rank {rank}: {error:.3f}" for rank, error in errors.items())
        raise ValueError(
            f"{self.adapter.source} is no LoRA of low rank: ||W' - W - B A|| / ||W' - W|| would be {listed}, and at "
            f"most {self.max_error:g} is allowed; {worst.adapted.module} is the farthest. A diagonal that was trained "
            f"makes an update of full rank. {'Raise --r, or accept' if self.r else 'Accept'} the error with "
            f"--max-error. {self.source.remedy}."
        )

    def _tensors_of_first_that_fits(self, names: dict[str, str]) -> dict[str, Tensor]:
        """What was estimated from singular values is measured on what is written."""
        while True:
            tensors = dict(self._tensors(self.rank, names))
            if self.error <= self.max_error:
                return tensors
            if len(self._candidates) == 1:
                self._refuse({self.rank: self.error})
            del self._candidates[0]

    def _tensors(self, rank: int, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        for fit in self.fits:
            B, A = self._factors(fit, rank)
            key = f"{PREFIX}{names[fit.adapted.module]}"
            yield f"{key}.lora_A.weight", F.pad(A, (0, 0, 0, rank - A.shape[0])).float()
            yield f"{key}.lora_B.weight", F.pad(B, (0, rank - B.shape[1])).float()

    def _factors(self, fit: Fit, rank: int) -> tuple[Tensor, Tensor]:
        if not fit.update:
            fit.error = 0.0
            O, I = _shape(fit.adapted)
            return torch.zeros(O, 0), torch.zeros(0, I)
        product = self._product(fit.adapted)
        if product is not None:
            fit.error = fit.error_at(rank)
            return product if product[0].shape[1] <= rank else low_rank.nearest_product(*product, rank)
        delta = self._delta(fit.adapted)
        B, A, _ = low_rank.nearest(delta, rank)
        fit.error = low_rank.squared(delta - B @ A)
        return B, A


def _shape(adapted: Adapted) -> tuple[int, int]:
    return adapted.form.out_features, adapted.form.in_features


def _ratio(error: float, update: float) -> float:
    return math.sqrt(error / update) if update else 0.0
