import json

import pytest

from dlor_peft.cli import main
from dlor_peft.training.sources import packaged_recipes


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_runs(name, tmp_path):
    overrides = ["training.max_steps=2", "data.max_rows=200", "training.disable_tqdm=true", f"output_dir={tmp_path}"]
    assert main(["train", name, *overrides]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert all(state["num_different"] == 0 for state in metrics["states"].values())


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_states_its_command_hardware_and_time(name):
    header = [line for line in packaged_recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert f"dlor train {name}" in header[0]
    assert any("cores" in line for line in header)
    assert any("seconds" in line or "minutes" in line for line in header)


@pytest.mark.slow
def test_the_quickstart_beats_the_linear_probe(tmp_path):
    assert main(["train", "quickstart", f"output_dir={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] > metrics["baseline"]["accuracy"]
    assert metrics["states"]["merged"]["num_outputs"] == 3_080
