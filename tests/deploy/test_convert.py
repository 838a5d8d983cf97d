"""LoRA and DoRA adapters of PEFT as DLoR adapters: the same outputs, and errors where there is no equal."""

import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from saved import llava, write_lora, write_lora_of
from tiny_models import TARGETS, build, distance, logits
from transformers import MixtralConfig, MixtralForCausalLM, ViTConfig, ViTModel

from dlor_peft.cli import main
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.checkpoint import Checkpoint
from dlor_peft.deploy.convert import Target, convert, write_converted
from dlor_peft.deploy.export_lora import LoraExport
from dlor_peft.deploy.lora import read_lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings"
)


def converted(folder, target=None, with_base=False):
    """What becomes of `folder/lora`, in `folder/out`; it is read back, which checks it."""
    base = Checkpoint(folder / "base", with_weights=False) if with_base else None
    write_converted(convert(read_lora(folder / "lora"), target, base), folder / "out")
    return read_adapter(folder / "out")


def outputs(folder, name, kind):
    model = build(kind)
    with warnings.catch_warnings():
        # no key of the adapter may be missing
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out|Model has `tie_word_embeddings")
        return logits(PeftModel.from_pretrained(model, folder / name).eval(), kind)


CONFIGS = {
    "plain": {},
    "alpha": {"lora_alpha": 12},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"k_proj": 7}},
    "bias": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "in full": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "regex": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "one layer": {"layers_to_transform": [1], "exclude_modules": ["layers.1.self_attn.k_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_outputs_of_a_lora(tmp_path, name):
    config = {"r": 3, "target_modules": TARGETS["llama"], **CONFIGS[name]}
    write_lora("llama", LoraConfig(**config), tmp_path)
    want = outputs(tmp_path, "lora", "llama")
    assert distance(want, logits(build("llama"), "llama")) > 0.01
    converted(tmp_path)
    assert distance(outputs(tmp_path, "out", "llama"), want) < 1e-5


@pytest.mark.parametrize("target", [Target("additive"), Target(side="both"), Target("additive", diagonal="none")])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_every_kind_of_model_and_form(tmp_path, kind, target):
    write_lora(kind, LoraConfig(r=3, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"), tmp_path)
    config = converted(tmp_path, target, with_base=True).config
    assert (config.mode, config.diagonal) == (target.mode or "scaled", target.diagonal or "vector")
    assert distance(outputs(tmp_path, "out", kind), outputs(tmp_path, "lora", kind)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dora_is_scaled_on_the_outputs(tmp_path, kind):
    config = LoraConfig(r=4, target_modules=TARGETS[kind], use_dora=True, fan_in_fan_out=kind == "gpt2")
    write_lora(kind, config, tmp_path)
    with pytest.raises(ValueError, match="with its base model only, since it is a DoRA"):
        converted(tmp_path)
    with pytest.raises(ValueError, match="leave out --mode additive"):
        converted(tmp_path, Target("additive"), with_base=True)
    assert not (tmp_path / "out").exists()
    adapter = converted(tmp_path, with_base=True)
    assert (adapter.config.mode, adapter.config.side, adapter.config.diagonal) == ("scaled", "output", "vector")
    assert distance(outputs(tmp_path, "out", kind), outputs(tmp_path, "lora", kind)) < 1e-5


def test_experts(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).eval()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = write_lora_of(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters), tmp_path)
    want = logits(model, "llama")
    with pytest.raises(ValueError, match="it adapts parameters, whose shapes do not show: pass --base"):
        converted(tmp_path)
    converted(tmp_path, with_base=True)
    again = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    assert distance(logits(PeftModel.from_pretrained(again, tmp_path / "out").eval(), "llama"), want) < 1e-5


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                       image_size=8, patch_size=4)  # fmt: skip
    base = ViTModel(config, add_pooling_layer=False).eval()
    targets = ["query", "patch_embeddings.projection"]
    model = write_lora_of(base, LoraConfig(r=2, lora_alpha=6, target_modules=targets), tmp_path)
    with pytest.raises(ValueError, match="groups do not show: pass --base"):
        converted(tmp_path)
    converted(tmp_path, with_base=True)
    pixels = torch.randn(2, 3, 8, 8)
    again = PeftModel.from_pretrained(
        ViTModel.from_pretrained(tmp_path / "base", add_pooling_layer=False), tmp_path / "out"
    )
    with torch.no_grad():
        assert distance(again.eval()(pixels).last_hidden_state, model(pixels).last_hidden_state) < 1e-5


def test_names_of_transformers_4_are_brought_up_to_date(tmp_path):
    base = llava()
    model = write_lora_of(base, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|up)_proj"), tmp_path)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    old = {key.replace("model.model.language_model.", "model.language_model.model."): t for key, t in stored.items()}
    assert old.keys() != stored.keys()
    save_file(old, tmp_path / "lora" / "adapter_model.safetensors")
    converted(tmp_path, with_base=True)
    again = PeftModel.from_pretrained(llava(), tmp_path / "out").eval()
    assert distance(logits(again, "llama"), logits(model, "llama")) < 1e-5


def test_training_goes_on_with_the_diagonal(tmp_path):
    write_lora("llama", LoraConfig(r=3, target_modules=TARGETS["llama"], lora_dropout=0.25), tmp_path)
    assert converted(tmp_path).config.dlor_dropout == 0.25
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "out", is_trainable=True)
    trained = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"dlor_diag", "dlor_U", "dlor_V"}


def test_half_precision_is_kept_where_the_scaling_rounds_nothing(tmp_path):
    write_lora("llama", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    layer = convert(read_lora(tmp_path / "lora")).layers["model.layers.0.self_attn.q_proj"]
    assert {tensor.dtype for tensor in layer.values()} == {torch.bfloat16}
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 3}))
    layer = convert(read_lora(tmp_path / "lora")).layers["model.layers.0.self_attn.q_proj"]
    assert layer["dlor_U"].dtype == torch.float32


@pytest.mark.parametrize("target", [Target(), Target("additive", diagonal="none")])
def test_there_and_back(tmp_path, target):
    write_lora("llama", LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS["llama"]), tmp_path)
    adapter = converted(tmp_path, target)
    LoraExport(Checkpoint(tmp_path / "base", with_weights=False), adapter).write(tmp_path / "back")
    sent, came = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
    assert sent.keys() == came.keys()
    for key, tensor in came.items():
        # padded to rank 8, with the scaling in B
        is_A = key.endswith("lora_A.weight")
        kept, rest = (tensor[:3], tensor[3:]) if is_A else (tensor[:, :3], tensor[:, 3:])
        assert torch.equal(kept, sent[key] if is_A else 2 * sent[key])
        assert not rest.any()


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"peft_type": "VERA"}, "is not a LoRA adapter: its peft_type is 'VERA'"),
        (
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
            "alora_invocation_tokens is set, and aLoRA acts on the tokens after",
        ),
        ({"lora_bias": True}, "lora_bias is set, and lora_B has a bias"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "LoftQ replaced the base weights"),
        ({"r": 5}, r"has lora_A \(3, 16\), lora_B \(16, 3\), while its configuration says r=5"),
        ({"use_dora": True}, "has no magnitude, while its configuration says use_dora=True"),
        ({"ensure_weight_tying": True}, "it ties weights: pass --base"),
        ({"r": "three"}, "is not what save_pretrained writes"),
    ],
)
def test_refusals(tmp_path, capsys, changes, finding):
    write_lora("llama", LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    code = main(["convert", "--from", "lora", str(tmp_path / "lora"), "--out", str(tmp_path / "out")])
    assert code == 2
    assert re.search(finding, capsys.readouterr().err)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base", "lora"]


def test_a_base_that_does_not_fit(tmp_path):
    write_lora("llama", LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    build("bert").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"does not fit"):
        converted(tmp_path, with_base=True)


def test_the_command(tmp_path, capsys):
    write_lora("llama", LoraConfig(r=3, target_modules=TARGETS["llama"]), tmp_path)
    command = ["convert", "--from", "lora", str(tmp_path / "lora"), "--out", str(tmp_path / "out")]
    assert main([*command, "--mode", "additive"]) == 0
    assert "8 layers, as mode additive, side auto, diagonal vector, with the same outputs" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from the LoRA adapter {tmp_path / 'lora'}, with the same outputs." in card
    assert "- dlor" in card
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
