"""Experts named as they were before their weights were fused: the same targets as LoRA's, or an error."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import distance
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dlor_peft import DLoRConfig, DLoRLayer

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(kind="qwen"):
    torch.manual_seed(0)
    if kind == "qwen":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=12)).eval()
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


def answer(model):
    with torch.no_grad():
        return model(torch.arange(3, 13).view(2, 5)).logits


def adapted_names(model):
    return {
        (name.replace(".base_layer", ""), layer.parameter_name)
        for name, layer in model.named_modules()
        if isinstance(layer, DLoRLayer)
    }


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen", "all-linear"),
        ("qwen", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen", r".*\.(q_proj|gate_proj|up_proj|down_proj)"),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", "all-linear"),
    ],
)
def test_the_targets_are_those_of_lora(kind, targets, tmp_path):
    model = get_peft_model(build(kind), DLoRConfig(r=2, target_modules=targets, init_weights=False)).eval()
    with warnings.catch_warnings():
        # of LoRA, PEFT compares them with the names of modules alone
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        lora = get_peft_model(build(kind), LoraConfig(r=2, target_modules=targets))
    config, theirs = model.peft_config["default"], lora.peft_config["default"]
    assert config.target_modules == theirs.target_modules
    assert set(config.target_parameters) == set(theirs.target_parameters)
    assert config.rank_pattern == theirs.rank_pattern
    ranks = {layer.r["default"] for layer in model.modules() if isinstance(layer, DLoRLayer)}
    assert ranks == {2, 4}
    want = answer(model)
    assert distance(want, answer(build(kind))) > 1e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(build(kind), tmp_path)), want)
    assert distance(answer(model.merge_and_unload()), want) < 1e-5


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], r".*\.(up_proj|down_proj)"])
def test_half_of_a_fused_weight_is_refused(targets):
    with pytest.raises(ValueError, match=r"up_proj without also targeting gate_proj"):
        get_peft_model(build(), DLoRConfig(target_modules=targets))


def test_a_regex_for_the_attention_of_one_layer_adapts_that_layer():
    model = get_peft_model(build(), DLoRConfig(target_modules=r"model\.layers\.1\.self_attn\.q_proj"))
    assert adapted_names(model) == {("base_model.model.model.layers.1.self_attn.q_proj", "weight")}


def test_a_regex_for_the_experts_of_one_layer_is_refused_with_the_other_way():
    model = build()
    regex = r".*\.q_proj|model\.layers\.1\.mlp\.experts\.(gate|up|down)_proj"
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj.*in full in target_parameters"):
        get_peft_model(model, DLoRConfig(target_modules=regex))
    in_full = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    adapted = get_peft_model(build(), DLoRConfig(target_modules=["q_proj"], target_parameters=in_full))
    assert adapted_names(adapted) == {
        *((f"base_model.model.model.layers.{layer}.self_attn.q_proj", "weight") for layer in (0, 1)),
        *(("base_model.model.model.layers.1.mlp.experts", name) for name in ("gate_up_proj", "down_proj")),
    }


def test_a_second_adapter_of_the_same_targets():
    model = get_peft_model(build(), DLoRConfig(target_modules="all-linear", r=2))
    model.add_adapter("second", DLoRConfig(target_modules="all-linear", mode="additive"))
    model.set_adapter("second")
    answer(model).sum()
    assert model.peft_config["second"].rank_pattern == {r".*\.gate_up_proj": 16}


@pytest.mark.parametrize(
    "left_out",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": r".*layers\.0\..*"},
        {"exclude_modules": ["layers.0.mlp.experts", "layers.0.self_attn.q_proj"]},
    ],
)
@pytest.mark.parametrize("by", ["name of the projections", "name of the parameters"])
def test_parameters_of_layers_that_are_left_out_stay(by, left_out, tmp_path):
    targets = (
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
        if by == "name of the projections"
        else {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    )
    model = get_peft_model(build(), DLoRConfig(r=2, init_weights=False, **targets, **left_out)).eval()
    assert {name for name, _ in adapted_names(model)} == {
        f"base_model.model.model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.experts")
    }
    want = answer(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(build(), tmp_path)), want)


@pytest.mark.parametrize(
    ("field", "targets"),
    [
        ("target_modules", {"target_modules": ["q_proj", "typo_proj"]}),
        ("target_parameters", {"target_modules": ["q_proj"], "target_parameters": ["down_proj", "typo_proj"]}),
    ],
)
def test_a_target_that_matches_nothing_is_named(field, targets):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(build(), DLoRConfig(**targets))
    assert any(f"of {field}, ['typo_proj'] matched nothing" in str(warning.message) for warning in caught)
