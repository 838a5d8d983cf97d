"""environment.json and recipe.yaml: enough to run a run again, and nothing that is nobody's business."""

import getpass
import json
import platform
import socket
import sys
from importlib.metadata import version
from pathlib import Path

from dlor_peft.cli import main
from dlor_peft.training.environment import HIDDEN, environment


def losses(folder):
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_resolved_recipe_gives_the_same_run_again(write_recipe, tmp_path):
    overrides = ["training.max_steps=5", "training.learning_rate=3e-3", "adapter.r=3"]
    assert main(["train", str(write_recipe()), *overrides]) == 0
    assert main(["train", str(tmp_path / "out" / "recipe.yaml"), f"output_dir={tmp_path / 'again'}"]) == 0
    first, again = tmp_path / "out", tmp_path / "again"
    assert len(losses(first)) == 5
    assert losses(first) == losses(again)
    assert (first / "layers.jsonl").read_text() == (again / "layers.jsonl").read_text()
    facts = [json.loads((folder / "environment.json").read_text()) for folder in (first, again)]
    assert facts[0]["packages"] == facts[1]["packages"]


def test_versions_hardware_and_variables(monkeypatch):
    monkeypatch.setenv("DLOR_KERNELS", "torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LANG", "C")
    facts = environment()
    assert facts["packages"]["torch"] == version("torch")
    assert facts["packages"]["dlor-peft"] == version("dlor-peft")
    assert facts["python"] == platform.python_version()
    assert facts["cpu_cores"] > 0
    assert facts["variables"]["DLOR_KERNELS"] == "torch"
    assert facts["variables"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert "LANG" not in facts["variables"]
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(facts["commit"].removesuffix("-dirty")) == 40


def test_no_secret_and_no_name_of_person_or_machine(monkeypatch):
    home = str(Path.home())
    arguments = ["/opt/bin/dlor", "train", f"{home}/my.yaml", "training.hub_token=abc123", "model.path=x/hf_abcDEF123"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("TORCH_SECRET", "abc123")
    monkeypatch.setenv("HF_TOKEN", "hf_abcDEF123")
    monkeypatch.setenv("TORCH_HOME", f"{home}/torch")
    facts = environment()
    text = json.dumps(facts)
    assert "abc123" not in text
    assert "abcDEF123" not in text
    assert "HF_TOKEN" not in text
    assert facts["command"][:2] == ["dlor", "train"]
    assert facts["command"][3] == f"training.hub_token={HIDDEN}"
    assert facts["variables"]["TORCH_HOME"] == ("~/torch" if home != "/" else "//torch")
    values = json.dumps({**facts, "packages": None, "cpu": None})
    for name in (getpass.getuser(), socket.gethostname()):
        assert f"/{name}/" not in values
    assert f'"{socket.gethostname()}"' not in values
