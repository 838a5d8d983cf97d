"""Stacks are collapsed once while a model is evaluated, and anew after anything changed."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import build, inputs
from torch import nn

import dlor_peft.form
import dlor_peft.kernels.autograd
from dlor_peft import DLoRConfig

STACK = {"mode": "multiplicative", "depth": 3, "r": 2, "init_weights": False, "target_modules": "all-linear"}


@pytest.fixture
def counted(monkeypatch):
    """The number of collapses so far, as a list of one."""
    calls = [0]

    def counting(*args, collapse=dlor_peft.form.collapse_stack):
        calls[0] += 1
        return collapse(*args)

    monkeypatch.setattr(dlor_peft.form, "collapse_stack", counting)
    monkeypatch.setattr(dlor_peft.kernels.autograd, "collapse_stack", counting)
    return calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6))
    return get_peft_model(base, DLoRConfig(**STACK)).eval()


def layer_of(model):
    return model.base_model.model[0]


def merged(model, x):
    return copy.deepcopy(model).merge_and_unload()(x)


def agrees(model, x):
    torch.testing.assert_close(model(x), merged(model, x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_collapsed_once_in_evaluation(model, counted):
    x = torch.randn(3, 6)
    first = model(x)
    assert torch.equal(model(x), first)
    assert counted == [1]


def test_collapsed_in_every_step_of_training(model, counted):
    x = torch.randn(3, 6)
    for _ in range(2):
        model.train()(x).sum().backward()
    # and once more for the gradients, by another function
    assert counted == [2]
    assert layer_of(model).dlor_U["default"].weight.grad is not None


def test_gradients_flow_in_evaluation(model, counted):
    x = torch.randn(3, 6)
    with torch.no_grad():
        model(x)
    model(x).sum().backward()
    assert counted == [2]
    assert layer_of(model).dlor_U["default"].weight.grad is not None


CHANGES = {
    "optimizer step": lambda layer: torch.optim.SGD([layer.dlor_U["default"].weight], lr=1.0).step(),
    "in-place write": lambda layer: layer.dlor_diag["default"].weight.mul_(2),
    "new data": lambda layer: setattr(layer.dlor_V["default"].weight, "data", layer.dlor_V["default"].weight * 2),
    "new parameter": lambda layer: setattr(
        layer.dlor_V["default"], "weight", nn.Parameter(layer.dlor_V["default"].weight * 2)
    ),
    "cast and back": lambda layer: layer.bfloat16().float(),
    "state dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "state dict, assigned": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "through .data, then evaluated anew": lambda layer: (
        layer.dlor_U["default"].weight.data.mul_(2), layer.train(), layer.eval()
    ),
    "through .data, then cleared": lambda layer: (
        layer.dlor_U["default"].weight.data.mul_(2), layer.clear_collapsed()
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_a_change_of_parameters_is_seen(model, change):
    x, layer = torch.randn(3, 6), layer_of(model)
    before = model(x)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(layer)
    assert not torch.equal(model(x), before)
    agrees(model, x)


@torch.no_grad()
def test_adapters_are_kept_apart_and_a_loaded_one_is_seen(model, tmp_path):
    x = torch.randn(3, 6)
    model.add_adapter("other", DLoRConfig(**STACK))
    model.eval()
    outputs = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        outputs.setdefault(name, model(x))
        assert torch.equal(model(x), outputs[name])
    assert not torch.equal(outputs["default"], outputs["other"])
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.set_adapter("other")
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "other", "default")
    model.set_adapter("default")
    model.eval()
    assert torch.equal(model(x), outputs["other"])


def test_what_was_collapsed_in_inference_mode_serves_a_training_step_of_what_comes_before(model):
    x = torch.randn(3, 6, requires_grad=True)
    model.requires_grad_(False)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
def test_a_copy_has_its_own(model):
    x = torch.randn(3, 6)
    before = model(x)
    other = copy.deepcopy(model)
    layer_of(other).dlor_U["default"].weight.mul_(2)
    assert not torch.equal(other(x), before)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_model_loaded_for_inference(tmp_path, counted):
    base = build("llama")
    model = get_peft_model(copy.deepcopy(base), DLoRConfig(**STACK)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = inputs("llama")
    expected = model(**batch).logits
    counted[0] = 0
    assert torch.equal(loaded(**batch).logits, expected)
    first = counted[0]
    loaded(**batch)
    assert first == counted[0] > 0
