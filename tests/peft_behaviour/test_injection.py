"""inject_adapter_in_model with tensors in hand: they say which layers are adapted, and their ranks and depths."""

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import save_file
from tiny_models import FORMS, adapted, adapter_parameters, build, config_of, distance, inputs, layers, logits

# the targets of the config and those of the tensors are not compared by these tests
pytestmark = pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning")
PATTERN = {"q_proj": 1, "layers.0.mlp.up_proj": 5, "down_proj": 0}


def tensors_of(model):
    """As `inject_adapter_in_model` takes them: under the names of the model without its wrapper."""
    state = get_peft_model_state_dict(model)
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}


def inject(config, tensors, low_cpu_mem_usage=False):
    model = inject_adapter_in_model(config, build("llama"), state_dict=tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    if low_cpu_mem_usage:
        assert all(parameter.is_meta for parameter in adapter_parameters(model).values())
    result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "dlor_" in key]
    return model.eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_by_its_tensors(form, low_cpu_mem_usage):
    """The config says another rank and another depth on every layer."""
    ranks = {"rank_pattern": PATTERN} if FORMS[form].get("r", 3) and "none" not in form else {}
    model = adapted("llama", form, **ranks)
    stack = {"depth": 5} if FORMS[form]["mode"] == "multiplicative" else {}
    config = config_of("llama", form, r=7, **stack)
    injected = inject(config, tensors_of(model), low_cpu_mem_usage)
    assert torch.equal(logits(injected, "llama"), logits(model, "llama"))
    for got, want in zip(layers(injected).values(), layers(model).values(), strict=True):
        assert got.form["default"] == want.form["default"]
        assert got.r["default"] == want.r["default"]


@pytest.mark.parametrize("form", ["scaled-both", "multiplicative-input-3", "multiplicative-none-2"])
def test_the_config_learns_what_the_tensors_say(form, tmp_path):
    ranks = {"rank_pattern": PATTERN} if "none" not in form else {}
    depths = {"depth_pattern": {"k_proj": 4}} if "multiplicative" in form else {}
    model = adapted("llama", form, **ranks, **depths)
    config = config_of("llama", form, r=7)
    inject(config, tensors_of(model))
    config.save_pretrained(tmp_path)
    save_file(get_peft_model_state_dict(model), tmp_path / "adapter_model.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path), "llama"), logits(model, "llama"))


def test_a_pattern_of_the_config_gives_way_to_the_tensors():
    model = adapted("llama", "scaled", r=2)
    config = config_of("llama", "scaled", r=4, rank_pattern={"q_proj": 6, r".*down_proj": 0})
    injected = inject(config, tensors_of(model))
    assert torch.equal(logits(injected, "llama"), logits(model, "llama"))


def test_the_tensors_say_which_layers():
    model = adapted("llama", "scaled", target_modules=["q_proj", "o_proj"], layers_to_transform=[1])
    injected = inject(config_of("llama"), tensors_of(model))
    assert set(layers(injected)) == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "o_proj")}
    assert torch.equal(logits(injected, "llama"), logits(model, "llama"))


def test_tensors_of_a_compiled_model():
    model = adapted("llama", "multiplicative-input-3")
    tensors = {f"_orig_mod.{key}": value for key, value in tensors_of(model).items()}
    config = config_of("llama", "multiplicative-input-3", r=7, depth=1)
    injected = inject_adapter_in_model(config, build("llama"), state_dict=tensors)
    assert {layer.form["default"].r for layer in layers(injected).values()} == {3}
    assert {layer.form["default"].depth for layer in layers(injected).values()} == {3}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_second_adapter_of_another_rank():
    model = adapted("llama", "scaled-both")
    injected = inject(config_of("llama", "scaled-both"), tensors_of(model))
    other = adapted("llama", "scaled-both", r=1)
    injected = inject_adapter_in_model(
        config_of("llama", "scaled-both", r=6), injected, "second", state_dict=tensors_of(other)
    )
    set_peft_model_state_dict(injected, tensors_of(other), adapter_name="second")
    assert {layer.r["second"] for layer in layers(injected).values()} == {1}
    # PEFT activates what it injects
    assert torch.equal(logits(injected.eval(), "llama"), logits(other, "llama"))
    for layer in layers(injected).values():
        layer.set_adapter("default")
    assert torch.equal(logits(injected, "llama"), logits(model, "llama"))


@pytest.mark.parametrize(
    ("stored", "config"),
    [
        ("multiplicative-input-3", "scaled-input"),
        ("scaled-output", "scaled-input"),
        ("additive-scalar", "additive"),
    ],
)
def test_tensors_of_another_form_do_not_load(stored, config):
    tensors = tensors_of(adapted("llama", stored))
    model = inject_adapter_in_model(config_of("llama", config), build("llama"), state_dict=tensors)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, tensors)


def test_parts_that_the_form_lacks_are_reported():
    tensors = tensors_of(adapted("llama", "scaled-both"))
    model = inject_adapter_in_model(config_of("llama", "scaled-input"), build("llama"), state_dict=tensors)
    result = set_peft_model_state_dict(
        model, {key: value for key, value in tensors.items() if "dlor_diag." not in key}
    )
    assert len(result.unexpected_keys) == len(layers(model))
    assert all("dlor_diag_in" in key for key in result.unexpected_keys)


def test_an_untouched_config_without_tensors():
    config = config_of("llama", "scaled", r=4)
    model = inject_adapter_in_model(config, build("llama"))
    assert {layer.r["default"] for layer in layers(model).values()} == {4}
    assert not config.rank_pattern
    assert not config.depth_pattern


@pytest.mark.parametrize("form", ["scaled-both", "multiplicative-output-3"])
def test_an_injected_model_trains(form):
    model = adapted("llama", form)
    injected = inject(config_of("llama", form, r=5), tensors_of(model))
    for one in (model, injected):
        one(**inputs("llama")).logits.square().mean().backward()
    want = adapter_parameters(model)
    for name, parameter in adapter_parameters(injected).items():
        assert distance(parameter.grad, want[f"base_model.model.{name}"].grad) == 0, name
