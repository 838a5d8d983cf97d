"""Adapters side by side: [A, B] active is A merged and then B, for any two forms; set, disable and delete."""

from itertools import product

import pytest
import torch
from peft import get_peft_model
from tiny_models import (
    FEW_FORMS,
    adapted,
    adapter_parameters,
    add,
    base_weights,
    build,
    config_of,
    distance,
    layers,
    logits,
)

merging_again = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
deleting_active = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")


@merging_again
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("first", "second"), list(product(FEW_FORMS, FEW_FORMS)))
def test_two_active_adapters_are_merged_in_order(kind, first, second):
    model = adapted(kind, first)
    add(model, "second", kind, second)
    model.base_model.set_adapter(["default", "second"])
    want = logits(model, kind)
    model.merge_adapter()
    together = logits(model, kind)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert distance(together, want) < 1e-5
    assert distance(logits(model, kind), want) < 1e-5


def test_the_order_matters_where_the_maths_says_so():
    model = adapted("llama", "additive")
    add(model, "second", "llama", "multiplicative-output-3")
    outputs = []
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        outputs.append(logits(model, "llama"))
        model.merge_adapter()
        assert distance(logits(model, "llama"), outputs[-1]) < 1e-5
        model.unmerge_adapter()
    assert distance(outputs[0], outputs[1]) > 1e-4


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
@pytest.mark.parametrize("second", FEW_FORMS)
def test_scaled_adapters_stack_like_merges(second, scale):
    model = adapted("llama", "scaled-both")
    add(model, "second", "llama", second)
    model.base_model.set_adapter(["default", "second"])
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
        layer.set_scale("second", scale)
    want = logits(model, "llama")
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


@pytest.mark.parametrize("form", FEW_FORMS)
def test_a_new_adapter_leaves_the_active_one_alone(form):
    model = adapted("llama")
    want = logits(model, "llama")
    add(model, "second", "llama", form)
    assert model.active_adapters == ["default"]
    assert distance(logits(model, "llama"), want) == 0
    for name, parameter in adapter_parameters(model).items():
        assert parameter.requires_grad == (".default." in name), name


def test_an_adapter_on_other_layers_is_added_frozen_and_inactive():
    model = get_peft_model(build("llama"), config_of("llama", target_modules=["q_proj"])).eval()
    want = logits(model, "llama")
    add(model, "second", "llama", "multiplicative", target_modules=["o_proj", "q_proj"])
    assert distance(logits(model, "llama"), want) == 0
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    model.set_adapter("second")
    assert all(p.requires_grad == (".second." in name) for name, p in adapter_parameters(model).items())
    assert distance(logits(model, "llama"), want) > 1e-3
    model.set_adapter("default")
    assert distance(logits(model, "llama"), want) == 0


def test_disabling_restores_the_base_bit_for_bit():
    base, model = logits(build("gpt2"), "gpt2"), adapted("gpt2", "scaled-both")
    adapted_logits = logits(model, "gpt2")
    with model.disable_adapter():
        assert torch.equal(logits(model, "gpt2"), base)
    assert torch.equal(logits(model, "gpt2"), adapted_logits)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, "gpt2"), base)
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model).values())
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, "gpt2"), adapted_logits)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("form", FEW_FORMS)
def test_deleting_leaves_no_trace(form):
    model = adapted("llama")
    keys, want = set(model.state_dict()), logits(model, "llama")
    add(model, "second", "llama", form)
    model.delete_adapter("second")
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
    assert distance(logits(model, "llama"), want) == 0
    for layer in layers(model).values():
        for attribute in layer.adapter_layer_names + layer.other_param_names:
            assert "second" not in getattr(layer, attribute), attribute


@deleting_active
def test_deleting_the_active_adapter_activates_another():
    model = adapted("llama", "scaled-output")
    add(model, "second", "llama", "multiplicative-input-3")
    model.set_adapter("second")
    second = logits(model, "llama")
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert distance(logits(model, "llama"), second) == 0


@deleting_active
def test_deleting_an_adapter_without_a_diagonal_finds_the_other():
    """The names of the remaining adapters must not be read off one kind of tensor."""
    model = adapted("llama", "additive-r0")
    add(model, "second", "llama", "scaled-none")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert all(layer.active_adapters == ["second"] for layer in layers(model).values())


@deleting_active
def test_deleting_the_last_adapter_leaves_the_base():
    model = adapted("llama")
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model.model, "llama"), logits(build("llama"), "llama"))


def test_an_adapter_of_the_same_name_is_refused():
    model = adapted("llama")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", config_of("llama"))


def test_two_adapters_that_train_biases_are_refused_and_the_first_remains():
    model = adapted("llama", bias="dlor_only")
    keys, want = set(model.state_dict()), logits(model, "llama")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", config_of("llama", bias="all"))
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
    assert distance(logits(model, "llama"), want) == 0


def test_adapters_do_not_share_tensors():
    model = adapted("llama")
    add(model, "second", "llama", "scaled")
    before = base_weights(model)
    pointers = [parameter.data_ptr() for parameter in adapter_parameters(model).values()]
    assert len(pointers) == len(set(pointers))
    assert not set(pointers) & {weight.data_ptr() for weight in before.values()}
