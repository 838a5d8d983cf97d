import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dlor_peft import DLoRConfig
from dlor_peft.cli import main

HELP = {
    "": ["train", "inspect", "dlor train"],
    "train": ["adapter.peft_type=LORA", "--explain", "--overwrite", "an empty value drops a key", "smol-lm-sft"],
    "inspect": ["ADAPTER", "--base", "--plot", "--json", "Roy & Vetterli", "have no such map"],
    "eval": ["RECIPE_OR_ADAPTER", "--adapter", "--lm-eval-include", "data.max_rows=50"],
    "merge": ["--adapter", "dlor_merge.json"],
}


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter on two layers of 6 x 4, its diagonal 0.5 in the first."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))
    config = DLoRConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"])
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "0.dlor_diag" in name:
                parameter.fill_(-0.5)
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run_dlor(*arguments):
    return subprocess.run([sys.executable, "-m", "dlor_peft.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("verb", HELP)
def test_help_answers_in_under_a_second(verb):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run_dlor(*verb.split(), "--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert all(text in result.stdout for text in HELP[verb])
    assert min(seconds) < 1


@pytest.mark.parametrize("verb", ["train", "eval", "inspect", "merge"])
def test_help_fits_the_terminal(verb):
    assert max(map(len, run_dlor(verb, "--help").stdout.splitlines())) <= 119


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "dlor: error: no recipe 'quikstart'"),
        (["train", "quickstart", "smol-lm-sft"], "dlor: error: 'smol-lm-sft': one recipe, then overrides"),
        (["train", "adapter.rr=4"], "dlor: error: adapter.rr: no field of DLoRConfig."),
        (["train", "model.path=package:no-such-model"], "dlor-peft's extra 'quickstart'"),
        (["eval", "quickstart"], "run dlor train quickstart first, or name the adapter's folder with --adapter"),
        (["eval", "quickstart", "smol-lm-sft"], "dlor: error: 'smol-lm-sft': one recipe or adapter, then overrides"),
        (["eval", "quickstart", "--lm-eval-include", "x"], "--lm-eval-include belongs to --lm-eval"),
        (["inspect", "./nowhere"], "dlor: error: there is no folder ./nowhere"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.splitlines()[-1].startswith("dlor: error: ")


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("DLOR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "quikstart"])


@pytest.mark.parametrize("arguments", [["fly"], [], ["train", "--fast"], ["inspect"]])
def test_unknown_words_exit_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: dlor" in capsys.readouterr().err


def test_options_may_stand_between_overrides(capsys):
    assert main(["train", "quickstart", "adapter.r=4", "--explain", "seed=7"]) == 0
    output = capsys.readouterr().out
    assert "r: 4" in output
    assert "seed: 7" in output


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dlor_peft.cli", "train", "smol-lm-sft", f"output_dir={tmp_path}/out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    # the table of parameters comes right before the first work
    assert process.stdout is not None
    while "are trainable" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "dlor: interrupted"
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_inspect_lists_layers_facts_and_totals(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    output = capsys.readouterr().out
    first, second = (line.split() for line in output.splitlines() if " scaled " in line and "mode" not in line)
    assert first[:8] == ["0", "scaled", "input", "1", "2", "24", "1", "0"]
    assert second[:8] == ["2", "scaled", "output", "1", "2", "24", "0", "0"]
    # nothing has been learned: that is any of them
    assert second[-2:] == ["LoRA", "DoRA"]
    assert "mode: scaled" in output
    assert "2 layers, 48 parameters in DLoR tensors, 192 bytes" in output
    assert "10 parameters saved in full, 40 bytes: 3.bias 2, 3.weight 2x4" in output


def damage_config(folder):
    (folder / "adapter_config.json").write_text("{")


def change_method(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_only(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, "adapter_config.json is damaged: not valid JSON"),
        (change_method, "is not a DLoR adapter: its peft_type is 'LORA', not 'DLOR'"),
        (truncate, "adapter_model.safetensors is damaged or truncated"),
        (pickle_only, "has no adapter_model.safetensors. Pickled weights are never read."),
    ],
)
def test_inspect_of_a_damaged_adapter_is_one_clear_error(adapter, damage, message, capsys):
    damage(adapter)
    assert main(["inspect", str(adapter)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
