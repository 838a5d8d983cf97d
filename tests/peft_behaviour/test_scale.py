"""The scale interpolates the whole update: Delta(s) = s Delta(1), for every form, from the forward pass and merged."""

import pytest
import torch
from tiny_models import FORMS, adapted, base_weights, distance, layers

SCALES = [0.0, 0.25, 0.75, -1.0, 3.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_is_linear_in_the_scale(kind, form):
    model = adapted(kind, form).double()
    for layer in list(layers(model).values())[:4]:
        base = layer.get_base_layer()
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
        with torch.no_grad():
            update, delta = layer(x) - base(x), layer.get_delta_weight("default")
            for scale in SCALES:
                layer.set_scale("default", scale)
                assert ((layer(x) - base(x)) - scale * update).abs().max() < 1e-12
                assert (layer.get_delta_weight("default") - scale * delta).abs().max() < 1e-12
                before = base.weight.clone()
                layer.merge()
                assert ((base.weight - before) - scale * delta).abs().max() < 1e-12
                layer.unmerge()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_gradients_scale_as_the_numerical_derivative(form, scale):
    layer = next(iter(layers(adapted("llama", form).double()).values()))
    layer.set_scale("default", scale)
    parameters = [p for n, p in layer.named_parameters() if "dlor_" in n]
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_scale_and_unscale_act_on_the_active_adapter():
    model = adapted("llama", "scaled-both")
    model.add_adapter("second", model.peft_config["default"])
    layer = next(iter(layers(model).values()))
    layer.scale_layer(4.0)
    assert layer.scaling == {"default": 4.0, "second": 1.0}
    layer.unscale_layer(2.0)
    assert layer.scaling["default"] == 2.0
    layer.scale_layer(3.0)
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0, "second": 1.0}
    layer.set_scale("second", 0.5)
    layer.set_scale("unknown", 7.0)
    assert layer.scaling == {"default": 1.0, "second": 0.5}


@pytest.mark.parametrize("form", FORMS)
def test_scale_zero_is_the_base(form):
    model = adapted("llama", form)
    for layer in layers(model).values():
        layer.set_scale("default", 0.0)
        x = torch.randn(4, layer.in_features)
        with torch.no_grad():
            assert distance(layer(x), layer.get_base_layer()(x)) < 1e-6
    before = base_weights(model)
    model.merge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())


def test_a_replaced_or_new_adapter_starts_at_one():
    model = adapted("llama")
    for layer in layers(model).values():
        layer.set_scale("default", 5.0)
    model.add_adapter("second", model.peft_config["default"])
    assert all(layer.scaling == {"default": 5.0, "second": 1.0} for layer in layers(model).values())
