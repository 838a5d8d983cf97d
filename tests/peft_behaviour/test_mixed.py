"""PeftMixedModel: DLoR beside other methods of PEFT in one model."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftMixedModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import FEW_FORMS, adapted, build, config_of, distance, inputs, layers, logits

TARGETS = ["q_proj", "up_proj", "down_proj"]
OTHERS = {
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "lokr": lambda: LoKrConfig(r=2, target_modules=TARGETS, init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TARGETS, init_weights=False),
}
# PEFT asks every layer to unmerge, the merged ones and the others
pytestmark = pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")


def ours(form="scaled-both", **changes):
    return config_of("llama", form, **{"target_modules": TARGETS, **changes})


def mixed(*configs, kind="llama"):
    """Adapters "first", "second" and so on, all active, none of them the identity."""
    names = ["first", "second", "third"][: len(configs)]
    torch.manual_seed(2)
    model = get_peft_model(build(kind), configs[0], adapter_name=names[0], mixed=True)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    model.set_adapter(names)
    return model.eval()


def in_both_orders(other, form="scaled-both"):
    return [mixed(ours(form), OTHERS[other]()), mixed(OTHERS[other](), ours(form))]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("form", FEW_FORMS)
def test_merged_as_it_answers(form, other):
    base = logits(build("llama"), "llama")
    for model in in_both_orders(other, form):
        assert isinstance(model, PeftMixedModel)
        outputs = {}
        for active in (["first"], ["second"], ["first", "second"]):
            model.set_adapter(active)
            outputs[tuple(active)] = logits(model, "llama")
            model.merge_adapter()
            assert distance(logits(model, "llama"), outputs[tuple(active)]) < 1e-5, active
            model.unmerge_adapter()
            assert distance(logits(model, "llama"), outputs[tuple(active)]) < 1e-5, active
        assert all(distance(output, base) > 1e-3 for output in outputs.values())
        assert distance(outputs["first", "second"], outputs["first",]) > 1e-3
        assert distance(outputs["first", "second"], outputs["second",]) > 1e-3
        assert distance(logits(model.merge_and_unload(), "llama"), outputs["first", "second"]) < 1e-5


@pytest.mark.parametrize("other", OTHERS)
def test_alone_each_is_what_it_is_without_the_other(other):
    for model, name in zip(in_both_orders(other), ("first", "second"), strict=True):
        alone = adapted("llama", "scaled-both", target_modules=TARGETS)
        ours_here = {n: layer for n, layer in layers(model).items() if name in layer.form}
        for layer, target in zip(ours_here.values(), layers(alone).values(), strict=True):
            for tensor in target.form["default"].shapes:
                getattr(target, tensor)["default"].weight.data = getattr(layer, tensor)[name].weight.data
        model.set_adapter(name)
        assert distance(logits(model, "llama"), logits(alone, "llama")) < 1e-6


@pytest.mark.parametrize("other", OTHERS)
def test_disabled_and_unloaded_the_base_model_is_left(other):
    base = logits(build("llama"), "llama")
    for model in in_both_orders(other):
        want = logits(model, "llama")
        with model.disable_adapter():
            assert torch.equal(logits(model, "llama"), base)
        assert torch.equal(logits(model, "llama"), want)
        unloaded = model.unload()
        assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
        assert torch.equal(logits(unloaded, "llama"), base)


@pytest.mark.parametrize("other", OTHERS)
def test_either_one_can_be_deleted(other):
    for deleted, kept in (("first", "second"), ("second", "first")):
        for model in in_both_orders(other):
            model.set_adapter(kept)
            want = logits(model, "llama")
            model.delete_adapter(deleted)
            assert list(model.peft_config) == [kept]
            assert not any(f".{deleted}." in name for name in model.state_dict())
            assert torch.equal(logits(model, "llama"), want)


@pytest.mark.parametrize("other", OTHERS)
def test_only_what_is_active_trains(other):
    for model in in_both_orders(other):
        model.set_adapter("second")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(".second" in name for name in trained)
        model.train()
        model(**inputs("llama")).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trained), name


def test_other_layers_for_each():
    model = mixed(ours(target_modules=["q_proj", "up_proj"]), LoraConfig(target_modules=["v_proj", "q_proj"]))
    want = logits(model, "llama")
    assert distance(logits(model.merge_and_unload(), "llama"), want) < 1e-5


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("ours_first", [False, True])
def test_from_files(ours_first, low_cpu_mem_usage, tmp_path):
    paths = {}
    for name, config in (("ours", ours()), ("theirs", OTHERS["lora"]())):
        paths[name] = tmp_path / name
        torch.manual_seed(3)
        get_peft_model(build("llama"), config).save_pretrained(paths[name])
    first, second = ("ours", "theirs") if ours_first else ("theirs", "ours")
    settings = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftMixedModel.from_pretrained(build("llama"), paths[first], adapter_name=first, **settings)
    model.load_adapter(paths[second], adapter_name=second, **settings)
    model.set_adapter([first, second])
    model.eval()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.any() for name, parameter in model.named_parameters() if "dlor_" in name or "lora_" in name)
    want = logits(model, "llama")
    model.set_adapter("ours")
    alone = get_peft_model(build("llama"), OTHERS["lora"]()).base_model.unload()
    loaded = PeftMixedModel.from_pretrained(alone, paths["ours"], adapter_name="ours").eval()
    # one calls a base layer that PEFT has wrapped
    assert distance(logits(model, "llama"), logits(loaded, "llama")) < 1e-5
    model.set_adapter([first, second])
    assert distance(logits(model.merge_and_unload(), "llama"), want) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_other_architectures(kind):
    lora = LoraConfig(
        target_modules=config_of(kind).target_modules, init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
    )
    model = mixed(config_of(kind, "scaled-both"), lora, kind=kind)
    model.set_adapter(["first", "second"])
    want = logits(model, kind)
    assert distance(logits(model.merge_and_unload(), kind), want) < 1e-5


def test_what_peft_does_not_mix_is_still_refused():
    model = mixed(ours())
    with pytest.raises(NotImplementedError, match="not supported for MixedModel"):
        model.add_weighted_adapter(["first"], [1.0], "sum")
    with pytest.raises(NotImplementedError):
        model.save_pretrained("nowhere")
    with pytest.raises(TypeError, match="not supported"):
        model.get_layer_status()


def test_a_refused_name_leaves_the_model_as_it_was():
    model = mixed(OTHERS["lora"]())
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="part of the parameter prefix"):
        model.add_adapter("lor", ours())
    assert list(model.peft_config) == ["first"]
    assert list(model.state_dict()) == keys
