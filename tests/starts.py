"""Layers whose start is known: weights and inputs of which the directions lie well apart."""

from collections import OrderedDict

import torch
from peft import PeftModel, get_peft_model
from tiny_models import FORMS
from torch import Tensor, nn

from dlor_peft import DLoRConfig, DLoRLayer

LOW_RANK = [form for form, fields in FORMS.items() if fields.get("r") != 0]


def one(base: nn.Module, **config) -> tuple[PeftModel, DLoRLayer]:
    torch.manual_seed(1)
    net = nn.Sequential(OrderedDict(layer=base))
    model = get_peft_model(net, DLoRConfig(**{"r": 2, "target_modules": ["layer"], **config}))
    return model, next(module for module in model.modules() if isinstance(module, DLoRLayer))


def directions(layer: DLoRLayer, part: str = "dlor_V") -> Tensor:
    """(..., q, L r) with the columns of F_1 first."""
    weight = getattr(layer, part)["default"].weight.detach().double()
    return weight.movedim(0, -2).flatten(-2)


def assert_are(got: Tensor, X: Tensor, size: float = 3**-0.5, tolerance: float = 1e-4) -> None:
    """The columns are the leading right-singular vectors of X, times size, each up to its sign."""
    _, _, transposed = torch.linalg.svd(X.detach().double(), full_matrices=False)
    want = size * transposed.mT[:, : got.shape[1]]
    torch.testing.assert_close(got * (got * want).sum(0).sign(), want, rtol=0, atol=tolerance)
    # the sign is that of the largest entry
    assert (got.gather(0, got.abs().argmax(0, keepdim=True)) > 0).all()


def spread(*shape: int, seed: int = 0) -> Tensor:
    """A random tensor whose singular values, as a matrix of its first and all other dimensions, lie well apart."""
    matrix = torch.randn(shape[0], int(torch.tensor(shape[1:]).prod()), generator=torch.Generator().manual_seed(seed))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return ((U * 0.7 ** torch.arange(len(S))) @ Vh).reshape(shape)


def with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    base.weight.data = weight
    return base
