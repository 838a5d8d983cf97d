"""The README's commands and code are what the package does."""

import ast
import re
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import get_peft_model
from tiny_models import build, inputs

import dlor_peft
from dlor_peft.cli import main
from dlor_peft.training.launch import PACKAGED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(first: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == [first]]


def block_with(text):
    (block,) = (block for block in blocks("python") if text in block)
    return block


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0])
def test_what_the_python_code_imports_of_us_is_there(block):
    for statement in ast.parse(block).body:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("dlor_peft"):
            exec(ast.unparse(statement), {})


# PEFT asks the hub for a tokenizer that a local adapter folder does not have
@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")
def test_the_python_code_runs_from_training_to_merging(tmp_path, monkeypatch):
    make, load = block_with('save_pretrained("my-adapter")'), block_with('from_pretrained("my-adapter")')
    load_merged = block_with('from_pretrained("merged")')
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(make.replace("Qwen/Qwen3-0.6B", str(tmp_path / "base")), names)
    assert names["config"].peft_type == "DLOR"
    assert any(parameter.requires_grad for parameter in names["model"].parameters())
    exec(load, names)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(names["model"](input_ids=ids).logits, base(input_ids=ids).logits)
        assert main(["merge", "--adapter", "my-adapter", "--out", "merged"]) == 0
        exec(load_merged, names)
        assert torch.equal(names["model"].eval()(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("words", commands("dlor"), ids=" ".join)
def test_the_dlor_commands_parse(words, tmp_path, monkeypatch, capsys):
    if words[1] != "train":
        # with no such adapter or model, in the folder that the test is in
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert main(words[1:]) == 2
        error = capsys.readouterr().err
        assert any(text in error for text in ("there is no folder", "no adapter in", "Hub"))
        return
    monkeypatch.chdir(ROOT)
    (tmp_path / "my.yaml").write_text((ROOT / "recipes" / "smol-lm-sft.yaml").read_text().replace("./", "/"))
    (tmp_path / "my-accelerate.yaml").write_text(PACKAGED["fsdp2"].read_text())
    words = [str(tmp_path / word) if (tmp_path / word).is_file() else word for word in words[1:]]
    # instead of what it would do
    words = [word for word in words if word != "--dry-run"]
    assert main([*words, "--explain"]) == 0
    assert "peft_type: DLOR" in capsys.readouterr().out


def test_the_files_that_contributors_are_told_of_are_there():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`([\w./]+(?:\.(?:py|sh|txt|toml)|/))`", text)
    assert names
    for name in names:
        assert any((ROOT / folder / name).exists() for folder in ("", "dlor_peft", "dlor_peft/kernels")), name


def test_the_scripts_it_names_are_there():
    for words in commands("bash"):
        assert (ROOT / words[1]).is_file()


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_modes_are_those_of_the_config():
    for name in dlor_peft.config.MODES:
        assert f'`"{name}"`' in README


def test_the_optimiser_and_starts_run():
    code = block_with("initialize_from_data")
    config = dlor_peft.DLoRConfig(r=2, mode="multiplicative", target_modules=["q_proj"], modules_to_save=["lm_head"])
    names = {"model": get_peft_model(build("llama"), config), "dataloader": [inputs("llama")] * 2}
    exec(code, names)
    assert [group["role"] for group in names["optimizer"].param_groups] == ["diagonal", "U", "V", "full"]
