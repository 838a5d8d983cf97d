"""An adapter named like a piece of the prefix "dlor_" would lose its weights: it is refused beforehand."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import adapted, build, config_of, layers, logits

PIECES = ["dlor_", "dlor", "lor", "d", "_", "r_", ""]
WHOLE = ["dlor_x", "adapter", "lora", "base", "dlor_U", "my dlor_", "D"]
prefix_warning = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")
refused = pytest.raises(ValueError, match=r"is part of the parameter prefix 'dlor_'.*Choose")
# PEFT and transformers take an empty name for none
named_pieces = pytest.mark.parametrize("name", [piece for piece in PIECES if piece])


def assert_usable(model, kind="llama"):
    """A refused name leaves a plain model that takes the next adapter."""
    assert not layers(model)
    assert torch.equal(logits(model, kind), logits(build(kind), kind))
    assert list(model.state_dict()) == list(build(kind).state_dict())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in build(kind).parameters()]
    torch.manual_seed(2)
    again = get_peft_model(model, config_of(kind)).eval()
    assert torch.equal(logits(again, kind), logits(adapted(kind), kind))


@prefix_warning
@pytest.mark.parametrize("name", PIECES)
def test_get_peft_model(name):
    model = build("llama")
    with refused:
        get_peft_model(model, config_of("llama"), adapter_name=name)
    assert_usable(model)


@named_pieces
def test_inject(name):
    model = build("llama")
    with refused:
        inject_adapter_in_model(config_of("llama"), model, name)
    assert_usable(model)


@prefix_warning
@named_pieces
def test_peft_add_and_load(name, tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    keys, want = list(model.state_dict()), logits(model, "llama")
    with refused:
        model.add_adapter(name, config_of("llama"))
    with refused:
        model.load_adapter(tmp_path, name)
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, "llama"), want)
    model.add_adapter("second", config_of("llama", "additive"))
    assert all(set(layer.form) == {"default", "second"} for layer in layers(model).values())


@prefix_warning
def test_from_pretrained(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    model = build("llama")
    with refused:
        PeftModel.from_pretrained(model, tmp_path, adapter_name="lor")
    assert_usable(model)


@named_pieces
def test_transformers_add_adapter(name):
    model = build("llama")
    with refused:
        model.add_adapter(config_of("llama"), name)
    # transformers' add_adapter leaves this flag set after any error, LoRA's included
    model._hf_peft_config_loaded = False
    assert_usable(model)


def test_transformers_load_adapter(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    model = build("llama")
    with refused:
        model.load_adapter(str(tmp_path), adapter_name="dlor")
    assert not layers(model)
    model.load_adapter(str(tmp_path), adapter_name="fine")
    assert torch.equal(logits(model.eval(), "llama"), logits(adapted("llama"), "llama"))


@pytest.mark.parametrize("name", WHOLE)
def test_other_names_survive_the_disk(name, tmp_path):
    model = build("llama")
    torch.manual_seed(2)
    model = get_peft_model(model, config_of("llama"), adapter_name=name).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert torch.equal(logits(loaded, "llama"), logits(adapted("llama"), "llama"))
