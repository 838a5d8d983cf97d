"""adapter_names: one adapter for each row of a batch, in forward and in generate."""

import pytest
import torch
from peft import get_peft_model
from tiny_models import FEW_FORMS, FORMS, adapted, add, build, config_of, distance, inputs, layers, logits

NAMES = ["second", "__base__", "default", "second", "default"]


def three_ways(kind, form="scaled-both", second="multiplicative-output-3"):
    model = adapted(kind, form)
    add(model, "second", kind, second)
    return model


def one_by_one(model, run):
    """Results of `run` with each adapter alone, by adapter name."""
    results = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        results[name] = run()
    with model.disable_adapter():
        results["__base__"] = run()
    model.set_adapter("default")
    return results


def check_rows(model, kind):
    """Each row of a mixed batch is what its adapter gives when it is the active one; returns those, by adapter."""
    batch = inputs(kind, rows=len(NAMES))
    with torch.no_grad():
        alone = one_by_one(model, lambda: model(**batch).logits)
        mixed = model(**batch, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert distance(mixed[row], alone[name][row]) < 1e-5
    return alone


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in ("llama", "gpt2", "bert", "t5")
        for form in FORMS
        if kind == "llama" or form in FEW_FORMS
    ],
)
def test_each_row_is_what_its_adapter_gives_alone(kind, form):
    model = three_ways(kind, form)
    alone = check_rows(model, kind)
    assert distance(alone["default"], alone["second"]) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate(kind, num_beams):
    model = three_ways(kind)
    batch = inputs(kind, rows=len(NAMES))
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    alone = one_by_one(model, lambda: model.generate(**batch, **options))
    mixed = model.generate(**batch, **options, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], alone[name][row]), name
    assert not torch.equal(alone["default"], alone["second"])


def test_adapters_on_different_layers():
    model = get_peft_model(build("llama"), config_of("llama", target_modules=["q_proj"])).eval()
    add(model, "second", "llama", "additive", target_modules=["up_proj"])
    check_rows(model, "llama")


def test_modules_to_save_follow_the_rows():
    model = adapted("bert", "scaled", modules_to_save=["classifier"])
    add(model, "second", "bert", "additive", modules_to_save=["classifier"])
    with torch.no_grad():
        for name, copy in model.base_model.model.classifier.modules_to_save.items():
            copy.weight.fill_({"default": 0.5, "second": -0.5}[name])
    check_rows(model, "bert")


def test_nothing_remains_after_the_call():
    model = three_ways("llama")
    want = logits(model, "llama")
    with torch.no_grad():
        model(**inputs("llama"), adapter_names=["second"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**inputs("llama"), adapter_names=["second"] * 2)
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())
    assert distance(logits(model, "llama"), want) == 0


def test_gradients_reach_each_adapter_through_its_rows():
    model = three_ways("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer = next(iter(layers(model).values()))
    layer.set_requires_grad(["default", "second"])
    model(**inputs("llama"), adapter_names=["default", "__base__", "__base__"]).logits.sum().backward()
    assert layer.dlor_U["default"].weight.grad.abs().sum() > 0
    assert layer.dlor_U["second"].weight.grad is None


def test_disabled_adapters_stay_disabled():
    model = three_ways("llama")
    base = logits(build("llama"), "llama")
    with model.disable_adapter():
        assert distance(logits(model, "llama", adapter_names=["default", "second", "__base__"]), base) == 0


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"non-existing adapter.*: defualt.*default, second"):
        logits(three_ways("llama"), "llama", adapter_names=["defualt", "second", "__base__"])


@pytest.mark.parametrize("names", [[], ["default"], ["default"] * 4])
def test_a_wrong_number_of_names_is_refused(names):
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
        logits(three_ways("llama"), "llama", adapter_names=names)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        logits(three_ways("llama").train(), "llama", adapter_names=["default"] * 3)


def test_merged_adapters_are_refused():
    model = three_ways("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        logits(model, "llama", adapter_names=["default"] * 3)


def test_the_scale_counts():
    model = three_ways("llama")
    for layer in layers(model).values():
        layer.set_scale("second", 0.3)
    model.set_adapter("second")
    want = logits(model, "llama")
    model.set_adapter("default")
    assert distance(logits(model, "llama", adapter_names=["second"] * 3), want) < 1e-5
