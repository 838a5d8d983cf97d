"""`dlor merge` as it is called: local folders, repositories on a Hub, and its cache without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from saved import adapt_tiny, assert_equal_folders
from tiny_models import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dlor_peft.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A base with a tokenizer, an adapter, and what `merge_and_unload` makes of the two."""
    model = adapt_tiny("llama", "scaled", tmp_path, torch.bfloat16)
    words = {"<unk>": 0, **{f"word{index}": index for index in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "want")
    return tmp_path


def test_merge_and_verify(folder, capsys):
    arguments = ["merge", "--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    assert main([*arguments, "--out", str(folder / "out"), "--verify", "--prompt", "word3 word4 word5"]) == 0
    printed = capsys.readouterr().out
    assert "weights of LlamaForCausalLM adapted, of each update at least" in printed
    assert "verified: largest logit difference" in printed
    assert "of 3 tokens agree" in printed
    assert_equal_folders(folder / "out", folder / "want")
    assert main([*arguments, "--out", str(folder / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_nothing_to_verify_with(folder, capsys):
    for path in folder.glob("base/tokenizer*"):
        path.unlink()
    arguments = ["merge", "--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    assert main([*arguments, "--out", str(folder / "out"), "--verify"]) == 2
    assert "is written, and not verified: it has no tokenizer" in capsys.readouterr().err
    assert_equal_folders(folder / "out", folder / "want")


def test_a_warning_is_one_line(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1e-2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    arguments = ["merge", "--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
    command = [sys.executable, "-m", "dlor_peft.cli", *arguments, "--out", str(folder / "out")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert sum(line.startswith("dlor: warning: ") and "rounding dropped" in line for line in lines) == 1
    assert not any("FutureWarning" in line or "arguments.out" in line for line in lines)


def test_the_base_that_the_adapter_names(folder, capsys):
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    arguments = ["merge", "--adapter", str(folder / "adapter"), "--out", str(folder / "out")]
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert main(arguments) == 2
    assert "pass --base" in capsys.readouterr().err
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(folder / "base")}))
    assert main(arguments) == 0
    assert_equal_folders(folder / "out", folder / "want")


@pytest.mark.parametrize("what", ["adapter", "base"])
def test_neither_a_folder_nor_a_repository(folder, capsys, what):
    sources = {"adapter": str(folder / "adapter"), "base": str(folder / "base"), what: "./no/such/folder"}
    arguments = ["--base", sources["base"], "--adapter", sources["adapter"], "--out", str(folder / "out")]
    assert main(["merge", *arguments]) == 2
    assert "there is no folder ./no/such/folder" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_hub_and_from_its_cache(folder):
    def dlor(hub, *arguments, offline=False):
        environment = {**hub.environment(folder / "home", offline=offline), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "dlor_peft.cli", "merge", "--base", "org/base", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    (folder / "repository").mkdir()
    (folder / "adapter").rename(folder / "repository" / "second")
    with HubServer() as hub:
        hub.add_repo("org/base", folder / "base")
        hub.add_repo("org/adapter", folder / "want")
        hub.add_repo("org/adapter", folder / "repository", "v2")
        adapter = ("--adapter", "org/adapter", "--subfolder", "second")
        done = dlor(hub, *adapter, "--revision", "v2", "--out", str(folder / "out"))
        assert done.returncode == 0, done.stderr
        missing = dlor(hub, *adapter, "--revision", "v3", "--out", str(folder / "none"))
        assert missing.returncode == 2
        assert "org/adapter is no folder here" in missing.stderr
        assert "v3" in missing.stderr
        assert "Traceback" not in missing.stderr
        revision = hub.repos["org/adapter"].branches["v2"]
        hub.requests.clear()
        done = dlor(hub, *adapter, "--revision", "v2", "--out", str(folder / "offline"), offline=True)
        assert done.returncode == 0, done.stderr
        assert not hub.requests
    assert_equal_folders(folder / "out", folder / "want")
    assert_equal_folders(folder / "offline", folder / "want")
    assert not (folder / "none").exists()
    record = json.loads((folder / "out" / "dlor_merge.json").read_text())
    assert record["adapters"][0]["revision"] == revision
    assert record["base"]["source"] == "org/base"
