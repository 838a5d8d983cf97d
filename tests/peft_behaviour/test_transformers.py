"""transformers' own adapter methods: add, load, disable, enable, delete and save."""

import pytest
import torch
from peft import PeftModel
from tiny_models import FEW_FORMS, adapted, build, config_of, distance, layers, logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dlor_peft import DLoRConfig

# transformers wraps the model anew for each adapter, and PEFT remarks on the first
second_adapter = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def with_adapter(kind, form="scaled-both", **changes):
    model = build(kind)
    torch.manual_seed(2)
    model.add_adapter(config_of(kind, form, **changes))
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("form", FEW_FORMS)
def test_add_adapter_is_what_peft_does(kind, form):
    assert torch.equal(logits(with_adapter(kind, form), kind), logits(adapted(kind, form), kind))


def test_disable_and_enable():
    base, model = logits(build("llama"), "llama"), with_adapter("llama")
    want = logits(model, "llama")
    model.disable_adapters()
    assert torch.equal(logits(model, "llama"), base)
    model.enable_adapters()
    assert torch.equal(logits(model, "llama"), want)


@second_adapter
def test_delete_leaves_no_parameter_behind():
    base, model = logits(build("llama"), "llama"), with_adapter("llama")
    model.add_adapter(config_of("llama", "additive"), "second")
    model.set_adapter("default")
    want = logits(model, "llama")
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())
    assert torch.equal(logits(model, "llama"), want)
    model.delete_adapter("default")
    assert not any("dlor_" in name for name in model.state_dict())
    assert torch.equal(logits(model, "llama"), base)


@pytest.mark.parametrize("form", FEW_FORMS)
def test_save_and_load_adapter(form, tmp_path):
    model = with_adapter("llama", form)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert "import dlor_peft" in (tmp_path / "README.md").read_text()
    loaded = build("llama")
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded.eval(), "llama"), logits(model, "llama"))
    wrapped = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(wrapped, "llama"), logits(model, "llama"))


@second_adapter
def test_load_adapter_beside_another(tmp_path):
    adapted("llama", "multiplicative-input-3").save_pretrained(tmp_path)
    model = with_adapter("llama")
    model.load_adapter(str(tmp_path), adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model.eval(), "llama"), logits(adapted("llama", "multiplicative-input-3"), "llama"))
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), logits(with_adapter("llama"), "llama"))
    model.set_adapter(["default", "second"])
    assert all(layer.active_adapters == ["default", "second"] for layer in layers(model).values())


@pytest.mark.parametrize(
    ("kind", "auto"), [("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)]
)
def test_auto_model_from_an_adapter_folder(kind, auto, tmp_path):
    build(kind).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    model.add_adapter(config_of(kind, "scaled-both"))
    want = logits(model.eval(), kind)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert distance(logits(loaded, kind), want) == 0


def test_a_peft_folder_loads_as_an_auto_model(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(2)
    base_with = PeftModel(base, config_of("llama", "multiplicative-output-3"))
    base_with.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert distance(logits(loaded, "llama"), logits(base_with.eval(), "llama")) == 0


def test_only_the_adapter_trains():
    model = with_adapter("llama")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if "dlor_" in name}


def test_get_adapter_state_dict_has_no_adapter_name():
    keys = with_adapter("llama").get_adapter_state_dict()
    assert "model.layers.0.self_attn.q_proj.dlor_U.weight" in keys
    assert not any("default" in key for key in keys)


def test_the_default_targets_are_those_of_the_architecture():
    model = build("gpt2")
    model.add_adapter(DLoRConfig())
    assert {name.rsplit(".", 1)[-1] for name in layers(model)} == {"c_attn"}
