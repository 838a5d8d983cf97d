import pytest
import torch
from interpreted import WHY_NOT, kernels

from dlor_peft.kernels import eager, reference


@pytest.fixture(params=["torch", "reference", "triton"])
def implementation(request, monkeypatch):
    """Each implementation of the five operations; Triton's knows no float64, which PyTorch's takes over."""
    if request.param == "triton" and WHY_NOT:
        pytest.skip(WHY_NOT)
    module = {"torch": lambda: eager, "reference": lambda: reference, "triton": kernels}[request.param]()
    monkeypatch.setattr(
        "dlor_peft.kernels.autograd.implementation", lambda x, r: eager if x.dtype is torch.float64 else module
    )
    return request.param
