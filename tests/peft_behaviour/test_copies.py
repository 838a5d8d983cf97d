"""An adapted model is an ordinary object: copied, pickled, saved whole, and asked for its state."""

import copy
import io
import pickle

import pytest
import torch
from peft import get_layer_status, get_model_status
from tiny_models import FEW_FORMS, adapted, adapter_parameters, add, base_weights, distance, inputs, layers, logits


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("form", FEW_FORMS)
def test_a_copy_is_equal_and_independent(form, duplicate):
    model = adapted("llama", form)
    want = logits(model, "llama")
    other = duplicate(model)
    assert torch.equal(logits(other, "llama"), want)
    for parameter in adapter_parameters(other).values():
        assert parameter.requires_grad
        parameter.data.add_(1.0)
    assert torch.equal(logits(model, "llama"), want)
    assert not torch.equal(logits(other, "llama"), want)
    add(other, "second", "llama", "additive")
    assert list(model.peft_config) == ["default"]
    assert all("second" not in layer.form for layer in layers(model).values())


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save])
def test_a_copy_of_a_merged_model_can_be_unmerged(duplicate):
    model = adapted("llama", "scaled-both")
    before = base_weights(model)
    model.merge_adapter()
    other = duplicate(model)
    other.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(other).items())
    assert all(layer.merged for layer in layers(model).values())
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())


def test_a_state_dict_moves_the_adapter():
    model, other = adapted("llama"), adapted("llama")
    for parameter in adapter_parameters(other).values():
        parameter.data.zero_()
    assert distance(logits(other, "llama"), logits(model, "llama")) > 1e-3
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


def test_a_copy_taken_in_training_trains():
    model = adapted("llama", "multiplicative-output-3")
    model(**inputs("llama")).logits.sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    other(**inputs("llama")).logits.sum().backward()
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter.grad, adapter_parameters(other)[name].grad)


def test_status_of_the_model():
    model = adapted("llama", "scaled-both")
    status = get_model_status(model)
    assert status.adapter_model_type == "DLoRModel"
    assert status.peft_types == {"default": "DLOR"}
    assert status.num_adapter_layers == len(layers(model))
    assert status.trainable_params == sum(p.numel() for p in adapter_parameters(model).values())
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert status.available_adapters == ["default"]
    model.base_model.disable_adapter_layers()
    assert get_model_status(model).enabled is False


def test_status_of_the_layers():
    model = adapted("llama", "scaled-both", target_modules=["q_proj"])
    add(model, "second", "llama", "additive-none", target_modules=["q_proj"])
    model.merge_adapter()
    for status in get_layer_status(model):
        assert status.module_type == "dlor.Linear"
        assert status.merged_adapters == ["default"]
        assert status.active_adapters == ["default"]
        assert status.available_adapters == ["default", "second"]
        assert status.requires_grad == {"default": True, "second": False}
    assert get_model_status(model).merged_adapters == ["default"]
