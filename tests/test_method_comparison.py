"""scripts/method_comparison: the experiments load and train, and the row comes out of a harness of PEFT's layout.

The harness itself needs an accelerator, the weights of Llama-3.2-3B and two data sets; metamath_harness/ stands in for
it, with the same files, arguments and checks, the same way to read a configuration, and the same place for the row.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from tiny_models import build

from dlor_peft import DLoRConfig, DLoRLayer

FOLDER = Path(__file__).parents[1] / "scripts" / "method_comparison"
STAND_IN = Path(__file__).parent / "metamath_harness"
EXPERIMENTS = sorted((FOLDER / "experiments" / "dlor").iterdir())
PLAIN, SET = "llama-3.2-3B-rank32", "llama-3.2-3B-rank32-lr2e-4"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A git clone on branch main with PEFT's source, and the stand-in where PEFT has its harness."""
    root = tmp_path / "peft"
    shutil.copytree(Path(peft.__file__).parent, root / "src" / "peft")
    harness = root / "method_comparison" / "MetaMathQA"
    shutil.copytree(STAND_IN, harness, ignore=shutil.ignore_patterns("__pycache__"))
    (harness / "experiments" / "lora").mkdir(parents=True)
    (harness / "README.md").write_text("Python 3.11+ is required.\n")
    (root / ".gitignore").write_text("__pycache__/\n/src/\n")
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "add", "--all")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "harness")
    return root


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(FOLDER / "run.py"), "--peft", str(checkout), *arguments]
    return subprocess.run(command, cwd=checkout.parent, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_loads_and_trains(folder):
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config) is DLoRConfig
    assert config.task_type == "CAUSAL_LM"
    # the layers of the LoRA rows, which leave the choice to PEFT
    assert config.target_modules == set(TARGETS["llama"])
    given = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": config.target_modules}
    assert given.items() <= config.to_dict().items()
    model = get_peft_model(build("llama").bfloat16(), config)
    assert sum(isinstance(module, DLoRLayer) for module in model.modules()) == 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 23).view(2, 10)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_the_files_of_an_experiment_are_those_the_harness_reads(folder):
    assert {path.name for path in folder.iterdir()} <= {"adapter_config.json", "training_params.json"}
    set_here = folder / "training_params.json"
    known = json.loads((STAND_IN / "default_training_params.json").read_text())
    values = json.loads(set_here.read_text()) if set_here.exists() else {}
    assert set(values) <= set(known)
    assert all(value != known[name] for name, value in values.items())
    assert set(values.get("optimizer_kwargs", {})) <= {"lr", "weight_decay"}


def test_the_table_of_the_readme_is_what_is_counted():
    counts = runpy.run_path(str(FOLDER / "parameters.py"))["counts"]()
    table = re.findall(r"^\| `((?:dlor|lora)/[^`]+)` \| ([\d,]+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {name: int(number.replace(",", "")) for name, number in table} == counts


def test_the_row_comes_out(checkout):
    done = run(checkout, SET, "-v", "--clean")
    assert done.returncode == 0, done.stderr
    file = checkout / "method_comparison/MetaMathQA/results" / f"dlor--{SET}.json"
    assert f"{file.name}: success; " in done.stdout
    row = json.loads(file.read_text())
    assert row["run_info"]["experiment_name"] == f"dlor/{SET}"
    assert row["run_info"]["peft_config"]["peft_type"] == "DLOR"
    assert row["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 2e-4, "weight_decay": 0.1}
    # of q_proj (32, 32) and v_proj (16, 32) in two layers: U, V and the diagonal of the smaller side
    assert row["train_info"]["num_trainable_params"] == 2 * (32 * 64 + 32 + 32 * 48 + 16)
    losses = row["train_info"]["losses"]
    assert len(losses) == 4
    assert len(set(losses)) > 1
    # nothing else of the clone has changed
    status = git(checkout, "status", "--porcelain", "--untracked-files=all").splitlines()
    assert [line.removeprefix("?? method_comparison/MetaMathQA/") for line in status] == [
        f"experiments/dlor/{SET}/adapter_config.json",
        f"experiments/dlor/{SET}/training_params.json",
        f"results/dlor--{SET}.json",
    ]


def test_a_failed_training_is_no_success(checkout):
    """The harness writes a row of what went wrong and exits with 0."""
    defaults = checkout / "method_comparison/MetaMathQA/default_training_params.json"
    defaults.write_text(defaults.read_text().replace('"grad_norm_clip": 1.0', '"grad_norm_clip": null'))
    git(checkout, "checkout", "--quiet", "-b", "other")
    done = run(checkout, PLAIN)
    assert done.returncode == 1, done.stderr
    assert f"cancelled_results/dlor--{PLAIN}.json: canceled; " in done.stdout


def test_what_cannot_run_is_told_before(checkout, tmp_path):
    harness = checkout / "method_comparison" / "MetaMathQA"
    script = runpy.run_path(str(FOLDER / "run.py"))
    check, copy, errors = script["check"], script["copy"], (FileNotFoundError, FileExistsError, ValueError)
    plain, lr = (FOLDER / "experiments" / "dlor" / name for name in (PLAIN, SET))

    def error(change=lambda: None, call=lambda: check(checkout, lr)) -> str:
        change()
        with pytest.raises(errors) as caught:
            call()
        return str(caught.value)

    assert check(checkout, lr) == harness
    copied = harness / copy(plain, harness)
    assert copy(plain, harness) == Path("experiments/dlor") / PLAIN
    assert [path.name for path in copied.parent.iterdir()] == [PLAIN]
    (copied / "adapter_config.json").write_text("{}")
    assert "differs from" in error(call=lambda: copy(plain, harness))
    defaults = harness / "default_training_params.json"
    text = defaults.read_text()
    assert "sets optimizer_kwargs" in error(lambda: defaults.write_text(text.replace("optimizer_kwargs", "optim")))
    check(checkout, plain)
    assert "asks for 3.99" in error(lambda: (harness / "README.md").write_text("Python 3.99+ is required."))
    source = checkout / "src/peft/__init__.py"
    assert "is PEFT 0.20.1, and dlor-peft needs peft>=0.21" in error(
        lambda: source.write_text('__version__ = "0.20.1"\n')
    )
    assert "has no method_comparison/MetaMathQA/utils.py" in error((harness / "utils.py").unlink)
    assert "huggingface/peft" in error(call=lambda: check(tmp_path / "none", plain))


def test_the_command_line_tells_in_one_line(tmp_path):
    done = run(tmp_path / "none", PLAIN)
    assert done.returncode == 2
    assert "run.py: error: --peft" in done.stderr
    assert "Traceback" not in done.stderr
    unknown = run(tmp_path, "rank1")
    assert unknown.returncode == 2
    assert PLAIN in unknown.stderr
