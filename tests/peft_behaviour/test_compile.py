"""torch.compile: train steps in one graph, and no second compilation where nothing but values changes."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import FEW_FORMS, adapted, adapter_parameters, add, config_of, distance, inputs, layers, logits, small
from torch import nn
from torch._dynamo.config import patch as dynamo_config
from torch.utils.checkpoint import checkpoint

# Dynamo makes an instance of every autograd.Function that it traces
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **kwargs):
    return torch.compile(function, **{"backend": "aot_eager", "fullgraph": True, **kwargs})


def gradients(function, model, x):
    """Of the adapter's parameters in `model`, after one call of `function`, which may be `model` compiled."""
    model.zero_grad()
    function(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


def assert_all_near(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name in want:
        assert distance(got[name], want[name]) < tolerance, name


def assert_train_steps_compile_once(make, loss_of):
    """Three steps of an optimiser, compiled and not: the same losses and gradients, and the same adapter."""
    results = []
    for compile_it in (False, True):
        model = make().train()
        step = compiled(model) if compile_it else model
        optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
        losses = []
        for number in range(3):
            optimizer.zero_grad()
            with dynamo_config(error_on_recompile=number > 0):
                losses.append(loss_of(step))
            losses[-1].backward()
            optimizer.step()
        results.append((losses, adapter_parameters(model)))
    (want_losses, want), (got_losses, got) = results
    for one, other in zip(got_losses, want_losses, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    assert_all_near(got, want)
    assert_all_near({n: p.grad for n, p in got.items()}, {n: p.grad for n, p in want.items()}, 1e-4)


def test_train_steps_of_a_whole_model_compile_once():
    batch = {**inputs("llama"), "labels": inputs("llama")["input_ids"], "use_cache": False}
    assert_train_steps_compile_once(lambda: adapted("llama", "scaled-both"), lambda step: step(**batch).loss)


@pytest.mark.parametrize("form", FEW_FORMS)
def test_train_steps_compile_once(form):
    x = torch.randn(2, 5, 6)
    assert_train_steps_compile_once(lambda: small(form), lambda step: step(x).square().mean())


@pytest.mark.slow
def test_generated_code():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config_of("llama", "scaled-both", target_modules=["0"]))
    x = torch.randn(2, 5, 6)
    assert_all_near(gradients(compiled(model, backend="inductor"), model, x), gradients(model, model, x))


@pytest.mark.parametrize("form", ["additive", "scaled-input", "multiplicative-output-3"])
def test_batches_of_many_sizes(form):
    model = small(form)
    step = compiled(model, dynamic=True)
    for number, shape in enumerate([(3, 7, 6), (2, 5, 6), (4, 11, 6)]):
        x = torch.randn(shape)
        with dynamo_config(error_on_recompile=number > 0):
            got = gradients(step, model, x)
        assert_all_near(got, gradients(model, model, x))


@pytest.mark.parametrize("form", FEW_FORMS)
def test_a_changed_scale_compiles_once_more(form):
    model = small(form)
    step = compiled(model)
    x = torch.randn(2, 5, 6)
    for number, scale in enumerate((1.0, 0.5, 0.25, 0.75, 1.0)):
        for layer in layers(model).values():
            layer.set_scale("default", scale)
        with dynamo_config(error_on_recompile=number > 1):
            got = gradients(step, model, x)
        assert_all_near(got, gradients(model, model, x))


def test_autocast():
    model = small("scaled-both")
    x = torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = gradients(compiled(model), model, x), gradients(model, model, x)
    got, want = (torch.cat([grad.flatten() for grad in side.values()]) for side in (got, want))
    assert torch.linalg.vector_norm(got - want) < 0.02 * torch.linalg.vector_norm(want)


def test_dropout_is_drawn_anew():
    model = small("scaled-both", dlor_dropout=0.5).train()
    step = compiled(model)
    x = torch.randn(2, 5, 6)
    assert not torch.equal(step(x), step(x))


def test_checkpointing():
    model = small("multiplicative-output-3")
    x = torch.randn(2, 5, 6)
    step = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    assert_all_near(gradients(step, model, x), gradients(model, model, x))


def test_the_states_of_a_model_are_told_apart():
    """Disabled, merged, another adapter, two at once: each compiles, and is found again."""
    model = small("scaled-both")
    model.add_adapter("second", config_of("llama", "multiplicative-output-3", target_modules=["0", "2"]))
    run = compiled(model, backend="eager")
    x = torch.randn(2, 5, 6)

    def visit():
        for adapters in ("default", "second", ["default", "second"]):
            model.base_model.set_adapter(adapters)
            yield run(x), model(x)
            model.merge_adapter()
            yield run(x), model(x)
            model.unmerge_adapter()
        with model.disable_adapter():
            yield run(x), model(x)

    for lap in range(3):
        # PEFT's switch is an attribute of the class until it is used for the first time
        with torch.no_grad(), dynamo_config(error_on_recompile=lap > 1, recompile_limit=20):
            for got, want in visit():
                assert distance(got, want) < 1e-6


def test_a_batch_that_mixes_adapters():
    model = small("scaled-both").eval()
    model.add_adapter("second", config_of("llama", "multiplicative-output-3", target_modules=["0", "2"]))
    model.eval()
    x, names = torch.randn(3, 6), ["second", "__base__", "default"]
    # the hooks that hand the names to the layers come and go with each call
    run = compiled(model, backend="eager", fullgraph=False)
    with torch.no_grad():
        assert distance(run(x, adapter_names=names), model(x, adapter_names=names)) < 1e-6


def test_generate_with_a_static_cache():
    model = adapted("llama", "multiplicative-output-3")
    ids = inputs("llama")["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(**batch, **settings)
    base = model.get_base_model()
    base.forward = compiled(base.forward, backend="eager")
    settings["cache_implementation"] = "static"
    assert torch.equal(model.generate(**batch, **settings), want)
    with dynamo_config(error_on_recompile=True):
        assert torch.equal(model.generate(**batch, **settings), want)


def test_an_adapter_added_to_a_compiled_model():
    model = adapted("llama", "scaled-both")
    run = compiled(model, backend="eager")
    logits(run, "llama", use_cache=False)
    add(run, "second", "llama", "additive")
    run.set_adapter("second")
    assert distance(logits(run, "llama", use_cache=False), logits(model, "llama")) < 1e-6
