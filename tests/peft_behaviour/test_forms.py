"""Each form: the identity at the start, the dense W' of the specification afterwards, gradients for all of it."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import (
    FEW_FORMS,
    FORMS,
    adapted,
    adapter_parameters,
    base_parameters,
    build,
    config_of,
    dense,
    distance,
    inputs,
    layers,
    logits,
)

KINDS = ["llama", "gpt2", "bert", "t5"]
everywhere = pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind in KINDS for form in FORMS if kind in ("llama", "gpt2") or form in FEW_FORMS],
)


def stored_weight(layer) -> torch.Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.T if layer.fan_in_fan_out else weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@everywhere
def test_starts_as_the_identity_to_the_bit(kind, form, dtype):
    want = logits(build(kind).to(dtype), kind)
    model = get_peft_model(build(kind).to(dtype), config_of(kind, form, init_weights=True)).eval()
    adds_bias_last = any(
        layer.form["default"].acts_on_output and layer.bias is not None for layer in layers(model).values()
    )
    if dtype is torch.bfloat16 and adds_bias_last:
        assert distance(logits(model, kind), want) < 2e-2
    else:
        assert torch.equal(logits(model, kind), want)


@everywhere
def test_merging_the_identity_leaves_every_bit(kind, form):
    model = get_peft_model(build(kind), config_of(kind, form, init_weights=True))
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, before[name])


@everywhere
def test_layer_is_the_dense_weight_of_the_specification(kind, form):
    model = adapted(kind, form)
    mode, side = FORMS[form]["mode"], FORMS[form].get("side", "auto")
    generator = torch.Generator().manual_seed(5)
    for layer in layers(model).values():
        x = torch.randn(2, 3, layer.in_features, generator=generator)
        W = dense(layer, "default", stored_weight(layer), mode, side)
        want = x.double() @ W.T
        if layer.bias is not None:
            want = want + layer.bias.double()
        with torch.no_grad():
            assert distance(layer(x), want) < 1e-5
        layer.merge()
        assert distance(stored_weight(layer), W) < 1e-5


@everywhere
def test_every_tensor_learns_and_the_base_is_frozen(kind, form):
    model = adapted(kind, form)
    batch = inputs(kind)
    model(**batch).logits.square().sum().backward()
    assert adapter_parameters(model)
    for name, parameter in adapter_parameters(model).items():
        assert parameter.requires_grad, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    for name, parameter in base_parameters(model).items():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name


@pytest.mark.parametrize("form", FORMS)
def test_layer_gradients_are_those_of_the_merged_weight(form):
    """Differences of the merged formula are the truth for the hand-written backward."""
    model = adapted("llama", form).double()
    for layer in list(layers(model).values())[:4]:
        parameters = {n: p for n, p in layer.named_parameters() if "dlor_" in n}
        x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
        g = torch.randn(5, layer.out_features, dtype=torch.float64)
        got = torch.autograd.grad(layer(x), [x, *parameters.values()], g)

        def loss(values, layer=layer, x=x, names=tuple(parameters), g=g):
            residual = layer.form["default"].residual(
                {n.split(".")[0]: v for n, v in zip(names, values[1:], strict=True)}
            )
            W = layer.get_base_layer().weight
            y = values[0] @ (W + layer.form["default"].delta_weight(residual, W)).T
            return (y * g).sum()

        values = [x.detach(), *(p.detach() for p in parameters.values())]
        for index, name in enumerate(["x", *parameters]):
            direction = torch.randn_like(values[index])
            step = 1e-5
            up, down = list(values), list(values)
            up[index] = values[index] + step * direction
            down[index] = values[index] - step * direction
            want = (loss(up) - loss(down)) / (2 * step)
            assert (got[index] * direction).sum().item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_leading_shape_is_that_of_a_linear(form, shape):
    """No tokens at all is what an expert sees that nothing was routed to."""
    for layer in list(layers(adapted("llama", form)).values())[:4]:
        x = torch.randn(*shape, layer.in_features, requires_grad=True)
        for scale in (1.0, 0.5):
            layer.set_scale("default", scale)
            y = layer(x)
            assert y.shape == (*shape, layer.out_features)
            y.sum().backward()
            assert x.grad.shape == x.shape


def test_strided_and_expanded_inputs():
    for layer in layers(adapted("llama", "scaled-both")).values():
        x = torch.randn(layer.in_features, 6)
        with torch.no_grad():
            assert distance(layer(x.T), layer(x.T.contiguous())) < 1e-6
            assert distance(layer(x[:, :1].T.expand(4, -1)), layer(x[:, :1].T.repeat(4, 1))) < 1e-6


def test_auto_takes_the_smaller_side_and_the_input_at_a_tie():
    for form in ("scaled", "multiplicative"):
        for name, layer in layers(adapted("llama", form)).items():
            kind = name.rsplit(".", 1)[-1]
            want = "output" if kind in ("k_proj", "down_proj") else "input"
            assert layer.form["default"].side == want, name


@pytest.mark.parametrize("mode", ["scaled", "multiplicative"])
def test_the_bias_is_never_scaled_or_rotated(mode):
    model = adapted("llama", "scaled", mode=mode, side="output")
    layer = next(layer for layer in layers(model).values() if layer.bias is not None)
    zero = torch.zeros(1, layer.in_features)
    with torch.no_grad():
        assert distance(layer(zero)[0], layer.bias) < 1e-6
