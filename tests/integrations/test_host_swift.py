"""`--tuner_type dlor` in ms-swift, by its own arguments, pipelines and commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import dlor_peft
from dlor_peft import DLoRConfig

pytest.importorskip("swift", reason="ms-swift is not installed: it pins peft and transformers")

# what swift does with its own dependencies
pytestmark = pytest.mark.filterwarnings("ignore")

STORIES = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
PLUGIN = str(Path(dlor_peft.__file__).parent / "integrations" / "ms_swift.py")
IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture
def dataset(tmp_path):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "once upon a time"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 16)
    return str(tmp_path / "rows.jsonl")


@pytest.fixture
def prepare(dataset, tmp_path, monkeypatch):
    """The model as swift's training gets it, from swift's own arguments."""
    # swift sets variables, and puts the plugin's folder on the path
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", sys.path.copy())
    from swift.arguments import SftArguments
    from swift.pipelines.train.tuner import TunerMixin

    def prepare(settings=None, **changes):
        args = SftArguments(
            model=str(STORIES),
            model_type="llama",
            template="chatml",
            torch_dtype="float32",
            use_hf=True,
            dataset=[dataset],
            output_dir=str(tmp_path / "out"),
            external_plugins=[PLUGIN],
            tuner_type="dlor",
            model_kwargs=json.dumps(settings or {}),
            use_cpu=True,
            **changes,
        )
        return TunerMixin.prepare_model(args, args.get_model_processor()[0])

    return prepare


def load():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_arguments_become_an_adapter(prepare):
    model = prepare({"dlor_r": 4, "dlor_mode": "multiplicative", "dlor_depth": 2}, modules_to_save=["norm"])
    config = model.peft_config["default"]
    assert isinstance(config, DLoRConfig)
    assert (config.r, config.mode, config.depth, config.task_type) == (4, "multiplicative", 2, "CAUSAL_LM")
    assert {"q_proj", "down_proj"} < set(config.target_modules)
    assert config.modules_to_save == ["norm"]
    assert torch.equal(logits(model), logits(load()))
    assert prepare(target_modules=["q_proj"]).peft_config["default"].target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"dlor_dept": 2}, {}, "'dlor_dept' is no setting of DLoR. Did you mean 'dlor_depth'"),
        ({"dlor_target_modules": ["q_proj"]}, {}, "is set by --target_modules or --target_regex"),
        ({"dlor_mode": "scald"}, {}, "mode must be one of"),
        ({}, {"lora_rank": 4}, "--lora_rank is 4, which is LoRA's"),
        ({}, {"use_dora": True}, "--use_dora is True, which is LoRA's"),
        ({}, {"init_weights": "pissa"}, "--init_weights is 'pissa', which is LoRA's"),
        ({}, {"use_swift_lora": True}, "DLoR is a method of PEFT"),
    ],
)
def test_what_would_be_ignored_is_refused(prepare, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(settings, **changes)


@pytest.mark.slow
def test_trains_resumes_and_merges_from_the_command_line(dataset, tmp_path):
    def swift(command, *options):
        subprocess.run(
            [sys.executable, "-m", f"swift.cli.{command}", "--use_hf", "true", *options],
            check=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            cwd=tmp_path,
        )

    common = (
        *("--model", str(STORIES), "--model_type", "llama", "--template", "chatml", "--torch_dtype", "float32"),
        *("--dataset", dataset, "--external_plugins", PLUGIN, "--tuner_type", "dlor", "--use_cpu", "true"),
        *("--model_kwargs", json.dumps({"dlor_r": 4}), "--report_to", "none"),
        *("--learning_rate", "1e-2", "--lr_scheduler_type", "constant"),
        *("--output_dir", str(tmp_path / "out"), "--add_version", "false", "--max_length", "128"),
    )
    swift("sft", *common, "--max_steps", "2", "--save_steps", "2")
    first = tmp_path / "out" / "checkpoint-2"
    swift("sft", *common, "--max_steps", "3", "--save_steps", "3", "--resume_from_checkpoint", str(first))
    adapter = tmp_path / "out" / "checkpoint-3"
    want = logits(PeftModel.from_pretrained(load(), adapter))
    assert not torch.allclose(want, logits(load()))
    assert not torch.equal(want, logits(PeftModel.from_pretrained(load(), first)))
    # the plugin and the tuner are those of the checkpoint
    swift("export", "--adapters", str(adapter), "--merge_lora", "true", "--output_dir", str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    assert torch.allclose(logits(merged), want, atol=1e-4)
