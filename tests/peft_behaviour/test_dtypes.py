"""Half-precision bases, adapters in float32 over them, and autocast."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import (
    FEW_FORMS,
    FORMS,
    adapted,
    adapter_parameters,
    build,
    config_of,
    distance,
    inputs,
    layers,
    logits,
)

HALF = [torch.bfloat16, torch.float16]


def half_model(kind, form, dtype, autocast_adapter_dtype=True):
    model = build(kind).to(dtype)
    torch.manual_seed(2)
    return get_peft_model(model, config_of(kind, form), autocast_adapter_dtype=autocast_adapter_dtype).eval()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FEW_FORMS)
def test_autocast_adapter_dtype(form, dtype):
    kept = half_model("llama", form, dtype, autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_parameters(kept).values()} == {dtype}
    raised = half_model("llama", form, dtype)
    assert {p.dtype for p in adapter_parameters(raised).values()} == {torch.float32}
    assert {p.dtype for n, p in raised.named_parameters() if "dlor_" not in n} == {dtype}


@pytest.mark.parametrize("adapter_in_float32", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_output_in_the_dtype_of_the_base_gradients_in_that_of_the_adapter(form, dtype, adapter_in_float32):
    model = half_model("llama", form, dtype, adapter_in_float32)
    output = model(**inputs("llama")).logits
    assert output.dtype == dtype
    output.float().square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_layer_is_near_the_exact_one(form):
    """bfloat16 keeps 8 bits: a layer of width 16 stays within a few roundings of float32 with the same weights."""
    model = half_model("llama", form, torch.bfloat16)
    exact = half_model("llama", form, torch.bfloat16).float()
    for layer, want in zip(layers(model).values(), layers(exact).values(), strict=True):
        x = torch.randn(2, 5, layer.in_features).bfloat16()
        layer.set_scale("default", 0.7)
        want.set_scale("default", 0.7)
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
            assert distance(layer(x), want(x.float())) < 3e-2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_forward_and_backward(form, base):
    model, exact = half_model("llama", form, base), half_model("llama", form, base).float()
    losses = []
    for one, enabled in ((model, True), (exact, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = one(**inputs("llama")).logits
            losses.append(output.float().square().mean())
        losses[-1].backward()
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert abs(losses[0] - losses[1]).item() < 0.1 * losses[1].item()
    got, want = adapter_parameters(model).values(), adapter_parameters(exact).values()
    assert {parameter.grad.dtype for parameter in got} == {torch.float32}
    got, want = (torch.cat([parameter.grad.flatten() for parameter in side]) for side in (got, want))
    assert torch.linalg.vector_norm(got - want) < 0.05 * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_each_layer_under_autocast_answers_in_the_autocast_dtype(kind, form):
    for layer in layers(adapted(kind, form)).values():
        x = torch.randn(2, 5, layer.in_features)
        for dropout in (torch.nn.Identity(), torch.nn.Dropout(0.5)):
            layer.dlor_dropout["default"] = dropout
            with torch.autocast("cpu", torch.bfloat16):
                assert layer.get_base_layer()(x).dtype == torch.bfloat16
                assert layer(x).dtype == torch.bfloat16
                layer.set_scale("default", 0.5)
                assert layer(x).dtype == torch.bfloat16


def test_a_small_update_is_not_lost_in_a_half_precision_diagonal():
    """delta, not 1 + delta, is stored: bfloat16 has no 1.001."""
    model = half_model("llama", "scaled-output", torch.bfloat16, autocast_adapter_dtype=False)
    layer = next(iter(layers(model).values()))
    layer.dlor_U["default"].weight.data.zero_()
    layer.dlor_diag["default"].weight.data.fill_(1e-3)
    delta = layer.delta_matrix("default")
    assert delta.dtype == torch.float32
    assert layer.get_delta_weight("default").dtype == torch.bfloat16
    assert distance(delta, 1e-3 * layer.get_base_layer().weight.float()) < 4e-3


def test_the_whole_model_follows_to():
    model = adapted("llama", "multiplicative-output-3").to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert logits(model, "llama").dtype == torch.float64
    assert distance(logits(model, "llama"), logits(adapted("llama", "multiplicative-output-3"), "llama")) < 1e-5
