"""What saves memory leaves the losses as they are, or, in half precision, near."""

import json

import pytest
from several import STEPS, write_task_recipe

from dlor_peft.cli import main


def losses_of(folder, name, *words):
    out = folder / name
    overrides = [f"output_dir={out}", "training.max_steps=6", "training.save_steps=6", "verify=false", *words]
    assert main(["train", str(folder / "recipe.yaml"), *overrides]) == 0
    state = json.loads((out / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert json.loads((out / "metrics.json").read_text())["states"] == {}
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_task_recipe(folder, "sft")
    return folder, losses_of(folder, "plain")


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (["training.gradient_accumulation_steps=4", "training.per_device_train_batch_size=2"], 1e-4),
        (["training.activation_checkpointing=true"], 1e-4),
        (["training.bf16=true"], 2e-2),
        (["model.dtype=bfloat16"], 2e-2),
    ],
)
def test_losses(plain, words, tolerance):
    folder, want = plain
    name = words[0].partition("=")[0]
    assert losses_of(folder, name, *words) == pytest.approx(want, rel=tolerance)
    assert len(want) == 6 < STEPS
