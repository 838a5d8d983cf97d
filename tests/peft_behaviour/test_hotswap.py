"""Another adapter from a file into the tensors of a loaded one: the same answers as loading it, or nothing changes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap
from swapping import assert_refused_without_a_trace, make, swap
from tiny_models import FORMS, adapter_parameters, build, config_of, distance, inputs, layers, logits
from torch import nn
from torch._dynamo.config import patch as dynamo_config


@pytest.fixture
def store(tmp_path):
    """Saves an adapter of a form, and returns its folder and the answers of the model that has it."""

    def save(form="scaled", name="other", **changes):
        model = make(form, **changes)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, logits(model, "llama")

    return save


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, store):
    model = make(form, seed=2)
    pointers = [parameter.data_ptr() for parameter in adapter_parameters(model).values()]
    path, want = store(form)
    assert distance(logits(model, "llama"), want) > 1e-3
    swap(model, path)
    assert torch.equal(logits(model, "llama"), want)
    assert [parameter.data_ptr() for parameter in adapter_parameters(model).values()] == pointers
    model.merge_adapter()
    assert distance(logits(model, "llama"), want) < 1e-5


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].get("r", 3)])
def test_a_smaller_rank_and_depth_after_a_larger(form, store):
    deep = {"depth": 4} if FORMS[form]["mode"] == "multiplicative" else {}
    model = make(form, seed=2, r=5, **deep)
    path, want = store(form)
    swap(model, path)
    assert distance(logits(model, "llama"), want) < 1e-6


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-input-3"])
def test_a_rank_for_every_layer_and_none(form, store):
    model = make(form, seed=2, r=4)
    path, want = store(form, rank_pattern={"q_proj": 4, "layers.0.mlp.up_proj": 1, "down_proj": 0})
    swap(model, path)
    assert distance(logits(model, "llama"), want) < 1e-6


def test_a_layer_that_the_other_does_not_adapt_is_the_base_layer(store):
    model = make()
    path, want = store(target_modules=["q_proj"])
    swap(model, path)
    assert distance(logits(model, "llama"), want) < 1e-6
    for name, layer in layers(model).items():
        if not name.endswith("q_proj"):
            assert not any(parameter.any() for parameter in adapter_parameters(layer).values())


def test_there_and_back(store):
    (first, want_first), (second, want_second) = store(name="first", seed=1), store(name="second", r=1)
    model = PeftModel.from_pretrained(build("llama"), first)
    for path, want in ((second, want_second), (first, want_first)):
        swap(model, path)
        assert distance(logits(model, "llama"), want) < 1e-6


def test_one_of_several_adapters(store):
    model = make(seed=2)
    torch.manual_seed(3)
    model.add_adapter("second", config_of("llama", "scaled"))
    model.eval()
    first = logits(model, "llama")
    path, want = store()
    swap(model, path, "second")
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), want)


def test_the_scale_and_what_is_trained_stay(store):
    model = make(seed=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    path, _ = store()
    swap(model, path)
    assert all(layer.scaling == {"default": 0.5} for layer in layers(model).values())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_half_precision_takes_what_it_can_hold(store):
    path, _ = store()
    model = get_peft_model(build("llama").bfloat16(), config_of("llama"), autocast_adapter_dtype=False)
    swap(model, path)
    want = PeftModel.from_pretrained(build("llama").bfloat16(), path, autocast_adapter_dtype=False)
    got = adapter_parameters(model)
    assert all(torch.equal(got[name], value) for name, value in adapter_parameters(want).items())


def test_a_larger_depth_changes_nothing(store):
    path, _ = store("multiplicative-input-3", depth=4)
    assert_refused_without_a_trace(ValueError, "does not fit", make("multiplicative-input-3"), path)


def test_an_adapter_of_another_base_model_changes_nothing(tmp_path):
    """All of its tensors are smaller, in the dimensions that are not ranks too."""
    torch.manual_seed(0)
    narrow, wide = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(5, 6))
    config = config_of("llama", target_modules=["0"])
    get_peft_model(narrow, config).save_pretrained(tmp_path)
    assert_refused_without_a_trace(ValueError, "does not fit", get_peft_model(wide, config), tmp_path)


def test_an_unknown_adapter_is_refused_by_name(store):
    path, _ = store()
    assert_refused_without_a_trace(ValueError, "'nope'.*default", make(), path, "nope")


def test_a_lora_is_refused(tmp_path):
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert_refused_without_a_trace(ValueError, "Incompatible PEFT types", make(), tmp_path)


def test_a_merged_adapter_is_refused(store):
    model = make()
    path, want = store()
    model.merge_adapter()
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"currently merged.*unmerge"):
        swap(model, path)
    assert torch.equal(logits(model, "llama"), before)
    model.unmerge_adapter()
    swap(model, path)
    assert torch.equal(logits(model, "llama"), want)


def test_lora_is_still_swapped_by_peft(tmp_path):
    def lora(seed):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(build("llama"), config).eval()

    model, other = lora(0), lora(1)
    other.save_pretrained(tmp_path)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=9)
    swap(model, tmp_path)
    assert distance(logits(model, "llama"), logits(other, "llama")) < 1e-6


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
def test_prepared_for_a_larger_rank(form, store):
    model = make(form, seed=2, r=1)
    before = logits(model, "llama")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    assert distance(logits(model, "llama"), before) < 1e-6
    assert model.peft_config["default"].r == 6
    assert all(layer.r["default"] == layer.form["default"].r == 6 for layer in layers(model).values())
    for r in (6, 2):
        path, want = store(form, name=str(r), r=r)
        swap(model, path)
        assert distance(logits(model, "llama"), want) < 1e-6


@pytest.mark.parametrize(
    ("form", "where"), [("scaled-both", "model"), ("multiplicative-output-3", "in place"), ("additive", "part")]
)
def test_a_compiled_model_is_not_compiled_again(form, where, store):
    torch._dynamo.reset()
    model = make(form, r=2)
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    run = model
    if where == "model":
        run = torch.compile(model, backend="eager", fullgraph=True)
    elif where == "in place":
        model.compile(backend="eager", fullgraph=True)
    else:
        part = model.base_model.model.model.layers
        part[0] = torch.compile(part[0], backend="eager", fullgraph=True)
    logits(run, "llama", use_cache=False)
    for changes in ({"r": 4}, {"r": 1, "target_modules": ["q_proj"]}):
        path, want = store(form, name=str(changes), **changes)
        with dynamo_config(error_on_recompile=True):
            swap(run, path)
            assert distance(logits(run, "llama", use_cache=False), want) < 1e-6


def test_from_tensors_in_memory():
    model, other = make(seed=1), make(seed=2)
    tensors = {name: value.detach() for name, value in adapter_parameters(other).items()}
    hotswap.hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))


def test_training_goes_on_after_a_swap(store):
    model = make(seed=2)
    path, _ = store()
    swap(model, path)
    other = make()
    for one in (model, other):
        one(**inputs("llama")).logits.square().mean().backward()
    want = adapter_parameters(other)
    assert all(torch.equal(p.grad, want[name].grad) for name, p in adapter_parameters(model).items())
