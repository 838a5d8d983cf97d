"""What does not fit, or cannot be read or written, is named: the tensor, its shape, the file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import assert_equal_folders
from tiny_models import adapted, build

from dlor_peft.cli import main

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.1.mlp.up_proj"
MODULE = "model.layers.1.mlp.up_proj"

# each case in a process of its own, which may write files of a size at most, or kills itself where it comes to a file
PROGRAM = """
import json, os, resource, signal, sys
import dlor_peft.deploy.merge
from dlor_peft.cli import main

def die_at(end):
    def hook(event, details):
        if event in ("open", "os.rename") and ".partial" in str(details[0]) and str(details[0]).endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

codes = {}
for case, (kind, value, words) in json.loads(sys.argv[1]).items():
    pid = os.fork()
    if not pid:
        if kind == "kill":
            die_at(value)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
        os._exit(main(words))
    codes[case] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build("llama").save_pretrained(folder / "base", max_shard_size="10KB")
    adapted("llama", "scaled-both", task_type="CAUSAL_LM").save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


@pytest.fixture
def base(saved, tmp_path):
    return shutil.copytree(saved / "base", tmp_path / "base")


def change(adapter: Path, function) -> None:
    tensors = load_file(adapter / WEIGHTS)
    function(tensors)
    save_file(tensors, adapter / WEIGHTS)


def refused(words, capsys) -> str:
    assert main([str(word) for word in words]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    return message


def merging(base: Path, adapter: Path, out: Path) -> list:
    return ["merge", "--base", base, "--adapter", adapter, "--out", out]


def put(key, value):
    return lambda tensors: tensors.update({key: value(tensors.get(key))})


def with_one(value):
    def of(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return of


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (put(f"{LAYER}.dlor_V.weight", with_one(float("nan"))), [f"{LAYER}.dlor_V.weight", "NaN or infinity"]),
        (put(f"{LAYER}.dlor_U.weight", with_one(float("-inf"))), [f"{LAYER}.dlor_U.weight", "NaN or infinity"]),
        (put(f"{LAYER}.dlor_U.weight", lambda U: U[..., :2].clone()), [MODULE, "dlor_U of shape (1, 24, 2)", "r 3"]),
        (put(f"{LAYER}.dlor_U.weight", lambda U: U[0].clone()), [MODULE, "dlor_U of shape (24, 3)", "depth 1"]),
        (put(f"{LAYER}.dlor_diag.weight", lambda d: d[:, :9].clone()), [MODULE, "dlor_diag of shape (1, 9)"]),
        (put(f"{LAYER}.dlor_diag.weight", lambda d: d.repeat(2, 1)), [MODULE, "dlor_diag of shape (2, 24)"]),
        (put(f"{LAYER}.dlor_U.weight", lambda U: U.int()), [f"{LAYER}.dlor_U.weight", "torch.int32"]),
        (lambda tensors: tensors.pop(f"{LAYER}.dlor_V.weight"), [MODULE, "has no dlor_V"]),
        (lambda tensors: tensors.pop(f"{LAYER}.dlor_diag_in.weight"), [MODULE, "has no dlor_diag_in"]),
        (put("other.dlor_U.weight", lambda _: torch.ones(1, 4, 3)), ["other has no dlor_V, dlor_diag"]),
    ],
)
def test_tensors_that_no_layer_can_have(damage, parts, adapter, base, tmp_path, capsys):
    change(adapter, damage)
    for words in (["inspect", adapter], merging(base, adapter, tmp_path / "out")):
        message = refused(words, capsys)
        assert all(part in message for part in parts), message


def drop_layer(tensors):
    for key in [key for key in tensors if key.startswith(LAYER)]:
        del tensors[key]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (drop_layer, ["lacks 4 of 32 tensors", f"first one {LAYER}.dlor_"]),
        (
            put(f"{PREFIX}model.layers.1.mlp.gone.weight", lambda _: torch.ones(2, 5)),
            [f"a tensor {PREFIX}model.layers.1.mlp.gone.weight", "(2, 5)", "nothing in"],
        ),
        (
            put(f"{PREFIX}model.norm.weight", lambda _: torch.ones(5)),
            [f"{PREFIX}model.norm.weight has the shape (5,)", "needs (16,)"],
        ),
        (
            put(f"{LAYER}.dlor_V.weight", lambda V: torch.cat([V, V], 1)),
            [f"{LAYER}.dlor_V.weight has the shape (1, 32, 3)", "needs (1, 16, 3)"],
        ),
    ],
)
def test_tensors_that_the_base_has_no_place_for(damage, parts, adapter, base, tmp_path, capsys):
    change(adapter, damage)
    for words in (["inspect", adapter, "--base", base], merging(base, adapter, tmp_path / "out")):
        message = refused(words, capsys)
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "text"), [(truncate, "is damaged or truncated"), (remove, "has no model-00002-of-")]
)
def test_a_damaged_shard_of_the_base(damage, text, adapter, base, tmp_path, capsys):
    (shard,) = base.glob("model-00002-of-*.safetensors")
    damage(shard)
    for words in (["inspect", adapter, "--base", base], merging(base, adapter, tmp_path / "out")):
        message = refused(words, capsys)
        assert text in message
        assert shard.name in message
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


@pytest.mark.parametrize(
    "name", ["../adapter/adapter_model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""]
)
def test_an_index_that_leads_outside(name, adapter, base, tmp_path, capsys):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    message = refused(merging(base, adapter, tmp_path / "out"), capsys)
    assert str(path) in message
    assert repr(name) in message
    assert "outside" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"), ("config.json", "{}"), ("config.json", '{"model_type": "no-such"}'),
        ("config.json", '{"model_type": 3}'), ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", '{"model_type": "llama", "quantization_config": 7}'),
        ("model.safetensors.index.json", "{"), ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {}}'),
    ],
)  # fmt: skip
def test_a_damaged_configuration_of_the_base(name, content, adapter, base, tmp_path, capsys):
    (base / name).write_text(content)
    assert refused(merging(base, adapter, tmp_path / "out"), capsys).startswith("dlor: error:")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_a_base_without_one_weight(adapter, base, tmp_path, capsys):
    (shard,) = base.glob("model-00002-of-*.safetensors")
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    shape = tuple(tensors.pop(name).shape)
    save_file(tensors, shard, {"format": "pt"})
    message = refused(merging(base, adapter, tmp_path / "out"), capsys)
    assert f"{name} {shape}" in message


def test_where_nothing_can_be_written(adapter, base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    message = refused(merging(base, adapter, tmp_path / "file" / "out"), capsys)
    assert f"cannot write to {tmp_path / 'file'}" in message
    message = refused(merging(base, adapter, tmp_path / "file"), capsys)
    assert "is there already" in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(adapter, base, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o555)
    message = refused(merging(base, adapter, tmp_path / "closed" / "out"), capsys)
    assert f"cannot write to {tmp_path / 'closed'}" in message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_and_a_killed_process(saved, tmp_path, capsys):
    cases: dict[str, tuple] = {
        "full": ("limit", 5000),
        "before the weights": ("kill", "model.safetensors"),
        "after the weights": ("kill", "dlor_merge.json"),
        "at the end": ("kill", ".partial"),
    }
    commands = {
        case: (*how, [str(word) for word in merging(saved / "base", saved / "adapter", tmp_path / case / "out")])
        for case, how in cases.items()
    }
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == {case: 2 if case == "full" else -9 for case in cases}
    message = f"dlor: error: {tmp_path / 'full' / 'out'} was not written: File too large. Nothing is left of it."
    assert message in result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "full").iterdir())

    merge = [str(word) for word in merging(saved / "base", saved / "adapter", tmp_path / "undisturbed")]
    assert main(merge) == 0
    for case in list(cases)[1:]:
        assert [path.name for path in (tmp_path / case).iterdir()] == [".out.partial"]
        assert main([*merge[:-1], str(tmp_path / case / "out")]) == 0
        assert [path.name for path in (tmp_path / case).iterdir()] == ["out"]
        assert_equal_folders(tmp_path / case / "out", tmp_path / "undisturbed")
