"""The scale interpolates the whole update: Delta(s) = s Delta(1), for every form, from the forward pass and merged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from tiny_models import FORMS, adapted, base_weights, build, config_of, distance, layers, logits

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


@pytest.mark.parametrize("form", FORMS)
def test_rescaled_for_a_while(form):
    """0 is the base model, and multipliers multiply."""
    model = adapted("llama", form)
    want, base = logits(model, "llama"), logits(build("llama"), "llama")
    with rescale_adapter_scale(model, 0):
        assert distance(logits(model, "llama"), base) < 1e-6
    with rescale_adapter_scale(model, 0.5):
        half = logits(model, "llama")
        with rescale_adapter_scale(model, 3):
            assert all(layer.scaling == {"default": 1.5} for layer in layers(model).values())
        assert torch.equal(logits(model, "llama"), half)
        # what is merged inside stays merged
        model.merge_adapter()
        assert distance(logits(model, "llama"), half) < 1e-5
    assert distance(logits(model, "llama"), half) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), want)
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    assert torch.equal(logits(model, "llama"), half)


def test_rescaling_is_taken_back_after_an_error():
    model = adapted("llama")
    for layer in layers(model).values():
        layer.set_scale("default", 2)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0.25):
        {}["an error"]
    assert all(layer.scaling == {"default": 2} for layer in layers(model).values())


def test_rescaling_reaches_every_adapter_of_either_method():
    model = get_peft_model(build("llama"), config_of("llama"), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    want = logits(model.eval(), "llama")
    with rescale_adapter_scale(model, 0):
        assert distance(logits(model, "llama"), logits(build("llama"), "llama")) < 1e-6
    assert torch.equal(logits(model, "llama"), want)


def test_rescaling_of_an_injected_adapter():
    model = inject_adapter_in_model(config_of("llama"), build("llama"))
    with rescale_adapter_scale(model, 0.0):
        assert distance(logits(model, "llama"), logits(build("llama"), "llama")) < 1e-6


def test_what_cannot_be_rescaled_is_refused():
    with (
        pytest.raises(TypeError, match="multiplier should be of type float"),
        rescale_adapter_scale(adapted("llama"), "1"),
    ):
        pass
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(build("llama"), 0.5):
        pass
