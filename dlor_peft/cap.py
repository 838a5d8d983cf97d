"""rho = ||U V^T||_2 / min|alpha|, kept below a limit by projection: alpha = 1 + delta of the maps that multiply W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import DLoRLayer, owned_adapters
from .layers.placement import overwrite, whole
from .maths import spectral_norm


class Capped(NamedTuple):
    """One adapter of one layer; its parameters are looked up anew each time, as sharding replaces them."""

    name: str
    layer: DLoRLayer
    adapter_name: str

    def parameter(self, part: str) -> nn.Parameter:
        return getattr(self.layer, part)[self.adapter_name].weight

    def value(self, part: str) -> Tensor:
        """In float64, gathered where it is sharded."""
        parameter = self.parameter(part)
        value = whole(parameter).detach()
        if tuple(value.shape) != self.layer.form[self.adapter_name].shapes[part]:
            raise ValueError(
                f"dlor_peft.cap: {part} of {self.name!r} has the shape {tuple(value.shape)} here: FSDP 1 or DeepSpeed "
                "ZeRO-3 holds a piece of it on each process, of which no norm can be taken. Use FSDP2 or DDP, or "
                "leave max_ratio out."
            )
        return value.double()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.layer.form[self.adapter_name].shapes


def limit_ratio(
    model: nn.Module, max_ratio: float, max_spread: float | None = None, adapter_name: str | None = None
) -> None:
    """U <- U min(1, max_ratio min|alpha| / ||U V^T||_2), for each factor alpha + U V^T, alpha = diag(1 + delta).

    It holds for forms whose update is a square map that multiplies the weight: mode "multiplicative", each factor of
    a stack and each expert by itself, and "scaled" with r = 0. In the others U V^T is added to the weight, whose
    condition number no ratio bounds: a ValueError.

    Guaranteed afterwards, at scale 1: rho <= max_ratio for every factor F, as float64 computes it from the parameters
    in their own dtype, and so

        cond(F) <= (s + max_ratio) / (1 - max_ratio),   s = max|alpha| / min|alpha|.

    W' of an L-fold stack has cond(W') <= cond(W) times the product over the stack. s is what training makes of it, and
    is not bounded unless `max_spread` is given: then delta is first clamped to [max_spread^-1/2 - 1, max_spread^1/2
    - 1], so that s <= max_spread. Where s is not bounded and an alpha becomes 0, U becomes 0.

    What holds already is not touched, bit for bit, so that a second call changes nothing. Only U is scaled, not V: V
    keeps its directions and its size, and U can grow again. In half precision U ends up to a few roundings below the
    limit. O((p + q) r^2) where the limit is near, and less where it is not. Of sharded parameters (FSDP2) all
    processes gather each one and write their shard.

    Args:
        model: with DLoR adapters.
        max_ratio: above 0 and below 1.
        max_spread: above 1.
        adapter_name: the adapter to limit; all that are trained where None.
    """
    check_limits(max_ratio, max_spread)
    project(capped_tensors(model, adapter_name), max_ratio, max_spread)


def check_limits(max_ratio: float, max_spread: float | None) -> None:
    if not 0 < max_ratio < 1:
        raise ValueError(
            f"dlor_peft.cap: max_ratio must be above 0 and below 1, but it is {max_ratio!r}: from 1 on a factor may "
            "be singular, and 0 is r=0. 0.5 allows a condition number of 3 where alpha is 1."
        )
    if max_spread is not None and not 1 < max_spread < float("inf"):
        raise ValueError(
            f'dlor_peft.cap: max_spread must be above 1 and finite, but it is {max_spread!r}. 1 is diagonal="none"; '
            "for no bound leave it out."
        )


def capped_tensors(model: nn.Module, adapter_name: str | None = None) -> list[Capped]:
    """What a limit applies to; ValueError where it would guarantee nothing."""
    capped = []
    for name, layer, adapter in owned_adapters(model):
        one = Capped(name, layer, adapter)
        if adapter_name not in (None, adapter):
            continue
        if adapter_name is None and not any(one.parameter(part).requires_grad for part in one.shapes):
            continue
        form = layer.form[adapter]
        if form.mode != "multiplicative" and (form.mode == "additive" or form.r):
            raise ValueError(
                f"dlor_peft.cap: max_ratio guarantees nothing for {name!r}, whose mode is {form.mode!r}: its "
                "update adds to the weight, and is no square map that multiplies it. Use "
                'mode="multiplicative" (for some layers, mode_pattern), or leave max_ratio out.'
            )
        capped.append(one)
    if not capped:
        which = "is trained" if adapter_name is None else f"is called {adapter_name!r}"
        raise ValueError(
            f"dlor_peft.cap: max_ratio is given, but no DLoR adapter of the model {which}. Leave max_ratio out, or "
            "name an adapter that is there."
        )
    return capped


@torch.no_grad()
def project(capped: Sequence[Capped], max_ratio: float, max_spread: float | None) -> None:
    """`limit_ratio` on what `capped_tensors` found."""
    near = []
    for one in capped:
        if max_spread is not None:
            _clamp(one, max_spread)
        limit = _limit(one, max_ratio)
        if "dlor_U" in one.shapes:
            near.append((one, limit, _is_clearly_within(one, limit)))
    # the first look at a result waits for the device, which then has all of them
    for one, limit, is_within in near:
        if not is_within:
            _shrink(one, limit)


def _clamp(one: Capped, max_spread: float) -> None:
    for part in one.shapes:
        if part.startswith("dlor_diag"):
            parameter = one.parameter(part)
            # towards 0, so that the rounding of a bound to the dtype stays inside
            inside = 1 - torch.finfo(parameter.dtype).eps
            low, high = ((max_spread**power - 1) * inside for power in (-0.5, 0.5))
            value = one.value(part)
            clamped = value.clamp(low, high).to(parameter.dtype)
            overwrite(parameter, clamped)


def _limit(one: Capped, max_ratio: float) -> Tensor:
    """max_ratio * min|alpha| (L,) or (L, E)."""
    if "dlor_diag" in one.shapes:
        return max_ratio * (1 + one.value("dlor_diag")).abs().amin(-1)
    U = one.parameter("dlor_U")
    return torch.full(U.shape[:-2], max_ratio, dtype=torch.float64, device=U.device)


def _is_clearly_within(one: Capped, limit: Tensor) -> Tensor:
    """Whether ||U V^T||_F, which is no less than ||U V^T||_2 and needs no decomposition, is below the limit."""
    U, V = one.value("dlor_U"), one.value("dlor_V")
    gram_U, gram_V = U.mT @ U, V.mT @ V
    squared = (gram_U * gram_V).sum((-2, -1))
    rounding = 1e-9 * squared + 1e-12 * gram_U.diagonal(0, -2, -1).sum(-1) * gram_V.diagonal(0, -2, -1).sum(-1)
    return (squared + rounding <= limit.square()).all()


def _shrink(one: Capped, limit: Tensor) -> None:
    U, V, parameter = one.value("dlor_U"), one.value("dlor_V"), one.parameter("dlor_U")
    if not (U.isfinite().all() and V.isfinite().all() and limit.isfinite().all()):
        raise ValueError(
            f"dlor_peft.cap: the adapter {one.adapter_name!r} of {one.name!r} is not finite: training has diverged, "
            "and no projection bounds it. Lower the learning rate, or warm it up."
        )
    norm = spectral_norm(U, V)
    is_over = norm > limit
    if not is_over.any():
        return
    margin = torch.finfo(parameter.dtype).eps / 8
    while True:
        # at a margin of 1 U is 0
        scale = torch.where(is_over, limit / norm * max(0.0, 1 - margin), 1.0)
        shrunk = (U * scale[..., None, None]).to(parameter.dtype)
        if (spectral_norm(shrunk.double(), V) <= limit).all():
            break
        margin *= 2
    overwrite(parameter, shrunk)
