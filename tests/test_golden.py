"""Adapters written by every released version load and give what they gave; names of tensors and fields are frozen."""

import json

import pytest
import torch
from golden.net import ADAPTERS, HERE, IDS, adapted, base
from peft import PeftModel
from safetensors.torch import load_file

VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "base.safetensors").exists())
CASES = [
    (version, name)
    for version in VERSIONS
    for name in sorted(load_file(HERE / version / "outputs.safetensors"))
    if name != "base"
]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_a_golden_adapter_gives_what_it_gave(version, name):
    folder = HERE / version
    outputs = load_file(folder / "outputs.safetensors")
    model = PeftModel.from_pretrained(base(folder), folder / name).eval()
    assert (outputs[name] - outputs["base"]).abs().max() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), outputs[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(IDS), outputs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("version", "name"), CASES)
def test_names_and_shapes_of_the_tensors_are_frozen(version, name, tmp_path):
    adapted(base(HERE / version), name).save_pretrained(tmp_path)
    now, then = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, HERE / version / name))
    assert {key: value.shape for key, value in now.items()} == {key: value.shape for key, value in then.items()}


@pytest.mark.parametrize(("version", "name"), CASES)
def test_fields_of_the_config_are_kept(version, name, tmp_path):
    adapted(base(HERE / version), name).peft_config["default"].save_pretrained(tmp_path)
    now, then = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, HERE / version / name)
    )
    for field in ("peft_version", "dlor_version", "auto_mapping", "inference_mode"):
        del then[field]
    assert {field: _sorted(now.get(field, "gone")) for field in then} == {k: _sorted(v) for k, v in then.items()}


def _sorted(value):
    # the config holds target_modules as a set
    return sorted(value) if isinstance(value, list) else value


def test_there_are_golden_adapters_and_they_are_small():
    assert {name for _, name in CASES} == set(ADAPTERS)
    for version in VERSIONS:
        assert sum(path.stat().st_size for path in (HERE / version).rglob("*.*")) < 50_000
