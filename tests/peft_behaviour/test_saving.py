"""What is on disk, and every way of PEFT and transformers to load it again."""

import copy
import re

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from tiny_models import FORMS, adapted, adapter_parameters, add, build, config_of, distance, inputs, layers, logits
from transformers import AutoModelForCausalLM, ResNetConfig, ResNetForImageClassification

from dlor_peft import DLoRConfig

AUTO = {
    "llama": ("CAUSAL_LM", AutoPeftModelForCausalLM),
    "gpt2": ("CAUSAL_LM", AutoPeftModelForCausalLM),
    "bert": ("SEQ_CLS", AutoPeftModelForSequenceClassification),
    "t5": ("SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM),
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_flat_and_without_the_adapter_name(form, tmp_path):
    model = adapted("llama", form)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    want = {
        f"{name}.{tensor}.weight": shape
        for name, layer in layers(model).items()
        for tensor, shape in layer.form["default"].shapes.items()
    }
    assert {key: tuple(value.shape) for key, value in stored.items()} == want
    for key, parameter in adapter_parameters(model).items():
        assert torch.equal(stored[key.replace(".default.", ".")], parameter)


def test_three_keys_a_layer_by_default(tmp_path):
    get_peft_model(build("llama"), config_of("llama", target_modules=["q_proj"])).save_pretrained(tmp_path)
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.dlor_{}.weight"
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        stem.format(layer, tensor) for layer in (0, 1) for tensor in ("diag", "U", "V")
    }


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_from_pretrained(form, low_cpu_mem_usage, tmp_path):
    model = adapted("gpt2", form, rank_pattern={"c_fc": 2} if FORMS[form].get("r", 3) else {})
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "DLOR"
    loaded = PeftModel.from_pretrained(build("gpt2"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training
    assert torch.equal(logits(loaded, "gpt2"), logits(model, "gpt2"))


def test_from_pretrained_to_go_on_training(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in adapter_parameters(loaded).values())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(adapter_parameters(loaded))


def test_load_adapter_beside_another(tmp_path):
    saved = adapted("llama", "multiplicative-output-3")
    saved.save_pretrained(tmp_path)
    model = adapted("llama", "scaled-both")
    before = logits(model, "llama")
    result = model.load_adapter(tmp_path, "second")
    assert not result.unexpected_keys
    assert not any("dlor_" in key and ".second." in key for key in result.missing_keys)
    assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), logits(saved, "llama"))


def test_several_adapters_are_saved_side_by_side(tmp_path):
    model = adapted("llama", "scaled-both")
    add(model, "second", "llama", "multiplicative-none-2")
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "second")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    for folder in (tmp_path, tmp_path / "second"):
        assert "import dlor_peft" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", AUTO)
def test_auto_peft_model(kind, tmp_path):
    task, auto = AUTO[kind]
    build(kind).save_pretrained(tmp_path / "base")
    base = type(build(kind)).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, config_of(kind, "scaled-both", task_type=task)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, kind), logits(model, kind))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {"modules_to_save": ["classifier"]}),
        ("llama", {"trainable_token_indices": [5, 7]}),
        ("bert", {"bias": "all"}),
        ("bert", {"bias": "dlor_only"}),
        ("gpt2", {"bias": "dlor_only"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_everything_trained_comes_back(kind, changes, tmp_path):
    model = adapted(kind, "scaled-output", **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind), tmp_path)
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert distance(logits(model, kind), logits(build(kind), kind)) > 1e-3


def test_a_merged_model_saves_its_adapter_not_its_weights(tmp_path):
    model = adapted("llama", "scaled-both")
    want = get_peft_model_state_dict(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert set(stored) == set(want)
    assert all(torch.equal(stored[key], want[key]) for key in want)


@pytest.mark.parametrize("form", ["scaled-both", "multiplicative-input-3", "additive-r0"])
def test_inject_with_and_without_a_state_dict(form):
    model = adapted("llama", form)
    state = get_peft_model_state_dict(model)
    config = config_of("llama", form)
    for state_dict in (None, {key.removeprefix("base_model.model."): value for key, value in state.items()}):
        for low in (False, True):
            injected = inject_adapter_in_model(config, build("llama"), state_dict=state_dict, low_cpu_mem_usage=low)
            result = set_peft_model_state_dict(injected, state, low_cpu_mem_usage=low)
            assert not result.unexpected_keys
            assert torch.equal(logits(injected, "llama"), logits(model, "llama"))


def test_weights_round_trip_through_the_state_dict(tmp_path):
    model, other = adapted("llama"), get_peft_model(build("llama"), config_of("llama", init_weights=True)).eval()
    model.save_pretrained(tmp_path)
    set_peft_model_state_dict(other, load_peft_weights(tmp_path))
    assert torch.equal(logits(other, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("part", ["dlor_diag", "dlor_U", "dlor_V"])
@pytest.mark.parametrize("shard", [torch.zeros(3), torch.zeros(0, 3)])
def test_saving_a_shard_warns(part, shard, tmp_path):
    model = adapted("llama")
    name, layer = next(iter(layers(model).items()))
    getattr(layer, part)["default"].weight.data = shard
    with pytest.warns(PeftWarning, match=rf"1 DLoR tensor.*{re.escape(name)}\.{part}.*DeepSpeed ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    adapted("llama", r=2).save_pretrained(tmp_path)
    other = adapted("llama", r=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(other, load_peft_weights(tmp_path))


def test_the_task_is_kept_and_the_saved_config_is_for_inference(tmp_path):
    get_peft_model(build("llama"), config_of("llama", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.task_type == "CAUSAL_LM"
    assert config.inference_mode


def test_a_loaded_adapter_trains_to_the_same_gradients(tmp_path):
    model = adapted("llama", "multiplicative-output-3")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True).eval()
    grads = []
    for one in (model, loaded):
        one(**inputs("llama")).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in adapter_parameters(one).items()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["4KB", "1GB"])
def test_a_merged_model_is_a_plain_one_on_disk(max_shard_size, tied, tmp_path):
    base = build("llama", tie_word_embeddings=tied)
    torch.manual_seed(2)
    config = config_of("llama", "scaled-output", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=tied)
    merged = get_peft_model(base, config).eval().merge_and_unload()
    merged.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    stored = {key: value for path in tmp_path.glob("*.safetensors") for key, value in load_file(path).items()}
    want = {key: value for key, value in merged.state_dict().items() if not (tied and key == "lm_head.weight")}
    assert stored.keys() == want.keys()
    assert all(torch.equal(stored[key], value) for key, value in want.items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert torch.equal(logits(reloaded, "llama"), logits(merged, "llama"))


def test_a_model_without_embeddings(tmp_path):
    torch.manual_seed(0)
    base = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    )
    config = DLoRConfig(target_modules=["convolution"], modules_to_save=["classifier"], init_weights=False, r=2)
    images = torch.randn(2, 3, 16, 16)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
