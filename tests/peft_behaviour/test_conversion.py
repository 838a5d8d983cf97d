"""The delta weight of a layer, and PEFT's conversion of it to a LoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from tiny_models import FORMS, adapted, add, base_weights, build, distance, layers, logits

# the LoraConfig that PEFT makes does not name the orientation, LoRA then finds it out
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but:UserWarning")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_the_delta_weight_is_merged_minus_original(kind, form):
    model = adapted(kind, form).double()
    before = base_weights(model)
    delta = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        weight = layer.get_base_layer().weight
        assert delta[name].shape == weight.shape
        assert not delta[name].requires_grad
        assert distance(delta[name], weight - before[name]) < 1e-10
        assert torch.equal(layer.get_delta_weight("default"), delta[name])


@pytest.mark.parametrize("form", ["multiplicative-output-3", "scaled-output"])
def test_a_tiny_delta_keeps_its_digits(form):
    """Computed without subtracting W' - W, which would lose half of the digits of a small update."""
    model = adapted("llama", form)
    for layer in layers(model).values():
        for tensor in (layer.dlor_U, layer.dlor_diag):
            tensor["default"].weight.data.mul_(1e-6)
        got = layer.get_delta_weight("default")
        assert distance(got, layer.double().get_delta_weight("default")) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_convert_to_lora_by_energy_gives_nearly_the_same_outputs(kind, form):
    """rank=1.0 drops what float32 cannot see in a sum of squares, about the square root of its precision."""
    model = adapted(kind, form)
    config, state = convert_to_lora(model, rank=1.0)
    lora = get_peft_model(build(kind), config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert distance(logits(lora, kind), logits(model, kind)) < 2e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_convert_to_lora_at_full_rank_gives_the_same_outputs(kind, form):
    target = {"llama": "up_proj", "gpt2": "c_attn"}[kind]
    model = adapted(kind, form, target_modules=[target])
    config, state = convert_to_lora(model, rank=16)
    lora = get_peft_model(build(kind), config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert distance(logits(lora, kind), logits(model, kind)) < 1e-5


def test_save_as_lora_writes_a_lora(tmp_path):
    model = adapted("llama", "multiplicative-output-3", target_modules=["q_proj"])
    save_as_lora(tmp_path, model, rank=16)
    lora = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert distance(logits(lora, "llama"), logits(model, "llama")) < 1e-5


def test_multiplicative_without_a_diagonal_is_a_lora_of_rank_depth_times_r():
    model = adapted("llama", "multiplicative-none-2")
    want = logits(model, "llama")
    config, state = convert_to_lora(model, rank=6)
    lora = get_peft_model(build("llama"), config).eval()
    set_peft_model_state_dict(lora, state)
    assert distance(logits(lora, "llama"), want) < 1e-5


def test_one_of_several_adapters_is_converted():
    model = adapted("llama", "scaled-both", target_modules=["q_proj"])
    add(model, "second", "llama", "additive", target_modules=["q_proj"])
    model.set_adapter("second")
    want = logits(model, "llama")
    config, state = convert_to_lora(model, rank=16, adapter_name="second")
    lora = get_peft_model(build("llama"), config).eval()
    set_peft_model_state_dict(lora, state)
    assert distance(logits(lora, "llama"), want) < 1e-5


def test_the_model_says_that_it_can_be_converted():
    model = adapted("llama")
    assert all(layer.supports_lora_conversion() for layer in layers(model).values())
