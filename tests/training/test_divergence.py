"""A run that diverges ends with the step, the layer and what to change; a healthy one does not."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from samples import error_of

from dlor_peft.cli import main
from dlor_peft.training.callbacks import add_callbacks
from dlor_peft.training.checkpoints import adapter_shapes
from dlor_peft.training.configs import build_adapter_config, build_training_arguments
from dlor_peft.training.folder import RunFolder
from dlor_peft.training.recipe import load_recipe
from dlor_peft.training.tasks import task_class
from dlor_peft.training.watching import DivergenceError

MULTIPLICATIVE = {"peft_type": "DLOR", "r": 2, "mode": "multiplicative", "depth": 2, "target_modules": "all-linear"}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
LAYER = "encoder.encoder.layer.1.output.dense"


def trainer_of(path, tmp_path, *overrides):
    recipe, _ = load_recipe(str(path), overrides)
    task = task_class(recipe.task.type)(recipe)
    model = get_peft_model(task.load_model(), build_adapter_config(recipe))
    expected = adapter_shapes(model)
    trainer = task.build_trainer(model, build_training_arguments(recipe))
    add_callbacks(trainer, recipe, RunFolder(tmp_path), expected)
    return trainer


def parameter(trainer, name):
    (found,) = [p for key, p in trainer.model.named_parameters() if LAYER in key and f"{name}." in key]
    return found


@pytest.mark.parametrize("adapter", [MULTIPLICATIVE, LORA], ids=["DLOR", "LORA"])
def test_a_rate_far_too_high_ends_the_run(write_recipe, tmp_path, capsys, adapter):
    path = write_recipe(adapter=adapter)
    error = error_of(capsys, path, "training.learning_rate=1e25", "training.max_steps=8")
    assert re.search(r"training diverged at step \d: (the gradients are not finite|what multiplies the weight)", error)
    assert re.search(r"encoder\.encoder\.layer\.\d\.\w+", error)
    assert "Lower training.learning_rate (1e+25 now)" in error
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("clip", [0, 1], ids=["unclipped", "clipped"])
def test_the_layer_whose_output_overflows_is_named_and_no_step_is_made(write_recipe, tmp_path, clip):
    trainer = trainer_of(write_recipe(adapter=MULTIPLICATIVE), tmp_path, f"training.max_grad_norm={clip}")
    weight = parameter(trainer, "dlor_U")
    with torch.no_grad():
        weight.fill_(3e38)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(DivergenceError, match=rf"step 1: the gradients .*with an output .*not finite is {LAYER}\."):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_gradient_alone_that_is_not_finite_ends_the_run(write_recipe, tmp_path):
    trainer = trainer_of(write_recipe(), tmp_path)
    parameter(trainer, "dlor_U").register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(
        DivergenceError, match=r"step 1: the gradients are not finite; the largest trained parameter, 0"
    ):
        trainer.train()


def test_a_loss_that_is_not_finite_ends_the_run_where_its_gradients_are(write_recipe, tmp_path, monkeypatch):
    trainer = trainer_of(write_recipe(), tmp_path)
    loss_of = trainer.compute_loss
    infinite = lambda *args, **kwargs: loss_of(*args, **kwargs) + torch.inf  # noqa: E731
    monkeypatch.setattr(trainer, "compute_loss", infinite)
    with pytest.raises(DivergenceError, match="at step 1: the logged loss is inf"):
        trainer.train()


def test_a_map_that_loses_all_but_one_direction_ends_the_run(write_recipe, tmp_path, capsys):
    path = write_recipe(adapter=MULTIPLICATIVE)
    error = error_of(capsys, path, "watch.max_condition=1.001")
    assert re.search(r"diverged at step 1: what multiplies the weight of encoder\.\S+ has a condition number", error)
    assert "above watch.max_condition = 1" in error
    assert "raise watch.max_condition" in error
    assert not (tmp_path / "out" / "adapter").exists()


def test_layers_without_a_condition_bound_are_not_stopped_by_it(write_recipe):
    assert main(["train", str(write_recipe()), "watch.max_condition=1.001"]) == 0


def test_the_bound_can_be_switched_off(write_recipe, tmp_path):
    trainer = trainer_of(write_recipe(adapter=MULTIPLICATIVE), tmp_path, "watch.max_condition=null")
    with torch.no_grad():
        # 1 + U V^T = 0 in the first direction
        parameter(trainer, "dlor_U")[0, 0, 0] = -1
        parameter(trainer, "dlor_V")[0] = 0
        parameter(trainer, "dlor_V")[0, 0, 0] = 1
    trainer.train()


def test_the_checkpoint_before_stays(write_recipe, tmp_path, capsys):
    path = write_recipe(adapter=MULTIPLICATIVE)
    steps = ["training.save_strategy=steps", "training.save_steps=1", "training.max_steps=30"]
    # the warm-up reaches the rate that no model stands some steps later
    error = error_of(capsys, path, *steps, "training.warmup_steps=20", "training.learning_rate=1e30")
    step = int(re.search(r"diverged at step (\d+)", error).group(1))
    kept = list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert {int(folder.name.partition("-")[2]) for folder in kept} >= {step - 1}
    state = json.loads(
        (tmp_path / "out" / "checkpoints" / f"checkpoint-{step - 1}" / "trainer_state.json").read_text()
    )
    assert state["global_step"] == step - 1


def test_factors_that_are_broken_are_named(write_recipe, tmp_path):
    trainer = trainer_of(write_recipe(), tmp_path)
    weight = parameter(trainer, "dlor_V")
    with torch.no_grad():
        weight.mul_(torch.nan)
    # in a layer whose U is 0, V has no part in the loss, but in the gradient of U
    with pytest.raises(DivergenceError, match=rf"first layer with a parameter that is not finite is {LAYER}"):
        trainer.train()


def test_overflowing_gradients_in_float16_are_no_divergence(write_recipe, tmp_path):
    trainer = trainer_of(write_recipe(), tmp_path)
    # what the Trainer would do with fp16 on a device: accelerate skips the step
    trainer.args.fp16 = True
    stop = trainer.callback_handler.callbacks[-1]
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.grad = torch.full_like(weight, torch.inf)
    stop.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)
