"""`adapter: dlor` in axolotl, by its own configuration, plugin manager, loader and commands."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dlor_peft import DLoRConfig

pytest.importorskip("axolotl", reason="axolotl is not installed: it pins torch, peft and transformers")

# what axolotl does with its own dependencies
pytestmark = pytest.mark.filterwarnings("ignore")

STORIES = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
PLUGIN = "dlor_peft.integrations.axolotl.DLoRPlugin"
ENVIRONMENT = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def write(tmp_path):
    """Writes a configuration of axolotl; keyword arguments replace settings, None removes them."""
    rows = [{"text": f"once upon a time there was a little girl {index}"} for index in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**changes):
        settings = {
            "base_model": str(STORIES),
            "plugins": [PLUGIN],
            "adapter": "dlor",
            "dlor_r": 4,
            "dlor_target_modules": "all-linear",
            "dlor_rank_pattern": {"q_proj": 2},
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "completion"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 64,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
        return path

    return write


@pytest.fixture
def parse(write, monkeypatch):
    """What axolotl makes of such a configuration."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    # it is one for the whole process
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", OrderedDict())
    return lambda **changes: load_cfg(str(write(**changes)))


def load(**options):
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32", **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def load_adapter(model, cfg, **options):
    from axolotl.loaders.adapter import load_adapter

    return load_adapter(model, cfg, cfg.adapter, **options)


def test_the_configuration_becomes_an_adapter(parse):
    cfg = parse(dlor_mode="multiplicative", dlor_depth=2, dlor_side="input")
    model, config = load_adapter(load(), cfg)
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"] is config
    assert (config.r, config.mode, config.depth, config.task_type) == (4, "multiplicative", 2, "CAUSAL_LM")
    ranks = {name.split(".")[-4]: tensor.shape for name, tensor in model.named_parameters() if "dlor_U" in name}
    assert ranks["q_proj"] == (2, 64, 2)
    assert ranks["k_proj"] == (2, 64, 4)
    assert torch.equal(logits(model), logits(load()))


def test_trainers_that_wrap_the_model_get_the_config_alone(parse):
    model, config = load_adapter(load(), parse(), config_only=True)
    assert model is None
    assert isinstance(config, DLoRConfig)


def test_other_adapters_are_left_to_axolotl(parse):
    own = dict.fromkeys(("dlor_r", "dlor_target_modules", "dlor_rank_pattern"))
    cfg = parse(adapter="lora", lora_r=2, lora_alpha=4, lora_target_modules=["q_proj"], **own)
    _, config = load_adapter(load(), cfg)
    assert isinstance(config, LoraConfig)


def test_a_saved_adapter_is_loaded_where_it_is_what_is_configured(parse, tmp_path):
    torch.manual_seed(0)
    config = DLoRConfig(r=4, target_modules="all-linear", rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM")
    saved = get_peft_model(load(), config)
    with torch.no_grad():
        for name, tensor in saved.named_parameters():
            if "dlor_U" in name:
                tensor.normal_(std=0.1)
    saved.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    model, _ = load_adapter(load(), parse(lora_model_dir=folder))
    assert torch.equal(logits(model), logits(saved))
    assert any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"dlor_r is 8, but the adapter in .* was trained with 4"):
        load_adapter(load(), parse(lora_model_dir=folder, dlor_r=8))
    with pytest.raises(ValueError, match="starts a new adapter, but lora_model_dir"):
        load_adapter(load(), parse(lora_model_dir=folder), config_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dlor_dept": 2}, "'dlor_dept' is no setting of DLoR. Did you mean 'dlor_depth'"),
        ({"dlor_mode": "scald"}, "mode must be one of"),
        ({"dlor_depth": 2}, 'needs mode="multiplicative"'),
        ({"lora_r": 8}, "lora_r is LoRA's.*Use dlor_r"),
        ({"lora_alpha": 8}, "lora_alpha is LoRA's.*DLoR has no such setting"),
        ({"lora_dropout": 0.1}, "Use dlor_dropout"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel is LoRA's"),
        ({"peft_use_dora": True}, "peft_use_dora is LoRA's"),
        ({"peft_trainable_token_indices": [3]}, "Use dlor_trainable_token_indices"),
        ({"lora_modules_to_save": ["lm_head"], "dlor_modules_to_save": ["norm"]}, "Give one of them"),
        ({"load_in_4bit": True}, "load_in_4bit has no effect"),
        ({"load_in_8bit": True}, "load_in_8bit has no effect"),
        ({"merge_lora": True}, "Set `merge_method: legacy`"),
        ({"adapter": "lora", "lora_r": 8, "lora_alpha": 8}, "dlor_r, dlor_target_modules, dlor_rank_pattern given"),
        ({"relora": True, "jagged_restart_steps": 5}, "must support ReLoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused(parse, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(**changes)


def test_modules_to_save_under_the_name_that_axolotl_looks_for(parse):
    _, config = load_adapter(load(), parse(lora_modules_to_save=["embed_tokens", "lm_head"]), config_only=True)
    assert config.modules_to_save == ["embed_tokens", "lm_head"]


@pytest.mark.slow
def test_trains_and_merges_from_the_command_line(write, tmp_path):
    path = str(write())

    def axolotl(command, *options):
        subprocess.run(
            [sys.executable, "-m", f"axolotl.cli.{command}", path, *options],
            check=True,
            env={**os.environ, **ENVIRONMENT},
            cwd=tmp_path,
        )

    axolotl("train")
    base = logits(load())
    model = PeftModel.from_pretrained(load(), tmp_path / "out")
    want = logits(model)
    assert model.peft_config["default"].rank_pattern == {"q_proj": 2}
    assert not torch.allclose(want, base)
    axolotl("merge_lora", "--merge_method", "legacy")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype="float32")
    assert torch.allclose(logits(merged), want, atol=1e-4)
