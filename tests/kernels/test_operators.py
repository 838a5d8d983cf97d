"""The kernels as operators: schemas and fake results hold, and torch.compile sees what eager mode computes."""

import pytest
import torch
from interpreted import DEVICE, WHY_NOT, kernels
from tiny_models import FEW_FORMS, adapter_parameters, distance, small
from torch._dynamo.config import patch as dynamo_config
from torch.library import opcheck

from dlor_peft.kernels import choice, operators

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

T, I, O, r = 9, 7, 5, 3


@pytest.fixture(autouse=True)
def _kernels_of_this_device(monkeypatch):
    monkeypatch.setattr(operators, "kernels", kernels)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE)


CALLS = {
    "down": [lambda: (draw(T, I), draw(I, r), None), lambda: (draw(T, I), draw(I, r), draw(1))],
    "expand": [
        lambda: (draw(T, r), draw(O, r), None, None, None, None),
        lambda: (draw(T, r), draw(O, r), draw(T, O), draw(T, I), draw(O), draw(O)),
    ],
    "mul": [
        lambda: (None, draw(T, I), None, draw(O, r), draw(I, r)),
        lambda: (draw(T, O), draw(T, I), draw(O), draw(O, r), draw(I, r)),
    ],
    "bwd_rows": [
        lambda: (draw(T, O), draw(O, r), None, None, None),
        lambda: (draw(T, O), draw(O, r), draw(T, r), draw(O), draw(T, O)),
        lambda: (draw(T, O), draw(O, r), draw(T, r), draw(1), draw(T, O)),
    ],
    "bwd_cols": [
        lambda: (None, None, draw(T, r), draw(I, r), None, None, True),
        lambda: (None, draw(T, O), draw(T, r), draw(I, r), draw(T, I), draw(O), False),
        lambda: (draw(T, I), draw(T, O), draw(T, r), draw(I, r), draw(T, I), draw(1), True),
    ],
}


@pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name, calls in CALLS.items() for call in calls], ids=lambda v: str(v)[:9]
)
def test_schema_and_fake_results(name, call):
    opcheck(getattr(torch.ops.dlor, name).default, call(), test_utils=("test_schema", "test_faketensor"))


# Dynamo makes an instance of every autograd.Function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", FEW_FORMS)
def test_train_steps_compile_into_one_graph_once(form, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "requested", "triton")
    torch._dynamo.reset()
    model, x = small(form).train().to(DEVICE), draw(2, 5, 6)
    gradients = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for lap in range(2):
            model.zero_grad()
            with dynamo_config(error_on_recompile=lap > 0):
                step(x).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()})
    want, got = gradients
    for name in want:
        assert distance(got[name], want[name]) < 1e-5, name
    torch._dynamo.reset()
