"""Two processes over gloo train what one does, and a run that was stopped goes on as if it had not been."""

import json
import shutil
import signal
from importlib.util import find_spec

import pytest
from peft import PeftModel
from samples import TOKENIZER
from several import BATCH, SAVE_STEPS, STEPS, Launched, assert_same_training, write_task_recipe
from transformers import AutoModelForCausalLM

from dlor_peft.cli import main
from dlor_peft.training.launch import PACKAGED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
MARK = f"checkpoints/checkpoint-{SAVE_STEPS}/dlor_checkpoint.json"
HALF = f"training.per_device_train_batch_size={BATCH // 2}"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of a recipe and of its run in one process."""
    folder = tmp_path_factory.mktemp("single")
    assert main(["train", str(write_task_recipe(folder, "sft"))]) == 0
    return folder


def test_one_process_goes_on_after_a_save_that_was_cut_off(single, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(single / "out", out)
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "adapter")
    for step in (3 * SAVE_STEPS, STEPS):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    # written, but for its mark
    (out / "checkpoints" / f"checkpoint-{2 * SAVE_STEPS}" / "dlor_checkpoint.json").unlink()
    assert main(["train", str(single / "recipe.yaml"), f"output_dir={out}", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint-{2 * SAVE_STEPS} is not complete: removed" in printed
    assert f"resuming at step {SAVE_STEPS}, from " in printed
    assert_same_training(out, single / "out")


def test_a_killed_process_ends_all_and_ddp_goes_on(single, tmp_path):
    """Started by dlor and killed, then started by `accelerate launch`."""
    out = tmp_path / "out"
    arguments = [single / "recipe.yaml", HALF, f"output_dir={out}"]
    run = Launched.dlor(tmp_path / "killed", *arguments, "--launch", "ddp", "--processes", 2)
    run.wait_for(out / MARK)
    run.rank(1).kill()
    assert run.end() == 128 + signal.SIGKILL, run.text
    assert "dlor: error: process 1 was ended by SIGKILL" in run.text
    assert "run the same command with --resume" in run.text
    assert "Traceback" not in run.text
    base = AutoModelForCausalLM.from_pretrained(TOKENIZER)
    PeftModel.from_pretrained(base, (out / MARK).parent)

    command = ["-m", "accelerate.commands.launch", "--config_file", PACKAGED["ddp"], "--num_processes", 2]
    words = ["--main_process_port", 0, "--module", "dlor_peft.cli", "train", *arguments, "--resume"]
    run = Launched(tmp_path / "resumed", *command, *words)
    assert run.end() == 0, run.text
    assert run.text.count("resuming at step") == 1
    assert_same_training(out, single / "out")


@pytest.mark.parametrize(
    ("launch", "distributed_type"), [("fsdp2", "FSDP"), pytest.param("zero3", "DEEPSPEED", marks=NEEDS_DEEPSPEED)]
)
def test_ctrl_c_saves_and_sharded_training_goes_on(single, tmp_path, launch, distributed_type):
    out = tmp_path / "out"
    command = [single / "recipe.yaml", HALF, f"output_dir={out}", "--launch", launch, "--processes", 2]
    run = Launched.dlor(tmp_path / "stopped", *command)
    run.wait_for(out / MARK)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.text
    assert run.text.count("dlor: SIGINT: this step ends, then a checkpoint is saved.") == 1
    assert run.text.count("dlor: stopped after step") == 1
    assert "Traceback" not in run.text
    marks = [json.loads(path.read_text()) for path in out.glob("checkpoints/*/dlor_checkpoint.json")]
    assert max(mark["step"] for mark in marks) > SAVE_STEPS
    assert {mark["num_keys"] for mark in marks} == {5 * 7 * 3}
    assert {mark["devices"]["distributed_type"] for mark in marks} == {distributed_type}

    run = Launched.dlor(tmp_path / "resumed", *command, "--resume")
    assert run.end() == 0, run.text
    assert_same_training(out, single / "out")


@pytest.mark.parametrize(
    ("task", "launch"),
    [
        ("dpo", "ddp"),
        ("seq2seq", "fsdp2"),
        # BERT's layers have a bias
        pytest.param("classification", "zero3", marks=NEEDS_DEEPSPEED),
        ("embedding of pairs", "ddp"),
        ("embedding of scores", "ddp"),
    ],
)
def test_every_task_trains_as_in_one_process(tmp_path, task, launch):
    path = write_task_recipe(tmp_path, task)
    assert main(["train", str(path)]) == 0
    out = tmp_path / launch
    run = Launched.dlor(tmp_path / "log", path, HALF, f"output_dir={out}", "--launch", launch, "--processes", 2)
    assert run.end() == 0, run.text
    assert_same_training(out, tmp_path / "out")


def test_an_embedding_model_is_not_sharded(tmp_path):
    path = write_task_recipe(tmp_path, "embedding of pairs")
    run = Launched.dlor(tmp_path / "log", path, "--launch", "fsdp2", "--processes", 2)
    assert run.end() == 2, run.text
    assert "Train an embedding model with --launch ddp." in run.text
    assert not (tmp_path / "out").exists()


def test_an_error_of_all_processes_is_told_once(single, tmp_path):
    command = [single / "recipe.yaml", f"output_dir={tmp_path / 'out'}", "--launch", "ddp", "--processes", 2]
    run = Launched.dlor(tmp_path / "log", *command, "adapter.target_modules=[nope]")
    assert run.end() == 2, run.text
    assert run.text.count("dlor: error:") == 1
    assert "Traceback" not in run.text
    assert not (tmp_path / "out").exists()
