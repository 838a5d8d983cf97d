"""Stacks are collapsed once for an adapter that is not trained, and anew after anything changed."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import build, inputs
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

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
    return get_peft_model(base, DLoRConfig(**STACK)).eval().requires_grad_(False)


def layer_of(model):
    return model.base_model.model[0]


def merged(model, x):
    return copy.deepcopy(model).merge_and_unload()(x)


def agrees(model, x):
    torch.testing.assert_close(model(x), merged(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_collapsed_once_in_evaluation(grad, model, counted):
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(grad):
        first = model(x)
        assert torch.equal(model(x), first)
    assert counted == [1]


def test_collapsed_in_every_step_of_training(model, counted):
    x = torch.randn(3, 6)
    layer_of(model).set_adapter("default")
    for _ in range(2):
        model.train()(x).sum().backward()
    # and once more for the gradients, by another function
    assert counted == [2]
    assert layer_of(model).dlor_U["default"].weight.grad is not None


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_training_steps_in_evaluation_mode_are_seen(name, fused, model):
    """Fused optimizers change parameters without a trace."""
    x, layer = torch.randn(3, 6), layer_of(model)
    with torch.no_grad():
        before = model(x)
    layer.set_adapter("default")
    optimizer = getattr(torch.optim, name)([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    with torch.no_grad():
        model(x)
    optimizer.step()
    with torch.no_grad():
        assert not torch.allclose(model(x), before)
        agrees(model, x)


CHANGES = {
    "in-place write": lambda layer: layer.dlor_diag["default"].weight.mul_(2),
    "new data": lambda layer: setattr(layer.dlor_V["default"].weight, "data", layer.dlor_V["default"].weight * 2),
    "new parameter": lambda layer: setattr(
        layer.dlor_V["default"], "weight", nn.Parameter(layer.dlor_V["default"].weight * 2, False)
    ),
    "cast and back": lambda layer: layer.bfloat16().float(),
    "state dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "state dict, assigned": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "through .data, then evaluated anew": lambda layer: (
        layer.dlor_U["default"].weight.data.mul_(2), layer.train(), layer.eval()
    ),
    "through .data, then moved": lambda layer: (layer.dlor_U["default"].weight.data.mul_(2), layer.float()),
    "through .data, then cleared": lambda layer: (
        layer.dlor_U["default"].weight.data.mul_(2), layer.clear_collapsed()
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_a_change_of_parameters_is_seen(model, change):
    x, layer = torch.randn(3, 6), layer_of(model)
    before = model(x)
    change(layer)
    assert not torch.equal(model(x), before)
    agrees(model, x)


@torch.no_grad()
def test_adapters_are_kept_apart_and_a_loaded_one_is_seen(model, tmp_path):
    x = torch.randn(3, 6)
    model.add_adapter("other", DLoRConfig(**STACK, inference_mode=True))
    model.eval()
    outputs = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name, inference_mode=True)
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
def test_copies_have_their_own(model):
    x = torch.randn(3, 6)
    before = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert not layer_of(other)._collapsed._kept
        layer_of(other).load_state_dict({k: v * 2 for k, v in layer_of(other).state_dict().items()})
        agrees(other, x)
    assert torch.equal(model(x), before)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("warm", [False, True])
def test_traced_with_its_parameters(warm, model):
    x, plain = torch.randn(3, 6), model.get_base_model()
    if warm:
        plain(x)
    traced = torch.jit.trace(plain, (x,))
    want = plain(x)
    torch.testing.assert_close(traced(x), want)
    traced.load_state_dict({k: v * 2 for k, v in plain.state_dict().items()})
    assert not torch.allclose(traced(x), want)


@torch.no_grad()
def test_traced_with_fake_tensors_and_used_afterwards(model):
    x, plain = torch.randn(3, 6), model.get_base_model()
    make_fx(plain, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    agrees(model, x)


def test_a_deleted_adapter_leaves_nothing(model):
    x = torch.randn(3, 6)
    model(x)
    model.add_adapter("other", DLoRConfig(**STACK, inference_mode=True))
    model.set_adapter("other", inference_mode=True)
    model.delete_adapter("default")
    assert "default" not in layer_of(model)._collapsed._kept


@torch.no_grad()
def test_a_model_loaded_for_inference(tmp_path, counted):
    base = build("llama")
    model = get_peft_model(copy.deepcopy(base), DLoRConfig(**STACK)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = inputs("llama")
    expected = model(**batch).logits
    counted[0] = 0
    assert torch.allclose(loaded(**batch).logits, expected, atol=1e-6)
    first = counted[0]
    loaded(**batch)
    assert first == counted[0] > 0
