"""Linear layers that are one operation with their update, and those that call their base layer: the same, and why."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import FORMS, adapter_parameters, config_of, distance, layers
from torch import nn
from torch.func import functional_call, grad, vmap

from dlor_peft import DLoRConfig


def model_of(form, bias=True, **changes):
    torch.manual_seed(0)
    return get_peft_model(
        nn.Sequential(nn.Linear(6, 5, bias=bias)), config_of("llama", form, target_modules=["0"], **changes)
    )


def layer_of(model):
    (layer,) = layers(model).values()
    return layer


def results(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    wanted = [x, *adapter_parameters(model).values()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_fused_and_called_agree(form, bias, scale):
    model, x = model_of(form, bias), torch.randn(4, 3, 6)
    layer = layer_of(model)
    layer.set_scale("default", scale)
    is_fused = "both" not in form or scale == 1
    assert (layer.why_not_fused() is None) == is_fused
    got = results(model, x)
    layer.base_layer.register_forward_hook(lambda *args: None)
    assert "hooked" in layer.why_not_fused() or not is_fused
    for one, other in zip(got, results(model, x), strict=True):
        assert distance(one, other) < 1e-5


def hooks(layer):
    layer.base_layer.register_full_backward_hook(lambda *args: None)


def two_adapters(layer):
    layer.update_layer("second", 2, 1, DLoRConfig(r=2))
    layer.set_adapter(["default", "second"])


def subclass(layer):
    layer.base_layer.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * super().forward(x)})


REASONS = {
    "is hooked": hooks,
    "2 adapters are active": two_adapters,
    "a Doubled, is hooked, sharded, or does more": subclass,
    "the base layer is trained": lambda layer: layer.base_layer.requires_grad_(),
    "scale other than 1": lambda layer: layer.set_scale("default", 0.5),
    "dropout": lambda layer: layer.dlor_dropout.update({"default": nn.Dropout(0.5)}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_layer_is_called(reason):
    layer = layer_of(model_of("scaled-both"))
    assert layer.explain_kernels() == "Linear: update and frozen product are one operation"
    REASONS[reason](layer)
    assert reason in layer.why_not_fused()
    assert layer.explain_kernels().startswith("Linear: the base layer is called, and updated around that, since")


def test_a_trained_base_layer_gets_its_gradient():
    model, x = model_of("scaled"), torch.randn(4, 6)
    layer = layer_of(model)
    layer.base_layer.requires_grad_()
    model(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_another_dtype_than_the_weight_is_refused_as_by_the_base_layer():
    with pytest.raises(RuntimeError, match="dtype"):
        layer_of(model_of("scaled"))(torch.randn(4, 6, dtype=torch.bfloat16))


def test_global_hooks_see_the_base_layer():
    model, seen = model_of("scaled"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        model(torch.randn(4, 6))
    finally:
        handle.remove()
    assert layer_of(model).base_layer in seen


def test_a_patched_class_is_called(monkeypatch):
    model, seen = model_of("scaled"), []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(self) or forward(self, x))
    model(torch.randn(4, 6))
    assert layer_of(model).base_layer in seen


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_pass_has_the_dtype_of_the_forward_pass(form):
    """Whether it runs under autocast or not."""
    x, gradients = torch.randn(4, 6), []
    for forward, backward in ((False, False), (False, True), (True, False), (True, True)):
        model = model_of(form)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = model(x).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
    for one, other in ((0, 1), (2, 3)):
        assert all(map(torch.equal, gradients[one], gradients[other]))


@pytest.mark.parametrize("form", FORMS)
def test_per_sample_gradients_of_torch_func(form):
    model = model_of(form).eval()
    x, adapter = torch.randn(4, 6), {n: p.detach() for n, p in adapter_parameters(model).items()}

    def loss(adapter, row):
        return functional_call(model, adapter, (row[None],)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(adapter, x)
    for number, row in enumerate(x):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for name, parameter in adapter_parameters(model).items():
            assert distance(got[name][number], parameter.grad) < 1e-5, name


def test_only_a_frozen_input_with_a_frozen_diagonal_needs_no_weight():
    model = model_of("scaled-input", bias=False)
    layer_of(model).dlor_diag["default"].requires_grad_(False)
    x, saved = torch.randn(50, 6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert not any(t is layer_of(model).base_layer.weight for t in saved)
    assert layer_of(model).dlor_V["default"].weight.grad.isfinite().all()
