"""What `--launch` refuses before it starts anything; what it starts is in test_devices.py."""

import pytest
import yaml
from samples import error_of

from dlor_peft.cli import main
from dlor_peft.training.launch import PACKAGED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--launch", "fsdp"],
            "--launch: 'fsdp' is no file. Did you mean 'fsdp2'? Packaged configurations: ddp, fsdp2",
        ),
        (["--launch", "ddp"], "--launch: without an accelerator, say how many processes: --processes 2."),
        (["--processes", "2"], "--processes: a number from 1 on, with --launch ddp, fsdp2, zero3 or a file."),
        (["--launch", "ddp", "--processes", "0"], "--processes: a number from 1 on"),
        (["--launch", "ddp", "--processes", "2", "training=3"], "training: Input should be an object, but it is 3."),
    ],
)
def test_wrong_options(write_recipe, capsys, options, message):
    assert message in error_of(capsys, write_recipe(), *options)


@pytest.mark.parametrize("kind", [None, "NO", "MULTI_CPU"])
def test_a_configuration_that_would_start_one_process(write_recipe, tmp_path, capsys, kind):
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": kind, "num_processes": 2}))
    error = error_of(capsys, write_recipe(), "--launch", file)
    assert f"has distributed_type {kind}, with which Accelerate starts one process or mpirun" in error


def test_a_run_is_replaced_or_continued(write_recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(write_recipe()), "--overwrite", "--resume"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_packaged_configurations():
    assert set(PACKAGED) == {"ddp", "fsdp2", "zero3"}
