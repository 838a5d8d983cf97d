"""Gradient checkpointing, torch.compile, dropout and a few steps of an optimiser change nothing but the speed."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import FEW_FORMS, FORMS, adapted, adapter_parameters, build, config_of, inputs, layers, logits
from torch import nn

COMPILED = [
    "additive",
    "scaled-input",
    "scaled-output",
    "scaled-both",
    "scaled-none",
    "multiplicative-input-3",
    "multiplicative-output-3",
]
# Dynamo makes an instance of every autograd.Function that it traces
traced_function = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def gradients(model, kind):
    model.zero_grad()
    model(**inputs(kind)).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}


# renamed in transformers 5.23, the new name is missing in 5.17
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FEW_FORMS)
def test_gradient_checkpointing_gives_equal_gradients(kind, form, use_reentrant):
    model = adapted(kind, form).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    want = gradients(model, kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients(model, kind)
    assert set(got) == set(want)
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-7), name
        assert got[name].abs().max() > 0, name


@traced_function
@pytest.mark.parametrize("form", COMPILED)
def test_compiled_in_one_graph_forward_and_backward(form):
    torch._dynamo.reset()
    net = adapted("llama", form).base_model.model.model.layers[0].mlp
    x = torch.randn(2, 4, 16)
    parameters = list(adapter_parameters(net).values())
    want = net(x)
    want_grads = torch.autograd.grad(want.square().sum(), parameters)
    got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    got_grads = torch.autograd.grad(got.square().sum(), parameters)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    for one, other in zip(got_grads, want_grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@traced_function
def test_a_whole_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model = adapted("llama", "scaled-both")
    want = gradients(model, "llama")
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    model.zero_grad()
    compiled(**inputs("llama"), use_cache=False).logits.square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert torch.allclose(parameter.grad, want[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_random_in_training_only(form):
    model = adapted("llama", form, dlor_dropout=0.5)
    want = logits(adapted("llama", form), "llama")
    assert torch.equal(logits(model, "llama"), want)
    assert torch.equal(logits(model, "llama"), logits(model, "llama"))
    model.train()
    assert not torch.equal(logits(model, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_never_touches_the_frozen_path(kind, form):
    """With a zero update the layer is the base layer exactly, whatever dropout does."""
    for layer in layers(adapted(kind, form, dlor_dropout=0.9).train()).values():
        for parameter in adapter_parameters(layer).values():
            parameter.data.zero_()
        x = torch.randn(3, 4, layer.in_features)
        with torch.no_grad():
            assert torch.allclose(layer(x), layer.get_base_layer()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [form for form in FORMS if "both" not in form])
def test_dropout_keeps_the_expectation(form):
    """The update is linear in the dropped input."""
    layer = list(layers(adapted("llama", form, dlor_dropout=0.25)).values())[1].double()
    x = torch.randn(1, layer.in_features, dtype=torch.float64)
    with torch.no_grad():
        want = layer.eval()(x)
        mean = layer.train()(x.expand(40_000, -1)).mean(0, keepdim=True)
        update = (want - layer.get_base_layer()(x)).abs().max()
    assert (mean - want).abs().max() < 0.1 * update


@pytest.mark.parametrize("form", FORMS)
def test_a_few_steps_learn_and_leave_the_base(form):
    model = adapted("llama", form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    labels = inputs("llama")["input_ids"]
    losses = []
    for _ in range(8):
        loss = model(**inputs("llama"), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    base = build("llama").state_dict()
    for name, value in model.unload().state_dict().items():
        assert torch.equal(value, base[name]), name


@pytest.mark.parametrize("bias", ["all", "dlor_only"])
def test_disabling_with_trained_biases_warns(bias):
    with (
        pytest.warns(UserWarning, match="Careful, disabling adapter layers with bias"),
        biased(bias).disable_adapter(),
    ):
        pass


def test_disabling_without_trained_biases_does_not_warn(recwarn):
    with biased("none").disable_adapter():
        pass
    assert not recwarn.list


def biased(bias):
    return get_peft_model(nn.Sequential(nn.Linear(3, 4)), config_of("llama", target_modules=["0"], bias=bias))
