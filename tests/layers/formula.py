"""W' by the table of DESIGN.md section 1, in float64 and differentiable; and what the tests of all layers share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny_models import FORMS
from torch import Tensor, nn

from dlor_peft import DLoRConfig, DLoRLayer

PARTS = ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
HALF_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def configure(form: str | dict[str, Any], **changes: Any) -> DLoRConfig:
    fields = FORMS[form] if isinstance(form, str) else form
    return DLoRConfig(**{"r": 3, "target_modules": ["layer"], "init_weights": False, **fields, **changes})


def adapt(base: nn.Module, form: str | dict[str, Any] = "scaled", seed: int = 1, **changes: Any) -> PeftModel:
    """A model in eval mode whose only child is `layer`, with an adapter "default" that is not the identity."""
    net = nn.Sequential(OrderedDict(layer=base))
    torch.manual_seed(seed)
    return get_peft_model(net, configure(form, **changes)).eval()


def add(model: PeftModel, name: str, form: str | dict[str, Any], seed: int = 2, **changes: Any) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, configure(form, **changes))
    model.eval()


def activate(model: PeftModel, *names: str) -> None:
    model.base_model.set_adapter(list(names))


def layers(model: nn.Module) -> list[DLoRLayer]:
    return [module for module in model.modules() if isinstance(module, DLoRLayer)]


def stored(layer: DLoRLayer, name: str = "default") -> dict[str, Tensor]:
    return {part: getattr(layer, part)[name].weight for part in PARTS if name in getattr(layer, part)}


def copies(layer: DLoRLayer, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors as leaves in float64."""
    return {part: tensor.detach().double().clone().requires_grad_() for part, tensor in stored(layer, name).items()}


def smaller_side(form: str, O: int, I: int) -> str:
    side = FORMS[form].get("side", "auto")
    if side != "auto":
        return side
    return "output" if O < I else "input"


def formula(
    W: Tensor, tensors: dict[str, Tensor], mode: str, side: str, scale: float = 1.0, centre: int = 0
) -> Tensor:
    """W' of W (O, I), or of a kernel W (O, I, taps) whose identity stands on the tap `centre`."""
    if W.dim() == 2:
        return formula(W.unsqueeze(-1), tensors, mode, side, scale).squeeze(-1)
    W = W.double()
    O, I, _ = W.shape
    some = next(iter(tensors.values()))

    def low_rank(k: int) -> Tensor | float:
        return tensors["dlor_U"][k] @ tensors["dlor_V"][k].T if "dlor_U" in tensors else 0.0

    def diagonal(part: str, k: int, size: int) -> Tensor:
        return tensors[part][k].expand(size) if part in tensors else W.new_zeros(size)

    if mode == "multiplicative":
        size = I if side == "input" else O
        P = torch.eye(size, dtype=W.dtype)
        for k in range(some.shape[0]):
            P = (torch.diag(1 + diagonal("dlor_diag", k, size)) + low_rank(k)) @ P
        full = torch.einsum("oit,ij->ojt", W, P) if side == "input" else torch.einsum("po,oit->pit", P, W)
        return W + scale * (full - W)
    update = torch.zeros_like(W)
    if "dlor_U" in tensors:
        update = low_rank(0).reshape(W.shape)
    if mode == "additive":
        identity = torch.zeros_like(W)
        n = min(O, I)
        identity[torch.arange(n), torch.arange(n), centre] = diagonal("dlor_diag", 0, n)
        return W + scale * (identity + update)
    left = diagonal("dlor_diag", 0, O) if side in ("output", "both") else W.new_zeros(O)
    right = diagonal("dlor_diag" if side == "input" else "dlor_diag_in", 0, I) if side != "output" else W.new_zeros(I)
    full = torch.einsum("o,oit,i->oit", 1 + left, W, 1 + right) + update
    return W + scale * (full - W)


def stacked_formula(
    weight: Tensor, tensors: dict[str, Tensor], form: str, is_transposed: bool = False, scale: float = 1.0
) -> Tensor:
    """W' as it is stored; the dimension after the stack's is the expert's."""
    weight = weight.detach().double()
    if weight.dim() == 2:
        return formula(weight, tensors, FORMS[form]["mode"], smaller_side(form, *weight.shape), scale)
    if is_transposed:
        return stacked_formula(weight.mT, tensors, form, scale=scale).mT
    each = [{part: tensor[:, e] for part, tensor in tensors.items()} for e in range(len(weight))]
    return torch.stack([stacked_formula(W, own, form, scale=scale) for W, own in zip(weight, each, strict=True)])


def set_scale(model: nn.Module, scale: float, name: str = "default") -> None:
    for layer in layers(model):
        layer.set_scale(name, scale)


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference at most `tolerance` of the largest wanted value."""
    assert got.shape == want.shape, what
    assert got.isfinite().all(), what
    if got.numel():
        error = (got.double() - want.double()).abs().max()
        assert error <= tolerance * want.double().abs().max().clamp_min(1e-6), (what, error)


def assert_same_gradients(
    layer: DLoRLayer, tensors: dict[str, Tensor], tolerance: float, name: str = "default"
) -> None:
    got = stored(layer, name)
    assert set(got) == set(tensors)
    for part, parameter in got.items():
        assert parameter.grad is not None, part
        assert tensors[part].grad.abs().max() > 0, part
        assert_close(parameter.grad, tensors[part].grad, tolerance, part)


def bits(model: nn.Module) -> list[Tensor]:
    """Copies of the base parameters."""
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if "dlor_" not in name]


def assert_same_bits(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
