"""A saved adapter whose layers differ in form is checked layer by layer."""

import json

import pytest
from saved import adapt, adapt_tiny
from transformers import MixtralConfig, MixtralForCausalLM

from dlor_peft import DLoRConfig
from dlor_peft.deploy.adapter import read_adapter


def edit(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_modes_and_sides(tmp_path):
    patterns = {"mode_pattern": {"q_proj": "additive"}, "side_pattern": {"up_proj": "both"}}
    adapt_tiny("llama", "scaled", tmp_path, **patterns)
    read = read_adapter(tmp_path / "adapter")
    assert {name for name, tensors in read.layers.items() if "dlor_diag_in" in tensors} == {
        f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)
    }
    edit(tmp_path / "adapter", side_pattern={"q_proj": "both"}, mode_pattern={})
    with pytest.raises(ValueError, match=r"up_proj has dlor_diag_in, while .* side 'auto'"):
        read_adapter(tmp_path / "adapter")
    edit(tmp_path / "adapter", side_pattern={"q_proj|up_proj": "both"}, mode_pattern={"q_proj": "additive"})
    with pytest.raises(ValueError, match=r'side="both" needs mode="scaled".*q_proj'):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern", [{"rank_pattern": {"experts.down_proj": 2}}, {"rank_pattern": {"gate_up_proj": 0}}]
)
def test_parameters_are_named_in_patterns(pattern, tmp_path):
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, pad_token_id=0,
        )
    )  # fmt: skip
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = DLoRConfig(r=3, target_modules=["q_proj"], target_parameters=parameters, init_weights=False, **pattern)
    adapt(base, config, tmp_path)
    experts = "model.layers.0.mlp.experts"
    assert {experts, f"{experts}.base_layer"} < set(read_adapter(tmp_path / "adapter").layers)
    edit(tmp_path / "adapter", rank_pattern={"experts.down_proj": 5, "gate_up_proj": 5})
    with pytest.raises(ValueError, match=r"experts(\.base_layer)? has .* r 3"):
        read_adapter(tmp_path / "adapter")
