import dataclasses
import typing

import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from dlor_peft import DLoRConfig
from dlor_peft.training.configs import build_adapter_config, build_training_arguments
from dlor_peft.training.packaged import packaged_recipes
from dlor_peft.training.recipe import explain, load_recipe, to_yaml


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=x"], r"modle: unknown key\. Did you mean 'model'\? Known: adapter, data, model"),
        (["model.pathh=x"], r"model\.pathh: unknown key\. Did you mean 'path'\?"),
        (["task.basline=x"], r"task\.basline: unknown key\. Did you mean 'baseline'\?"),
        (["task.type=regression"], r"^task\.?\w*: .*'text-classification', 'sft'"),
        (["optimizer.head_learning_rate=fast"], r"^optimizer\.head_learning_rate: .*valid number.*'fast'"),
        (["output_dir="], r"^output_dir: required, but not given\."),
        (["seed=-1"], r"^seed: .*greater than or equal to 0, but it is -1\."),
        (["seed='1'"], r"^seed: .*valid integer, but it is '1'\."),
        (["model.dtype=fp32"], r"^model\.dtype: .*'float32'.*but it is 'fp32'"),
        (["data.dataset=banking77"], r"^data: give either dataset .* or files"),
        (["data.files.test="], r"^data: files lacks test\."),
        (["data.files.val=x"], r"^data\.files\.val.*'train', 'dev' or 'test'"),
        (["data.max_rows=0"], r"^data\.max_rows: .*greater than 0"),
        (["task.head_from_probe=3.0", "model.pooling="], r"^task\.head_from_probe needs model\.pooling: mean"),
        (["task.baseline=linear-probe", "model.pooling="], r"^task\.baseline: linear-probe needs model\.pooling"),
        (["task.baseline=linear-probe", "data.files.dev="], r"^task\.baseline: linear-probe needs a dev split"),
        (["task=sft"], r"^model\.pooling is for text-classification"),
        (["adapter.peft_type=DLORA"], r"^adapter\.peft_type: 'DLORA' is no registered PEFT method\. Did you mean"),
        (["adapter.dept=2"], r"^adapter\.dept: no field of DLoRConfig\..*adapter\.dept=.*Did you mean 'depth'\?"),
        (["adapter.r=8.5"], r"^adapter\.r: .*valid integer, but it is 8\.5\."),
        (["adapter.r=true"], r"^adapter\.r: .*valid integer, but it is True\."),
        (["adapter.mode=scaledd"], r"^adapter: DLoRConfig does not accept these values: .*Did you mean 'scaled'\?"),
        (["training.lerning_rate=1"], r"^training\.lerning_rate: no field of TrainingArguments\..*'learning_rate'\?"),
        (["training.learning_rate=high"], r"^training\.learning_rate: .*valid number, but it is 'high'\."),
        (["training.lr_scheduler_type=cosin"], r"^training: TrainingArguments does not accept these values: .*cosin"),
        (["training.output_dir=x"], r"^training\.output_dir: set the top-level output_dir instead"),
        (["training.seed=1"], r"^training\.seed: set the top-level seed instead"),
    ],
)
def test_each_mistake_is_named_with_its_key(write_recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(write_recipe()), overrides)


def test_several_mistakes_are_told_together(write_recipe):
    with pytest.raises(ValueError, match=r"seed: [^\n]*\nmodel\.dtype|model\.dtype: [^\n]*\nseed"):
        load_recipe(str(write_recipe()), ["seed=-1", "model.dtype=x"])


def test_a_method_change_over_foreign_fields_says_how_to_drop_them(write_recipe):
    path = str(write_recipe(adapter={"peft_type": "DLOR", "r": 2, "mode": "scaled", "side": "auto"}))
    with pytest.raises(ValueError, match=r"adapter\.mode, adapter\.side: no field of LoraConfig\.") as error:
        load_recipe(path, ["adapter.peft_type=LORA"])
    assert "add adapter.mode= adapter.side= on the command line" in str(error.value)
    recipe, _ = load_recipe(path, ["adapter.peft_type=LORA", "adapter.mode=", "adapter.side="])
    assert type(build_adapter_config(recipe)).__name__ == "LoraConfig"


def test_values_reach_the_configs_in_their_own_types(write_recipe):
    overrides = ["adapter.target_modules=[query, value]", "adapter.modules_to_save=[classifier]", "seed=3"]
    recipe, _ = load_recipe(str(write_recipe()), [*overrides, "training.weight_decay=1"])
    config, arguments = build_adapter_config(recipe), build_training_arguments(recipe)
    assert isinstance(config, DLoRConfig)
    assert config.target_modules == {"query", "value"}
    assert config.task_type == "SEQ_CLS"
    assert arguments.weight_decay == 1.0
    assert arguments.seed == 3
    assert arguments.output_dir.endswith("out/checkpoints")


def test_relative_paths_are_relative_to_where_they_are_written(write_recipe, tmp_path, monkeypatch):
    path = write_recipe()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe, _ = load_recipe(str(path), ["data.files.test=mine.jsonl", "model.path=./encoder"])
    assert recipe.data.files == {
        "train": str(tmp_path / "train.jsonl"),
        "dev": str(tmp_path / "dev.jsonl"),
        "test": str(elsewhere / "mine.jsonl"),
    }
    assert recipe.model.path == str(elsewhere / "encoder")


def test_the_saved_recipe_resolves_to_itself(write_recipe, tmp_path):
    recipe, _ = load_recipe(str(write_recipe()), ["adapter.r=1"])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "again" / "recipe.yaml"))[0] == recipe


def test_explain_is_yaml_with_an_origin_for_every_value(write_recipe):
    text = explain(*load_recipe(str(write_recipe()), ["adapter.r=1"]))
    values = yaml.safe_load(text)
    assert values["adapter"]["r"] == 1
    assert values["adapter"]["mode"] == "scaled"
    assert values["training"]["learning_rate"] == 0.01
    origins = {line.split(":")[0].strip(): line.split("# ")[1] for line in text.splitlines() if "  # " in line}
    assert origins["r"] == "command line"
    assert origins["mode"] == "default"
    assert origins["target_modules"] == "recipe"
    assert origins["seed"] == "default"


@pytest.mark.parametrize("name", packaged_recipes())
def test_one_flag_changes_the_method_of_a_packaged_recipe(name):
    # transformers refuses bfloat16 where there is no GPU
    recipe, _ = load_recipe(name, ["adapter.peft_type=LORA", "training.bf16=false"])
    assert type(build_adapter_config(recipe)).__name__ == "LoraConfig"


def test_the_hints_of_every_registered_method_can_be_read():
    for config_class in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        hints = typing.get_type_hints(config_class)
        assert {field.name for field in dataclasses.fields(config_class)} <= set(hints)
