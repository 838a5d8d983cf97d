"""Signals, a full disk, and what is resumed: nothing is lost that was whole."""

import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file
from transformers import Trainer

from dlor_peft.cli import main
from dlor_peft.training.checkpoints import verify_adapter

SAVES = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=1"]


@pytest.fixture
def signalled(monkeypatch):
    """Sends signals to this process during a step."""

    def at(step, *numbers):
        original = Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return at


def steps(out):
    return sorted(json.loads(path.read_text())["step"] for path in out.glob("checkpoints/*/dlor_checkpoint.json"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(write_recipe, tmp_path, capsys, signalled, number):
    path = write_recipe()
    # save_strategy is no: a stop saves nevertheless
    signalled(2, number)
    assert main(["train", str(path), "training.max_steps=4"]) == 130
    error = capsys.readouterr().err
    assert f"dlor: {number.name}: this step ends, then a checkpoint is saved. Once more ends at once." in error
    assert f"dlor: stopped after step 2 of 4, which {tmp_path}/out/checkpoints holds." in error
    assert "--resume" in error
    assert steps(tmp_path / "out") == [2]
    assert not (tmp_path / "out" / "adapter").exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)

    assert main(["train", str(path), "training.max_steps=4"]) == 2
    assert "Go on with --resume, replace it with --overwrite" in capsys.readouterr().err
    assert main(["train", str(path), "training.max_steps=4", "--resume"]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 4


@pytest.mark.parametrize("stop", [6, 8])
def test_what_goes_on_sees_the_same_rows(write_recipe, tmp_path, signalled, stop):
    """Batches grouped by length are drawn anew in each epoch of six steps; dropout draws too."""
    words = [
        "training.max_steps=13",
        "training.train_sampling_strategy=group_by_length",
        "training.save_strategy=steps",
        "training.save_steps=13",
        "model.config={hidden_dropout_prob: 0.1}",
    ]
    path = write_recipe()

    def losses():
        file = tmp_path / "out" / "checkpoints" / "checkpoint-13" / "trainer_state.json"
        history = json.loads(file.read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    assert main(["train", str(path), *words]) == 0
    want = losses()
    signalled(stop, signal.SIGINT)
    assert main(["train", str(path), *words, "--overwrite"]) == 130
    assert main(["train", str(path), *words, "--resume"]) == 0
    assert losses() == pytest.approx(want, rel=1e-6)
    assert len(want) == 13


def test_a_second_ctrl_c_ends_at_once(write_recipe, tmp_path, capsys, signalled):
    signalled(2, signal.SIGINT, signal.SIGINT)
    assert main(["train", str(write_recipe()), *SAVES]) == 130
    assert capsys.readouterr().err.strip().endswith("dlor: interrupted")
    assert steps(tmp_path / "out") == [1]


def test_a_stop_after_the_last_step_is_none(write_recipe, tmp_path, signalled):
    signalled(2, signal.SIGINT)
    assert main(["train", str(write_recipe())]) == 0
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_a_run_that_ended_after_its_last_step_makes_no_more(write_recipe, tmp_path):
    """The Trainer would make one: step 4 of 6 in the epoch."""
    path = write_recipe()
    assert main(["train", str(path), *SAVES]) == 0
    before = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "adapter")
    assert main(["train", str(path), *SAVES, "--resume"]) == 0
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all((before[key] == after[key]).all() for key in before)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 4


def test_only_so_many_checkpoints_are_kept(write_recipe, tmp_path):
    assert main(["train", str(write_recipe()), *SAVES, "training.save_total_limit=2"]) == 0
    assert steps(tmp_path / "out") == [3, 4]
    assert len(list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))) == 2


def test_what_cannot_be_resumed(write_recipe, tmp_path, capsys):
    path = write_recipe()

    def error(*words):
        assert main(["train", str(path), *SAVES, *words]) == 2
        return capsys.readouterr().err

    assert "holds no complete checkpoint. Start anew without --resume;" in error("--resume")
    assert main(["train", str(path), *SAVES]) == 0
    (tmp_path / "out" / "metrics.json").unlink()
    message = error("--resume", "training.learning_rate=2e-2", "adapter.r=3")
    assert "checkpoint-4 is of another recipe (different: adapter.r, training.learning_rate)" in message
    assert steps(tmp_path / "out") == [1, 2, 3, 4]


@contextmanager
def no_file_larger_than(size):
    """As a full disk: the write fails in the kernel."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk(write_recipe, tmp_path, capsys, file):
    path = write_recipe(adapter={"peft_type": "DLOR", "r": 16, "target_modules": "all-linear"})
    assert main(["train", str(path), *SAVES]) == 0
    out = tmp_path / "out"
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "adapter")
    for step in (2, 3, 4):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    capsys.readouterr()
    with no_file_larger_than((out / "checkpoints" / "checkpoint-1" / file).stat().st_size - 1):
        assert main(["train", str(path), *SAVES, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("dlor: error:") == 1
    assert f"dlor: error: {out}/checkpoints/checkpoint-2 could not be written: " in error
    assert f"The last complete checkpoint, {out}/checkpoints/checkpoint-1, is intact" in error
    assert "with --resume" in error
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(["train", str(path), *SAVES, "--resume"]) == 0
    assert not list(out.rglob("*.partial*"))


def test_a_full_disk_when_the_adapter_is_saved(write_recipe, tmp_path, capsys):
    path = write_recipe(adapter={"peft_type": "DLOR", "r": 16, "target_modules": "all-linear"})
    assert main(["train", str(path)]) == 0
    file = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    with no_file_larger_than(file.stat().st_size - 1):
        assert main(["train", str(path), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert f"dlor: error: {tmp_path}/out/adapter could not be written: " in error
    assert "There is no earlier checkpoint: make room, then run the same command with --overwrite." in error
    left = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert left == ["environment.json", "layers.jsonl", "recipe.yaml"]


def test_an_adapter_that_is_not_whole_is_named(tmp_path):
    import torch

    whole = {"a": (2, 3), "b": (4,)}
    file = tmp_path / "adapter_model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4), "embedding": torch.zeros(1)}, file)
    assert verify_adapter(tmp_path, whole) == 3
    save_file({"a": torch.zeros(2, 3)}, file)
    with pytest.raises(ValueError, match="1 of 2 tensors are missing or wrong, b is missing"):
        verify_adapter(tmp_path, whole)
    save_file({"a": torch.zeros(0), "b": torch.zeros(4)}, file)
    with pytest.raises(ValueError, match=r"a is \(0,\) in place of \(2, 3\)"):
        verify_adapter(tmp_path, whole)
