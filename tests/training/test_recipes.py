"""Every packaged recipe runs from end to end: as it is, or with stand-ins for the Hub's models and data."""

import json
from pathlib import Path

import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from stand_ins import stand_in_data

from dlor_peft.cli import main
from dlor_peft.training.packaged import packaged_recipes

RECIPES = {name: yaml.safe_load(path.read_text()) for name, path in packaged_recipes().items()}
ON_THE_HUB = [name for name, recipe in RECIPES.items() if "dataset" in recipe["data"]]
HERE = [name for name in RECIPES if name not in ON_THE_HUB]
SHORT = ["training.max_steps=2", "training.disable_tqdm=true", "training.dataloader_pin_memory=false"]


def run(name, tmp_path, *overrides):
    assert main(["train", name, *SHORT, f"output_dir={tmp_path}/out", *overrides]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["after"].keys() == metrics["before"].keys()
    return metrics


@pytest.mark.parametrize("name", HERE)
def test_a_recipe_with_its_own_data_runs(name, tmp_path):
    metrics = run(name, tmp_path, "data.max_rows=200")
    assert all(state["num_different"] == 0 for state in metrics["states"].values())


@pytest.mark.parametrize("method", ["DLOR", "LORA"])
@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_recipe_of_the_hub_runs_with_stand_ins(name, method, stand_in_model, tmp_path):
    recipe = RECIPES[name]
    overrides = [
        f"model.path={stand_in_model(recipe['model']['path'])}",
        *stand_in_data(recipe, tmp_path),
        f"adapter.peft_type={method}",
        "training.use_cpu=true",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=2",
    ]
    if recipe["task"]["type"] in ("sft", "dpo"):
        overrides += ["task.prompts=2", "task.new_tokens=8"]
    metrics = run(name, tmp_path, *overrides)
    expected = {"reloaded"} if "quantization" in recipe["model"] else {"reloaded", "merged"}
    assert set(metrics["states"]) == expected
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == method


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_method_and_fields_that_all_have_stand_in_the_adapter_section(name):
    """adapter.peft_type is the one flag that makes a recipe a LoRA's."""
    fields = RECIPES[name]["adapter"].keys() - {"peft_type"}
    assert fields <= set(PEFT_TYPE_TO_CONFIG_MAPPING["LORA"].__dataclass_fields__)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_states_command_hardware_memory_and_time(name):
    lines = packaged_recipes()[name].read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[0].startswith(f"# dlor train {name}")
    if name in HERE:
        assert "Measured on" in header
        assert "cores" in header
        assert "seconds" in header or "minutes" in header
    else:
        for part in ("Hardware: ", "Memory (estimate): ", "Time (estimate): ", "Not run on", "GB"):
            assert part in header
    assert max(map(len, lines)) <= 121


def test_the_help_and_the_readme_list_every_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out.splitlines()
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, recipe in RECIPES.items():
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in shown)
        assert f"| `{name}` | {recipe['task']['type']} | " in readme


@pytest.mark.slow
def test_the_quickstart_beats_the_linear_probe(tmp_path):
    assert main(["train", "quickstart", f"output_dir={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] > metrics["baseline"]["accuracy"]
    assert metrics["states"]["merged"]["num_outputs"] == 3_080
